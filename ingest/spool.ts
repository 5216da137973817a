/**
 * The spool: what Redis cannot take from producers that cannot be trusted to send it again, it keeps on disk, and gives it to
 * Redis in order once that is back, also after a restart. See spool-segment.ts for its files, spool-owner.ts for whose they are.
 *
 * What must hold:
 *  - what is reported as spooled is on the disk (fdatasync), and is deleted only when Redis has all of its segment;
 *  - while there is something in the spool that has not been handed to the appender, what comes goes behind it;
 *  - neither the disk nor the memory it takes grows beyond bounds.
 *
 * The way back to Redis is free as soon as everything has been handed over to the appender, which keeps the order from there.
 * Writers and replay would never meet under steady traffic: while the last segment is read, the next one is being written. So
 * in the end the replay holds new writes back for a moment (`held`), hands over what the last one wrote, and lets those that
 * wait pass the disk by. When Redis turns slow meanwhile, it lets them write instead.
 */
import { basename, resolve } from 'node:path'
import { setImmediate as endOfTurn, setTimeout as sleep } from 'node:timers/promises'
import { OperatorError } from '../shared/config.js'
import { crashPoint } from '../shared/crash.js'
import type { Logger } from '../shared/log.js'
import type { IngestMetrics } from '../shared/metrics.js'
import type { Sender } from './append.js'
import { OwnershipLost, SpoolOwner } from './spool-owner.js'
import { ReplayWindow, SegmentReplay } from './spool-replay.js'
import { createDirectory, encodeRecords, listSegments, type Segment, segmentPlace } from './spool-segment.js'
import { SpoolWriter } from './spool-writer.js'

const SEGMENT_BYTES = 8 * 1024 * 1024
const GROUP_BYTES = 4 * 1024 * 1024
/** What may wait in memory for a disk that is slow. */
const MAX_PENDING_BYTES = 64 * 1024 * 1024
/** After an error the disk is left alone for so long. */
const FAILURE_PAUSE_MS = 1000
const WINDOW_POLL_MS = 2
const AWAY_POLL_MS = 50
/** So many events are handed over in one turn of the event loop: live ones get theirs in between. */
const YIELD_EVERY = 256

/** A request whose events are to be spooled. Each `put` of it is answered by one of the last three. */
export interface SpoolEntry {
  /** As many as it takes on the disk, or a few more. */
  readonly bytes: number
  /** The JSON of each event that Redis does not have, in order; asked right before it is written. */
  payloads(): string[]
  /** They are on the disk. */
  spooled(): void
  /** They are not, but nothing is before them any more: they can go to the appender, at once. */
  passed(): void
  failed(reason: string): void
}

export interface SpoolOptions {
  directory: string
  maxBytes: number
  segmentBytes?: number
}

export class Spool {
  /** All that are on the disk and hold what Redis does not have yet. */
  private readonly segments = new Set<Segment>()
  /** Those that have not been handed over, oldest first; the last one may be the one that is being written. */
  private readonly unread: Segment[] = []
  private readonly window = new ReplayWindow()
  private readonly finishing = new Set<Promise<void>>()
  private readonly waiting: SpoolEntry[] = []
  /** Of those that wait and those that are being written. */
  private pendingBytes = 0
  private writing: Promise<void> | undefined
  private held = false
  private replaying: Promise<void> | undefined
  private asked = 0
  private pausedUntil = 0
  private isReplayStopped = false
  /** Why nothing can be spooled any more. */
  private ended: string | undefined

  private constructor(
    private readonly options: SpoolOptions,
    private readonly owner: SpoolOwner,
    private readonly writer: SpoolWriter,
    private readonly sender: Sender,
    private readonly metrics: IngestMetrics,
    private readonly log: Logger,
  ) {}

  /**
   * Takes the directory over from whoever used it, and begins to replay what is in it.
   *
   * @throws OperatorError when it cannot be created or written
   */
  static async open(options: SpoolOptions, sender: Sender, metrics: IngestMetrics, log: Logger): Promise<Spool> {
    const directory = resolve(options.directory)
    try {
      await createDirectory(directory)
      const owner = await SpoolOwner.claim(directory)
      const found = await listSegments(directory)
      const place = (segmentPlace(basename(found.at(-1)?.path ?? '')) ?? 0) + 1
      const writer = new SpoolWriter(directory, owner.id.slice(0, 8), place, options.segmentBytes ?? SEGMENT_BYTES)
      const spool = new Spool({ ...options, directory }, owner, writer, sender, metrics, log)
      owner.use()
      for (const segment of found) spool.add(segment)
      if (found.length > 0) {
        log.warn({ segments: found.length, bytes: spool.bytes }, 'the spool holds events of an earlier process')
        spool.startReplay()
      }
      return spool
    } catch (error) {
      throw new OperatorError(`SPOOL_DIR: ${directory} cannot be used: ${(error as Error).message}`, { cause: error })
    }
  }

  /** What comes has to go behind what is in it. */
  get isBehind(): boolean {
    if (this.ended !== undefined) return false
    const isEmpty = this.unread.length + this.waiting.length === 0 && this.writing === undefined
    return this.replaying !== undefined || (this.isReplayStopped && !isEmpty)
  }

  /** Nothing can be spooled any more. */
  get hasEnded(): boolean {
    return this.ended !== undefined
  }

  get bytes(): number {
    let bytes = 0
    for (const segment of this.segments) bytes += segment.bytes
    return bytes
  }

  put(entry: SpoolEntry): void {
    const refusal = this.refusalOf(entry)
    if (refusal !== undefined) {
      entry.failed(refusal)
      return
    }
    this.waiting.push(entry)
    this.pendingBytes += entry.bytes
    this.startReplay()
    this.startWriting()
  }

  observe(): void {
    let events = 0
    for (const segment of this.segments) events += segment.events
    this.metrics.spoolEvents.set(events)
    this.metrics.spoolBytes.set(this.bytes)
  }

  /** What is in it stays there for the next start; what comes is still taken. */
  stopReplay(): void {
    this.isReplayStopped = true
  }

  /** Writes what waits; takes nothing any more. */
  async close(): Promise<void> {
    this.stopReplay()
    await this.replaying
    await this.writing
    this.ended ??= 'the process is stopping'
    await Promise.all(this.finishing)
    await this.writer.seal()
    await this.owner.leave().catch(() => undefined) // another's by now, or its disk is gone: then nobody says that it is used
  }

  private refusalOf(entry: SpoolEntry): string | undefined {
    if (this.ended !== undefined) return this.ended
    if (Date.now() < this.pausedUntil) return 'the spool cannot be written'
    const isFull = this.bytes + this.pendingBytes + entry.bytes > this.options.maxBytes
    if (!isFull && this.pendingBytes <= MAX_PENDING_BYTES) return undefined
    this.metrics.spoolFailures.inc({ reason: 'full' })
    return 'the spool is full'
  }

  private startWriting(): void {
    if (!this.held && this.waiting.length > 0) this.writing ??= this.writeAll()
  }

  private async writeAll(): Promise<void> {
    await endOfTurn() // whatever else comes in this turn of the event loop is written together
    while (this.waiting.length > 0 && !this.held) {
      const group = this.takeGroup()
      const groupBytes = group.reduce((sum, entry) => sum + entry.bytes, 0)
      try {
        await this.write(group)
        for (const entry of group) entry.spooled()
      } catch (error) {
        this.pausedUntil = Date.now() + FAILURE_PAUSE_MS
        this.failed(error as Error, 'the spool cannot be written')
        for (const entry of [...group, ...this.takeWaiting()]) entry.failed('the spool cannot be written')
      }
      this.pendingBytes -= groupBytes
    }
    this.writing = undefined
  }

  private takeGroup(): SpoolEntry[] {
    let bytes = 0
    let count = 0
    while (count < this.waiting.length && bytes < GROUP_BYTES) bytes += this.waiting[count++]!.bytes
    return this.waiting.splice(0, count)
  }

  private takeWaiting(): SpoolEntry[] {
    for (const entry of this.waiting) this.pendingBytes -= entry.bytes
    return this.waiting.splice(0)
  }

  private async write(group: SpoolEntry[]): Promise<void> {
    const payloads = group.map((entry) => entry.payloads())
    const events = payloads.reduce((sum, each) => sum + each.length, 0)
    if (events === 0) return // Redis has taken them meanwhile
    const records = function* () {
      for (const each of payloads) yield* encodeRecords(each)
    }
    crashPoint('before-spool')
    const segment = await this.writer.write(records(), events)
    if (!this.segments.has(segment)) this.add(segment)
    await this.owner.verify()
    crashPoint('after-spool')
    this.metrics.spooled.inc(events)
  }

  private add(segment: Segment): void {
    this.segments.add(segment)
    this.unread.push(segment)
  }

  private startReplay(): void {
    if (this.isReplayStopped || this.replaying) return
    this.log.warn('events for Redis go through the spool')
    this.replaying = this.replayAll()
  }

  private async replayAll(): Promise<void> {
    while (await this.room()) {
      const segment = this.unread[0]
      if (segment) {
        if (!(await this.handOver(segment))) break
        this.unread.shift()
      } else if (this.held) {
        break // nothing is on the disk, and nothing on its way there
      } else {
        await this.hold()
      }
    }
    this.replaying = undefined
    const passing = this.held && this.unread.length === 0 ? this.takeWaiting() : []
    this.release()
    for (const entry of passing) entry.passed()
    if (this.unread.length === 0 && this.ended === undefined)
      this.log.info('all that was in the spool is with Redis or on its way there')
  }

  /** Resolves once the appender can take an event of the spool; with false when none is to be handed over any more. */
  private readonly room = async (): Promise<boolean> => {
    if (++this.asked % YIELD_EVERY === 0) await endOfTurn()
    while (!this.isReplayStopped && this.ended === undefined) {
      const away = this.sender.isAway
      if (!away && this.window.isOpen) return true
      this.release() // whoever is held back must not wait for Redis
      await sleep(away ? AWAY_POLL_MS : WINDOW_POLL_MS)
    }
    return false
  }

  /** No write begins from now on, and none is going on any more. */
  private async hold(): Promise<void> {
    this.held = true
    await this.writing
  }

  private release(): void {
    this.held = false
    this.startWriting()
  }

  /** @returns false when it stopped before the segment's end */
  private async handOver(segment: Segment): Promise<boolean> {
    try {
      if (this.writer.isWriting(segment)) await this.seal()
      await this.owner.verify()
      crashPoint('before-replay')
      const replay = new SegmentReplay(segment, this.sender, this.window, this.metrics)
      if (!(await replay.handOver(this.room))) return false
      void replay.stored.then(() => {
        const finished = this.finish(segment, replay).finally(() => this.finishing.delete(finished))
        this.finishing.add(finished)
      })
    } catch (error) {
      // Its file stays for the next start. Those behind it go on: an order that cannot be kept must not keep all from Redis.
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') this.segments.delete(segment)
      this.failed(error as Error, `a segment of the spool cannot be replayed: ${segment.path}`)
    }
    return true
  }

  private async seal(): Promise<void> {
    const wasHeld = this.held
    await this.hold()
    await this.writer.seal()
    if (!wasHeld) this.release()
  }

  /** Redis has all events of the segment, but those it refused for good. */
  private async finish(segment: Segment, replay: SegmentReplay): Promise<void> {
    crashPoint('after-replay')
    try {
      await replay.retire(this.options.directory, this.log)
      this.segments.delete(segment)
    } catch (error) {
      this.failed(error as Error, `a segment of the spool will be replayed again: ${segment.path}`)
    }
  }

  private failed(error: Error, what: string): void {
    const isLost = error instanceof OwnershipLost
    this.metrics.spoolFailures.inc({ reason: isLost ? 'owner' : 'disk' })
    this.log.error({ err: error }, what)
    if (!isLost || this.ended !== undefined) return
    this.ended = error.message
    this.segments.clear() // the other one replays them
    this.unread.length = 0
    for (const entry of this.takeWaiting()) entry.failed(error.message)
  }
}
