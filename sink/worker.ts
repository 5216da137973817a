/**
 * A worker takes calls through the pipeline, batch after batch: lease → read → decode → copy, finalize, COMMIT → settle.
 *
 * A sink runs a few of them at once. While one waits for PostgreSQL, another reads and decodes: that is all the reading
 * ahead there is. A call is leased to one worker at a time, so its entries are committed in order.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { crashPoint } from '../shared/crash.js'
import type { Logger } from '../shared/log.js'
import type { SinkMetrics } from '../shared/metrics.js'
import { type Pool, sqlState } from '../shared/postgres.js'
import type { RedisClient } from '../shared/redis.js'
import { EncodedTurns } from './copy.js'
import { type Batch, decodeCall, type Entry, emptyBatch, entryMs, quarantineRow } from './decode.js'
import type { Lease, LeaseLimits, Leases, Settlement } from './lease.js'
import { readEntries } from './read.js'
import type { Wake } from './wake.js'
import { writeBatch } from './write.js'

const MAX_PAUSE_MS = 2000

export interface WorkerContext {
  redis: RedisClient
  pool: Pool
  leases: Leases
  wake: Wake
  limits: LeaseLimits
  metrics: SinkMetrics
  log: Logger
  progress: Progress
}

/** For readiness: since when there has been work of which none got done, and why. */
export class Progress {
  private since: number | undefined
  private error = ''
  private inHand = 0

  began(): void {
    this.inHand++
    this.since ??= Date.now()
  }

  ended(): void {
    this.inHand--
  }

  failed(error: Error): void {
    this.since ??= Date.now()
    this.error = error.message
  }

  succeeded(): void {
    this.since = this.inHand > 0 ? Date.now() : undefined
    this.error = ''
  }

  /** A failure is not made up for yet, and nobody is trying. */
  get isInDoubt(): boolean {
    return this.since !== undefined && this.inHand === 0
  }

  /** Why nothing gets done; undefined unless that has been so for longer than `ms`. */
  stalled(ms: number): string | undefined {
    if (this.since === undefined || Date.now() - this.since <= ms) return undefined
    return `no progress: ${this.error || 'a batch is not done yet'}`
  }
}

/** SQLSTATE classes for what is wrong with the data: data exception, integrity constraint violation, program limit exceeded. */
const DATA_ERRORS = /^(22|23|54)/

function isDataError(error: unknown): error is Error {
  return DATA_ERRORS.test(sqlState(error) ?? '') || error instanceof RangeError // too long for a string, too
}

export class Worker {
  private stopping = false

  constructor(private readonly context: WorkerContext) {}

  /** Finishes the batch in hand; `run` then returns. The caller rings the bell, for the worker may be asleep. */
  stop(): void {
    this.stopping = true
  }

  async run(): Promise<void> {
    const { wake, log, metrics, progress } = this.context
    let failures = 0
    while (!this.stopping) {
      await wake.wait()
      if (this.stopping) break
      try {
        if (await this.work()) {
          progress.succeeded()
          failures = 0
        }
      } catch (error) {
        failures++
        metrics.retries.inc()
        progress.failed(error as Error)
        log.warn({ err: (error as Error).message, code: sqlState(error), failures }, 'batch failed, will retry')
        await sleep(Math.min(50 * 2 ** failures, MAX_PAUSE_MS) * (0.5 + Math.random() / 2))
        wake.all()
      }
    }
  }

  /** One batch. @returns whether that shows that the sink can do its work */
  private async work(): Promise<boolean> {
    const { leases, wake, limits, progress, log } = this.context
    crashPoint('before-lease')
    const { leases: taken, more } = await leases.lease(wake.take(), limits)
    wake.add(more)
    // Nothing to do shows nothing after a failure: the calls may be with others who fail, too.
    if (taken.length === 0) return progress.isInDoubt && (await leases.backlog()).lagMs === 0
    crashPoint('after-lease')
    progress.began()
    try {
      const settlements = await this.store(taken)
      crashPoint('before-settle')
      const { lapsed, again } = await leases.settle(settlements)
      crashPoint('after-settle')
      if (lapsed > 0) log.warn({ lapsed }, 'leases lapsed while their entries were being committed')
      wake.add(again)
      return true
    } catch (error) {
      await this.giveBack(taken)
      throw error
    } finally {
      progress.ended()
    }
  }

  /**
   * What PostgreSQL refuses for its data it would refuse for ever, with all else in the batch. So halves are tried by
   * themselves, down to the entry at fault, which is quarantined. For that they are read again: it is rare.
   */
  private async store(leases: Lease[]): Promise<Settlement[]> {
    const batch = emptyBatch(new EncodedTurns())
    try {
      await this.read(leases, (lease, entries) => decodeCall(lease, entries, batch))
      await this.write(batch)
      return batch.settlements
    } catch (error) {
      if (!isDataError(error)) throw error
      const middle = leases.length >> 1
      if (middle > 0) {
        return [...(await this.store(leases.slice(0, middle))), ...(await this.store(leases.slice(middle)))]
      }
      let alone: Entry[] = []
      await this.read(leases, (_lease, entries) => {
        alone = entries
      })
      return [await this.storeHalves(leases[0]!, alone, error)]
    }
  }

  private read(leases: Lease[], take: (lease: Lease, entries: Entry[]) => void): Promise<void> {
    return readEntries(this.context.redis, leases, this.context.limits, take)
  }

  private async storeEntries(lease: Lease, entries: Entry[]): Promise<Settlement> {
    const batch = emptyBatch(new EncodedTurns())
    try {
      decodeCall(lease, entries, batch)
      await this.write(batch)
      return batch.settlements[0]!
    } catch (error) {
      if (!isDataError(error)) throw error
      return this.storeHalves(lease, entries, error)
    }
  }

  /** @param error why all of them together cannot be stored */
  private async storeHalves(lease: Lease, entries: Entry[], error: Error): Promise<Settlement> {
    const last = entries.at(-1)![0]
    if (entries.length === 1) {
      const quarantine = [quarantineRow(lease, entries[0]!, `not_storable: ${error.message}`)]
      const settlement = { lease, last, count: 1, finalized: lease.finalized }
      const batch = emptyBatch(new EncodedTurns())
      await this.write({ ...batch, quarantine, settlements: [settlement], oldestMs: entryMs(last) })
      return settlement
    }
    const middle = entries.length >> 1
    const first = await this.storeEntries(lease, entries.slice(0, middle))
    const rest = { ...lease, cursor: first.last!, finalized: first.finalized }
    const second = await this.storeEntries(rest, entries.slice(middle))
    return { lease, last, count: entries.length, finalized: second.finalized }
  }

  private async write(batch: Batch<EncodedTurns>): Promise<void> {
    if (batch.settlements.every((s) => s.last === undefined)) return
    const { pool, metrics } = this.context
    const started = performance.now()
    const written = await writeBatch(pool, batch)
    crashPoint('after-commit')
    metrics.writeSeconds.observe((performance.now() - started) / 1000)
    metrics.latencySeconds.observe(Math.max(0, Date.now() - batch.oldestMs) / 1000)
    metrics.batchRows.observe(batch.turns.length + batch.events.length)
    metrics.turns.inc(written.turns)
    metrics.duplicates.inc(batch.turns.length - written.turns)
    metrics.events.inc(batch.events.length)
    metrics.quarantined.inc(batch.quarantine.length)
    metrics.finalized.inc(batch.calls.filter((call) => call.finalize).length)
    if (written.staged) metrics.staged.inc()
  }

  /** After a failure whoever works next may take the calls at once; what is committed of them all the same is found there. */
  private async giveBack(taken: Lease[]): Promise<void> {
    const { leases, log } = this.context
    const settlements = taken.map((lease) => ({ lease, last: undefined, count: 0, finalized: false }))
    await leases.settle(settlements).catch((error: Error) => {
      log.warn({ err: error.message }, 'leases could not be given back; they will lapse')
    })
  }
}
