/**
 * rescue --watch: looks again and again until it is stopped. Where the server says which keys were written, those are looked
 * at soon; a scan of all keys runs beside it, slowly, because such a word may get lost. Where it says nothing, the scan is
 * all there is, and comes often.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { backoffMs } from '../../shared/backoff.js'
import { isBug } from '../../shared/config.js'
import { reasonOf } from '../../shared/log.js'
import type { Rescue } from './look.js'
import type { News } from './news.js'

/** A bot writes its blob with every frame of audio: each key is read once in so long, at most. */
const NEWS_MS = 500
const TICK_MS = 100
/** Calls that went silent are looked for this often. */
const SILENT_MS = 1000
const FIRST_RETRY_MS = 200
const MAX_RETRY_MS = 5000

export interface WatchOptions {
  /** Undefined: there is only the scan. */
  news: News | undefined
  /** From the beginning of a scan to that of the next one. */
  scanMs: number
  signal: AbortSignal
  /** Says what went wrong, and that it is over. */
  say: (line: string) => void
}

export class Watch {
  private nextScan = 0
  private nextNews = 0
  private nextSilent = 0
  private failures = 0
  private hasEndedMissed = false

  constructor(
    private readonly rescue: Rescue,
    private readonly options: WatchOptions,
  ) {}

  /**
   * Until the signal. A Redis that is away is waited for.
   *
   * @returns whether all that was there has been stored: every key was met once, and nothing failed in the end
   */
  async run(): Promise<boolean> {
    const { signal, say } = this.options
    while (!signal.aborted) {
      try {
        await this.round()
        if (this.failures > 0) say('Redis answers again')
        this.failures = 0
        await sleep(TICK_MS, undefined, { signal }).catch(() => undefined)
      } catch (error) {
        if (signal.aborted) return false // what could not be stored is there for the next run
        if (isBug(error)) throw error
        if (this.failures++ === 0) say(`Redis does not do its part, trying again: ${reasonOf(error as Error)}`)
        this.nextScan = 0 // what news was taken is not stored
        await sleep(backoffMs(this.failures, FIRST_RETRY_MS, MAX_RETRY_MS), undefined, { signal }).catch(
          () => undefined,
        )
      }
    }
    try {
      await this.lookAtNews() // what has come until now is finished
    } catch (error) {
      say(`Redis did not do its part in the end: ${reasonOf(error as Error)}`)
      return false
    }
    return this.nextScan > 0 && this.failures === 0
  }

  private async round(): Promise<void> {
    if (this.options.news?.takeGap()) this.nextScan = 0
    if (performance.now() >= this.nextScan) await this.scan()
    await this.lookAtNewsInTime()
    if (performance.now() < this.nextSilent) return
    await this.rescue.endSilent()
    this.nextSilent = performance.now() + SILENT_MS
  }

  private async scan(): Promise<void> {
    const began = performance.now()
    const { rescue } = this
    rescue.beginScan()
    for await (const keys of rescue.source.scan()) {
      await rescue.look(keys)
      await this.lookAtNewsInTime()
      if (this.options.signal.aborted) return
    }
    await rescue.look(rescue.unmet())
    if (!this.hasEndedMissed) {
      for await (const _ of rescue.endMissed()) {
        await this.lookAtNewsInTime()
        if (this.options.signal.aborted) return
      }
      this.hasEndedMissed = true
    }
    this.nextScan = began + this.options.scanMs
  }

  private async lookAtNewsInTime(): Promise<void> {
    if (performance.now() < this.nextNews) return
    this.nextNews = performance.now() + NEWS_MS
    await this.lookAtNews()
  }

  private async lookAtNews(): Promise<void> {
    const { news } = this.options
    if (!news?.hasSome) return
    // That a key is gone may be known from a scan already: then it is no session that was missed.
    const keys = news.take().filter(({ source, isRemoval }) => !isRemoval || this.rescue.knows(source.key))
    await this.rescue.look(keys.map(({ source }) => source))
  }
}
