/**
 * A worker takes calls through the pipeline, batch after batch: lease → read → decode → copy, finalize, COMMIT → settle.
 *
 * A sink runs a few of them at once. While one waits for PostgreSQL, another reads and decodes: that is all the reading
 * ahead there is. A call is leased to one worker at a time, so its entries are committed in order.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { backoffMs } from '../shared/backoff.js'
import { crashPoint } from '../shared/crash.js'
import type { Logger } from '../shared/log.js'
import type { Gate } from './gate.js'
import { Hold } from './hold.js'
import type { Lease, Leases } from './lease.js'
import { givenBack, type Settlement } from './settle.js'
import { NotStored, Store, type StoreContext } from './store.js'
import { hintOn } from './verdict.js'
import type { Wake } from './wake.js'

const FIRST_PAUSE_MS = 100
const MAX_PAUSE_MS = 2000
/** After so many openings of the gate in a row that helped nothing, it may be a call's own fault after all. */
const MOST_VAIN_OPENINGS = 5

export interface WorkerContext extends StoreContext {
  leases: Leases
  wake: Wake
  gate: Gate
  log: Logger
  /** Only one worker tries a suspect at a time: the others go on with the rest. */
  suspects: { isTried: boolean }
}

export class Worker {
  private stopping = false
  private failures = 0
  private hold: Hold | undefined
  private readonly store: Store

  constructor(private readonly context: WorkerContext) {
    this.store = new Store(context)
  }

  /** Finishes the batch in hand; `run` then returns. The caller rings the bell, for the worker may be asleep. */
  stop(): void {
    this.stopping = true
  }

  /** Gives back what a batch holds that does not come to its end: then another sink need not wait, nor suspect it. */
  async giveUp(): Promise<void> {
    await this.hold?.end()
  }

  async run(): Promise<void> {
    const { wake, gate, log, metrics, progress } = this.context
    while (!this.stopping) {
      await wake.wait()
      await gate.pass()
      if (this.stopping) break
      try {
        await this.work()
      } catch (error) {
        progress.failed('Redis', error as Error)
        metrics.retries.inc({ class: 'redis' })
        log.warn({ err: error, failures: this.failures + 1 }, 'no batch could be taken from Redis, will retry')
        await this.pause()
      }
    }
  }

  /** One batch. @throws Redis' errors; what PostgreSQL could not take is given back */
  private async work(): Promise<void> {
    const { leases, wake, limits, log, suspects } = this.context
    const mayTake = !suspects.isTried
    suspects.isTried = true // until it is known whether there is one
    const isSuspect = (lease: Lease) => lease.lapses >= limits.suspectLapses
    let taken: Lease[] = []
    try {
      taken = await this.lease(mayTake)
    } finally {
      if (mayTake) suspects.isTried = taken.some(isSuspect)
    }
    if (taken.length === 0) return
    const hold = new Hold(leases, taken, limits.leaseMs, log)
    this.hold = hold
    try {
      // What came to nothing again and again goes last and alone: it may take its sink with it once more.
      const alone = taken.filter(isSuspect).map((lease) => [lease])
      for (const batch of [taken.filter((lease) => !isSuspect(lease)), ...alone]) {
        if (batch.length > 0 && !(await this.storeAndSettle(hold, batch))) break
      }
    } finally {
      await hold.end()
      if (taken.some(isSuspect)) {
        suspects.isTried = false
        wake.all() // there may be more of them
      }
    }
  }

  private async lease(mayTakeSuspect: boolean): Promise<Lease[]> {
    const { leases, wake, gate, limits, log, metrics, progress } = this.context
    crashPoint('before-lease')
    // When nothing could be stored for so long, one call shows as well as 500 whether that has changed.
    const calls = gate.vainOpenings >= MOST_VAIN_OPENINGS ? 1 : limits.calls
    const started = performance.now()
    const { leases: taken, more, gone } = await leases.lease(wake.take(), { ...limits, calls }, mayTakeSuspect)
    crashPoint('after-lease')
    if (taken.length > 0) metrics.leaseSeconds.observe((performance.now() - started) / 1000)
    wake.hint(more)
    metrics.stolen.inc(taken.filter(({ partition }) => !wake.owns(partition.partition)).length)
    if (taken.length === 0) progress.succeeded('Redis') // else it has yet to give what was leased, and to settle it
    metrics.lostStreams.inc(gone.length)
    for (const callSid of gone) {
      log.error({ callSid }, 'LOST: the stream is gone, and with it entries that were not committed')
    }
    return taken
  }

  /** @returns false when it came to nothing, and nothing else should be tried now */
  private async storeAndSettle(hold: Hold, batch: Lease[]): Promise<boolean> {
    const { gate, progress, metrics } = this.context
    const done = progress.began()
    metrics.batchesInHand.inc()
    try {
      hold.tries(batch)
      const settlements = await this.store.store(batch, hold)
      gate.succeeded()
      progress.succeeded('batch')
      this.failures = 0
      crashPoint('before-settle')
      await this.settle(hold, settlements)
      crashPoint('after-settle')
      return true
    } catch (error) {
      if (!(error instanceof NotStored)) throw error
      await this.failed(hold, batch, error)
      return false
    } finally {
      metrics.batchesInHand.dec()
      done()
    }
  }

  private async settle(hold: Hold, settlements: Settlement[]): Promise<void> {
    const { wake, metrics, log, progress } = this.context
    const started = performance.now()
    const { lapsed, again, lost, failure } = await hold.settle(settlements)
    if (!failure) progress.succeeded('Redis')
    metrics.settleSeconds.observe((performance.now() - started) / 1000)
    wake.news(again)
    if (lapsed > 0) log.warn({ lapsed }, 'leases lapsed while their entries were being committed')
    for (const { callSid, entries } of lost) {
      metrics.lostEntries.inc(entries)
      log.error({ callSid, entries }, 'LOST: entries were removed from the stream before they were committed')
    }
    if (failure) throw failure
  }

  private async failed(hold: Hold, batch: Lease[], { verdict, cause }: NotStored): Promise<void> {
    const { gate, limits, metrics, log, progress } = this.context
    metrics.retries.inc({ class: verdict })
    const isSuspect = batch.length === 1 && batch[0]!.lapses >= limits.suspectLapses
    // By itself, and while others were stored: then PostgreSQL is not away, whatever the error says.
    const isItsOwn = verdict === 'unclear' || (isSuspect && progress.storedSinceFailure)
    progress.storedSinceFailure = false
    if (!isItsOwn) gate.close(cause, hintOn(cause))
    if (!isItsOwn && gate.vainOpenings < MOST_VAIN_OPENINGS) return
    progress.failed('batch', cause)
    const failure = { err: cause, calls: batch.length }
    log.warn(failure, 'batch failed for an unclear reason: its calls will be tried by themselves')
    const lapsed = batch.map((lease) => ({ ...givenBack(lease), lapsed: true }))
    await this.settle(hold, lapsed)
    await this.pause()
  }

  private async pause(): Promise<void> {
    await sleep(backoffMs(++this.failures, FIRST_PAUSE_MS, MAX_PAUSE_MS))
    this.context.wake.all()
  }
}
