/** How fast a replay may go: so many entries a second at most, and never at the cost of calls that are live. */
import { setTimeout as sleep } from 'node:timers/promises'

const LOOK_MS = 250
/** Of what arrives now: from there on the replay waits. */
const MOST_LAG_MS = 1000
/** The sinks catch up within that, or they do not run. */
const MOST_WAIT_MS = 10_000

export interface PaceOptions {
  /** Entries a second. */
  rate?: number | undefined
  /** Age of the oldest entry that is not in PostgreSQL, ms; undefined where there is no Redis to ask. */
  lagMs?: (() => Promise<number>) | undefined
  say: (line: string) => void
  /** Ends what is waited for. */
  signal: AbortSignal
}

export class Pace {
  private dueAt = performance.now()
  private nextLookAt = 0
  /** Nobody works on what arrives: it is not waited for until it has been worked on. */
  private isGivenUp = false
  isWaiting = false

  constructor(private readonly options: PaceOptions) {}

  /** Before so many entries are stored. @throws Redis' errors */
  async before(entries: number): Promise<void> {
    await this.giveWay()
    const { rate, signal } = this.options
    if (rate !== undefined) {
      await sleep(Math.max(0, this.dueAt - performance.now()), undefined, { signal }).catch(ignoreAbort)
      // The time in which it gave way is not made up for: so soon the sinks have other things to do.
      this.dueAt = Math.max(this.dueAt, performance.now()) + (entries / rate) * 1000
    }
  }

  private async giveWay(): Promise<void> {
    const { lagMs, signal, say } = this.options
    if (!lagMs || performance.now() < this.nextLookAt) return
    let best = Number.POSITIVE_INFINITY
    let bestAt = performance.now()
    try {
      while (!signal.aborted) {
        const lag = await lagMs()
        this.nextLookAt = performance.now() + LOOK_MS
        if (lag <= MOST_LAG_MS) this.isGivenUp = false
        if (lag <= MOST_LAG_MS || this.isGivenUp) return
        this.isWaiting = true
        if (lag < best) [best, bestAt] = [lag, performance.now()]
        if (performance.now() - bestAt > MOST_WAIT_MS) {
          this.isGivenUp = true
          say(
            `the oldest entry has waited ${Math.round(lag / 1000)} s and nothing happens: no sink seems to run; going on`,
          )
          return
        }
        await sleep(LOOK_MS, undefined, { signal }).catch(ignoreAbort)
      }
    } finally {
      this.isWaiting = false
    }
  }
}

function ignoreAbort(error: Error): void {
  if (error.name !== 'AbortError') throw error
}
