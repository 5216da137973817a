/**
 * A worker takes calls through the pipeline, batch after batch: lease → read → decode → copy, finalize, COMMIT → settle.
 *
 * A sink runs a few of them at once. While one waits for PostgreSQL, another reads and decodes: that is all the reading
 * ahead there is. A call is leased to one worker at a time, so its entries are committed in order.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Logger } from '../shared/log.js'
import type { SinkMetrics } from '../shared/metrics.js'
import { type Pool, sqlState } from '../shared/postgres.js'
import type { RedisClient } from '../shared/redis.js'
import { type Batch, decodeCall, emptyBatch } from './decode.js'
import type { Lease, LeaseLimits, Leases } from './lease.js'
import { readEntries } from './read.js'
import type { Wake } from './wake.js'
import { writeBatch } from './write.js'

const MAX_PAUSE_MS = 5000

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

/** For readiness: what, if anything, keeps the sink from its work. */
export class Progress {
  failingSince: number | undefined
  error = ''

  failed(error: Error): void {
    this.failingSince ??= Date.now()
    this.error = error.message
  }

  succeeded(): void {
    this.failingSince = undefined
  }
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
        await this.work()
        progress.succeeded()
        failures = 0
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

  /** One batch. */
  private async work(): Promise<void> {
    const { leases, wake, limits, redis } = this.context
    const { leases: taken, more } = await leases.lease(wake.take(), limits)
    wake.add(more)
    if (taken.length === 0) return
    let batch: Batch
    try {
      batch = emptyBatch()
      for (const { lease, entries } of await readEntries(redis, taken, limits)) decodeCall(lease, entries, batch)
      await this.write(batch)
    } catch (error) {
      await this.giveBack(taken)
      throw error
    }
    const { lapsed, again } = await leases.settle(batch.settlements)
    if (lapsed > 0) this.context.log.warn({ lapsed }, 'leases lapsed while their entries were being committed')
    wake.add(again)
  }

  private async write(batch: Batch): Promise<void> {
    if (batch.settlements.every((s) => s.last === undefined)) return
    const { pool, metrics } = this.context
    const started = performance.now()
    const written = await writeBatch(pool, batch)
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

  /** After a failure: nothing is committed, so whoever works next may take the calls at once. */
  private async giveBack(taken: Lease[]): Promise<void> {
    const { leases, log } = this.context
    const settlements = taken.map((lease) => ({ lease, last: undefined, count: 0, finalized: false }))
    await leases.settle(settlements).catch((error: Error) => {
      log.warn({ err: error.message }, 'leases could not be given back; they will lapse')
    })
  }
}
