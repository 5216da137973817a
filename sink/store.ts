/**
 * read → decode → copy → finalize → COMMIT for what a worker has leased. What cannot be stored is found and put into
 * quarantine here, so that it never stops its neighbours.
 */
import { crashPoint } from '../shared/crash.js'
import type { SinkMetrics } from '../shared/metrics.js'
import type { Pool } from '../shared/postgres.js'
import type { RedisClient } from '../shared/redis.js'
import { EncodedTurns } from './copy.js'
import { type Batch, decodeCall, type Entry, emptyBatch, entryMs, quarantineRow } from './decode.js'
import type { Hold } from './hold.js'
import type { Lease, LeaseLimits } from './lease.js'
import type { Legacy } from './legacy.js'
import type { Progress } from './progress.js'
import { keepBytes } from './raw-fields.js'
import { readEntries } from './read.js'
import { givenBack, type Settlement } from './settle.js'
import { LegacyFailure, type Verdict, verdictOn } from './verdict.js'
import { isStored, type Written, writeBatch } from './write.js'

/** Entries that are tried one by one are read a few at a time: their sheer size may be what their sinks die of. */
const ALONE_ENTRIES = 50
/** So many times as often as for an unclear reason an entry may fail for one that seems to be PostgreSQL's. */
const PATIENCE = 4

/** A batch that is not stored, and what that means. */
export class NotStored extends Error {
  readonly verdict: Verdict

  constructor(override readonly cause: Error) {
    super(cause.message)
    this.verdict = verdictOn(cause)
  }
}

export interface StoreContext {
  redis: RedisClient
  pool: Pool
  limits: LeaseLimits
  /** A call that came to nothing so often is tried entry by entry. */
  maxDeliveries: number
  /** For one transaction, ms. */
  writeTimeoutMs: number
  progress: Progress
  metrics: SinkMetrics
  legacy: Legacy | undefined
}

export class Store {
  /** A suspect is being tried entry by entry: what is stored of it says nothing of others. */
  private isAlone = false

  constructor(private readonly context: StoreContext) {}

  /**
   * Stores what waits in these calls, in one transaction if it can be.
   *
   * What PostgreSQL refuses for its data it would refuse for ever, with all else in the batch. So halves are tried by
   * themselves, down to the entry at fault, which is quarantined. For that they are read again: it is rare.
   *
   * @throws NotStored; anything else is Redis' error
   */
  async store(leases: Lease[], hold: Hold): Promise<Settlement[]> {
    const [only] = leases
    if (only && leases.length === 1 && only.lapses >= this.context.maxDeliveries) {
      this.isAlone = true
      return [await this.storeOneByOne(only, hold).finally(() => (this.isAlone = false))]
    }
    const batch = emptyBatch(new EncodedTurns())
    try {
      const started = performance.now()
      await this.read(leases, (lease, entries) => decode(lease, entries, batch))
      this.context.metrics.readSeconds.observe((performance.now() - started) / 1000)
      await this.write(batch)
      return batch.settlements
    } catch (error) {
      if (!isForItsData(error)) throw error
      const middle = leases.length >> 1
      if (middle > 0) {
        const first = await this.store(leases.slice(0, middle), hold)
        return [...first, ...(await this.store(leases.slice(middle), hold))]
      }
      const entries = await this.entriesOf(only!, this.context.limits.entries)
      return [entries.length > 0 ? await this.storeHalves(only!, entries, error) : givenBack(only!)]
    }
  }

  private read(leases: Lease[], take: (lease: Lease, entries: Entry[]) => void): Promise<void> {
    return readEntries(this.context.redis, leases, this.context.limits, take)
  }

  private async entriesOf(lease: Lease, most: number): Promise<Entry[]> {
    let found: Entry[] = []
    await readEntries(this.context.redis, [lease], { ...this.context.limits, entries: most }, (_lease, entries) => {
      found = entries
    })
    return found
  }

  private async storeEntries(lease: Lease, entries: Entry[]): Promise<Settlement> {
    const batch = emptyBatch(new EncodedTurns())
    try {
      decode(lease, entries, batch)
      await this.write(batch)
      return batch.settlements[0]!
    } catch (error) {
      if (!isForItsData(error)) throw error
      return this.storeHalves(lease, entries, error)
    }
  }

  /** @param error why all of them together cannot be stored */
  private async storeHalves(lease: Lease, entries: Entry[], error: Error): Promise<Settlement> {
    const last = entries.at(-1)![0]
    if (entries.length === 1) return this.quarantine(lease, entries[0]!, `not_storable: ${error.message}`)
    const middle = entries.length >> 1
    const first = await this.storeEntries(lease, entries.slice(0, middle))
    const rest = { ...lease, cursor: first.last!, finalized: first.finalized }
    const second = await this.storeEntries(rest, entries.slice(middle))
    return { lease, last, count: entries.length, finalized: second.finalized, quarantined: true }
  }

  /**
   * Something in this call has killed or hung its sinks, or fails for an unclear reason. Entry by entry the cursor moves up
   * to it, and Redis knows which one is being tried. An entry that was being tried alone when it came to nothing once more
   * is not tried again.
   */
  private async storeOneByOne(lease: Lease, hold: Hold): Promise<Settlement> {
    let quarantined = false
    const entries = await this.entriesOf(lease, ALONE_ENTRIES)
    for (const entry of entries) {
      const [id] = entry
      if (!(await hold.isolate(lease, id))) return givenBack(lease)
      const stored = await this.storeAlone(lease, entry)
      quarantined ||= stored.quarantined ?? false
      lease.finalized = stored.finalized
      lease.cursor = id
      if (lease.read >= 0) lease.read++
    }
    const keepLapses = !quarantined && entries.length === ALONE_ENTRIES // what it came to nothing for lies further on
    return { lease, last: lease.cursor, count: 0, finalized: lease.finalized, quarantined, keepLapses }
  }

  private async storeAlone(lease: Lease, entry: Entry): Promise<Settlement> {
    // Its sink may have died after it was stored, too: then it is innocent.
    if (entry[0] === lease.alone && !(await this.isStored(lease, entry))) {
      const reason = `poison: ${lease.lapses} deliveries came to nothing, the last one of it alone`
      return this.quarantine(lease, entry, reason)
    }
    try {
      return await this.storeEntries(lease, [entry])
    } catch (error) {
      if (!(error instanceof NotStored && this.isAtFault(lease, entry, error))) throw error
      return this.quarantine(lease, entry, `fails: ${error.message}`)
    }
  }

  /**
   * If nothing else can be stored either, it is hardly this entry's fault: so others must have been stored between two
   * failures of this very entry, tried alone.
   */
  private isAtFault(lease: Lease, [id]: Entry, { verdict, cause }: NotStored): boolean {
    if (cause instanceof LegacyFailure) return false
    const { maxDeliveries, progress } = this.context
    const isOnceMore = progress.failedAloneBefore(lease.callSid, id) && progress.storedSinceFailure
    // A connection that was cut may have hit an innocent entry; not again and again.
    return isOnceMore && lease.lapses >= (verdict === 'unclear' ? maxDeliveries : maxDeliveries * PATIENCE)
  }

  private async isStored({ callSid }: Lease, [id]: Entry): Promise<boolean> {
    const { pool, writeTimeoutMs } = this.context
    return isStored(pool, callSid, id, writeTimeoutMs).catch((error: Error) => {
      throw new NotStored(error)
    })
  }

  private async quarantine(lease: Lease, entry: Entry, reason: string): Promise<Settlement> {
    const [id] = entry
    const settlement = { lease, last: id, count: 1, finalized: lease.finalized, quarantined: true }
    const quarantine = [quarantineRow(lease, entry, reason)]
    const batch = { ...emptyBatch(new EncodedTurns()), quarantine, settlements: [settlement], oldestMs: entryMs(id) }
    // It may be the call's first entry, and then nobody else makes its row; unless that is what cannot be stored.
    const row = { callSid: lease.callSid, firstMs: entryMs(id), lastMs: null, finalize: false }
    await this.write({ ...batch, calls: [row] }).catch((error: unknown) => {
      const isOfTheRow = error instanceof NotStored && (error.verdict === 'quarantine' || error.verdict === 'unclear')
      if (!isOfTheRow) throw error
      return this.write(batch)
    })
    return settlement
  }

  private async write(batch: Batch<EncodedTurns>): Promise<void> {
    if (batch.settlements.every((s) => s.last === undefined)) return
    const { pool, metrics, progress, writeTimeoutMs, legacy } = this.context
    await keepBytes(this.context.redis, batch.quarantine)
    const started = performance.now()
    const written = await writeBatch(pool, batch, writeTimeoutMs, legacy).catch((error: Error) => {
      throw new NotStored(error)
    })
    crashPoint('after-commit')
    if (!this.isAlone && batch.turns.length > 0 && batch.calls.length > 0) progress.storedSinceFailure = true
    metrics.writeSeconds.observe((performance.now() - started) / 1000)
    this.count(batch, written)
  }

  /** A batch that is committed. */
  private count(batch: Batch<EncodedTurns>, written: Written): void {
    const { metrics } = this.context
    const now = Date.now()
    metrics.lastCommit.set(now / 1000)
    let calls = 0
    for (const { lease, last, count } of batch.settlements) {
      if (last === undefined) continue
      calls++
      // A part of a call is younger than all that waited in it; and then it is alone in its batch.
      const oldestMs = Math.max(lease.oldestMs, batch.oldestMs)
      metrics.latencySeconds.observe(Math.max(0, now - oldestMs) / 1000)
      if (lease.lapses > 0) metrics.redelivered.inc(count)
    }
    metrics.batchCalls.observe(calls)
    metrics.batchRows.observe(batch.turns.length + batch.events.length)
    metrics.turns.inc(written.turns)
    metrics.duplicates.inc(batch.turns.length - written.turns)
    metrics.events.inc(written.events)
    metrics.quarantined.inc(written.quarantined)
    if (written.copySeconds !== undefined) metrics.copySeconds.observe(written.copySeconds)
    if (written.staged) metrics.staged.inc()
    if (!written.calls) return
    const { finalized, refinalized, finalizeSeconds } = written.calls
    metrics.finalizeSeconds.observe(finalizeSeconds)
    metrics.refinalized.inc(refinalized)
    for (const { outcome, incomplete, abandoned } of finalized) {
      metrics.finalized.inc({ outcome })
      if (incomplete) metrics.incomplete.inc()
      if (abandoned) metrics.abandoned.inc()
    }
  }
}

function isForItsData(error: unknown): error is NotStored {
  return error instanceof NotStored && error.verdict === 'quarantine'
}

function decode(lease: Lease, entries: Entry[], batch: Batch): void {
  try {
    decodeCall(lease, entries, batch)
  } catch (error) {
    throw new NotStored(error as Error)
  }
}
