/** Hands the events of a segment to the appender, and keeps watch until Redis has them all. */
import { open, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { parseEvent, Refusal } from '../shared/events.js'
import type { Logger } from '../shared/log.js'
import type { IngestMetrics } from '../shared/metrics.js'
import { syncDirectory } from '../shared/sync-directory.js'
import type { Origin, Sender } from './append.js'
import { FILE_MODE, readRecords, type Segment } from './spool-segment.js'

const REFUSED_FILE = 'refused.ndjson'

/** How much of the spool is in the appender's queue at a time: a few batches, so that live events have room beside it. */
const WINDOW_EVENTS = 4096
const WINDOW_BYTES = 4 * 1024 * 1024

/** The events of all segments that are with the appender. */
export class ReplayWindow {
  private events = 0
  private bytes = 0

  get isOpen(): boolean {
    return this.events < WINDOW_EVENTS && this.bytes < WINDOW_BYTES
  }

  enter(bytes: number): void {
    this.events++
    this.bytes += bytes
  }

  leave(bytes: number): void {
    this.events--
    this.bytes -= bytes
  }
}

export class SegmentReplay implements Origin {
  readonly stored: Promise<void>
  private left = 1 // `handOver` takes it away when it has come to the end
  private position = 0
  private readonly payloads = new Map<number, string>()
  /** A line of JSON for each event that can never be stored. */
  private readonly refused: string[] = []
  /** Lines that are no records. */
  private damaged = 0
  private resolve = () => {}

  constructor(
    private readonly segment: Segment,
    private readonly sender: Sender,
    private readonly window: ReplayWindow,
    private readonly metrics: IngestMetrics,
  ) {
    this.stored = new Promise((resolve) => {
      this.resolve = resolve
    })
  }

  /**
   * @param room resolves once the next event may be handed over; with false when none may any more
   * @returns false when it stopped before the end: then `stored` never resolves
   * @throws the file system's errors
   */
  async handOver(room: () => Promise<boolean>): Promise<boolean> {
    const isCounted = this.segment.events > 0
    for await (const record of readRecords(this.segment.path)) {
      if (record === 'damaged') {
        this.damaged++
        this.metrics.spoolDamaged.inc()
        continue
      }
      if (!isCounted) this.segment.events += record.length
      for (const given of record) {
        if (!(await room())) return false
        this.append(given)
      }
    }
    this.done()
    return true
  }

  private append(given: unknown): void {
    const parsed = parseEvent(given, undefined, true) // it has been judged when it came
    if (parsed instanceof Refusal) {
      this.metrics.refused.inc({ code: parsed.code })
      this.refuse(JSON.stringify(given), parsed)
      return
    }
    const payload = JSON.stringify(parsed.event)
    const position = this.position++
    this.payloads.set(position, payload)
    this.left++
    this.window.enter(payload.length)
    this.sender.append(parsed.event, payload, this, position)
  }

  settle(position: number, refusal?: Refusal): void {
    const payload = this.payloads.get(position)!
    this.payloads.delete(position)
    this.window.leave(payload.length)
    if (refusal) this.refuse(payload, refusal)
    else this.metrics.spoolReplayed.inc()
    this.done()
  }

  settled(): void {}

  private refuse(payload: string, { code, message }: Refusal): void {
    this.refused.push(
      `${JSON.stringify({ at: new Date().toISOString(), code, message }).slice(0, -1)},"event":${payload}}\n`,
    )
  }

  private done(): void {
    if (--this.left === 0) this.resolve()
  }

  /**
   * Once all is stored but what Redis refused for good: keeps that in a file for an operator to look at, the segment's own file
   * too if it is damaged; else that one goes.
   *
   * @throws the file system's errors; then the next start finds the segment, and replays it again
   */
  async retire(directory: string, log: Logger): Promise<void> {
    const { path } = this.segment
    if (this.refused.length > 0) {
      await this.keepRefused(join(directory, REFUSED_FILE))
      log.error({ events: this.refused.length, file: REFUSED_FILE }, 'events of the spool cannot be stored')
    }
    if (this.damaged > 0) {
      const file = `${path}.damaged`
      await rename(path, file)
      const damage = { records: this.damaged, file }
      log.error(damage, 'records of the spool are damaged and lost: something changed them on the disk')
    } else {
      await rm(path, { force: true })
    }
    await syncDirectory(directory)
  }

  private async keepRefused(path: string): Promise<void> {
    const file = await open(path, 'a', FILE_MODE)
    try {
      await file.writeFile(this.refused.join(''))
      await file.datasync()
    } finally {
      await file.close()
    }
  }
}
