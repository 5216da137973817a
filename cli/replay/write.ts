/**
 * replay's way into PostgreSQL: the sink's own decode and writeBatch, over many calls at a time, two batches in flight. Calls of
 * which there are no turns yet are kept apart from the others: their turns are COPYed straight into the table.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { OperatorError } from '../../shared/config.js'
import { streamKey } from '../../shared/keys.js'
import { reasonOf } from '../../shared/log.js'
import type { Pool } from '../../shared/postgres.js'
import type { RedisClient } from '../../shared/redis.js'
import { EncodedTurns } from '../../sink/copy.js'
import {
  type Batch,
  type CallRow,
  decodeCall,
  type Entry,
  emptyBatch,
  entryMs,
  quarantineRow,
  storable,
} from '../../sink/decode.js'
import type { Lease } from '../../sink/lease.js'
import type { Legacy } from '../../sink/legacy.js'
import { fieldToJson, keepBytes } from '../../sink/raw-fields.js'
import { verdictOn } from '../../sink/verdict.js'
import { writeBatch, writeSettings } from '../../sink/write.js'
import { leaseFromStart } from '../entries.js'
import { pair, readQuarantine } from '../verify/rows.js'
import type { Pace } from './pace.js'
import type { ReplayReport } from './report.js'
import type { Piece } from './source.js'

/** As the sinks' batches by default. */
const BATCH_ENTRIES = 5000
const BATCH_BYTES = 8 * 1024 * 1024
const IN_FLIGHT = 2
/** For the rows of one batch. */
export const WRITE_TIMEOUT_MS = 60_000
/** PostgreSQL's settings for connections that a replay writes with. */
export const WRITE_SETTINGS = writeSettings(WRITE_TIMEOUT_MS, WRITE_TIMEOUT_MS)
export const WRITE_CONNECTIONS = IN_FLIGHT + 1
/** A deadlock, a server that is just starting: so often, with a pause. */
const TRIES = 5
const PAUSE_MS = 500

export interface WriterContext {
  pool: Pool
  /** Of DATABASE_SCHEMA, whose quarantine counts. */
  main: Pool
  /** For what is not UTF-8; undefined where it comes with the pieces. */
  redis: RedisClient | undefined
  legacy: Legacy | undefined
  pace: Pace
  report: ReplayReport
}

/** Streams that were there when they were read, and are not any more. */
class Gone extends Error {
  constructor(readonly callSids: Set<string>) {
    super(`${callSids.size} calls are gone from Redis`)
  }
}

class Filling {
  pieces: Piece[] = []
  entries = 0
  bytes = 0

  add(piece: Piece): void {
    this.pieces.push(piece)
    this.entries += piece.entries.length
    for (const [, fields] of piece.entries) for (const field of fields) this.bytes += field.length
  }

  get isFull(): boolean {
    return this.entries >= BATCH_ENTRIES || this.bytes >= BATCH_BYTES
  }
}

/** The entries of a piece that are in quarantine, or were dropped from there, stay so: they are taken out. */
export async function withoutQuarantined(main: Pool, piece: Piece): Promise<Piece> {
  if (piece.stored.quarantined === 0) return piece
  const key = storable(streamKey(piece))
  const ids = piece.entries.map(([id]): [string, string] => [key, id])
  const kept = await readQuarantine(main, ids)
  return { ...piece, entries: piece.entries.filter(([id]) => !kept.has(pair(key, id))) }
}

export class ReplayWriter {
  private readonly inFlight = new Map<Promise<void>, Set<string>>()
  private fresh = new Filling()
  private mixed = new Filling()
  private failure: unknown

  constructor(private readonly context: WriterContext) {}

  /** @throws OperatorError when PostgreSQL cannot store; Redis' errors */
  async add(piece: Piece): Promise<void> {
    const filling = piece.stored.turns === 0 ? this.fresh : this.mixed
    filling.add(piece)
    if (!filling.isFull) return
    if (filling === this.fresh) this.fresh = new Filling()
    else this.mixed = new Filling()
    await this.begin(filling)
  }

  /** Stores what is left. */
  async finish(): Promise<void> {
    for (const filling of [this.fresh, this.mixed]) if (filling.pieces.length > 0) await this.begin(filling)
    ;[this.fresh, this.mixed] = [new Filling(), new Filling()]
    await this.inHand()
  }

  /** Until what was begun is stored. */
  async inHand(): Promise<void> {
    await Promise.all(this.inFlight.keys())
    if (this.failure) throw this.failure
  }

  private async begin({ pieces, entries }: Filling): Promise<void> {
    await this.context.pace.before(entries)
    const callSids = new Set(pieces.map((piece) => piece.callSid))
    // Of two entries with one key the first one is stored: so a call's entries are written in their order.
    const before = [...this.inFlight].filter(([, others]) => [...callSids].some((callSid) => others.has(callSid)))
    await Promise.all(before.map(([batch]) => batch))
    while (this.inFlight.size >= IN_FLIGHT) await Promise.race(this.inFlight.keys())
    if (this.failure) throw this.failure
    const batch = this.store(pieces)
      .catch((error: unknown) => {
        this.failure ??= error
      })
      .finally(() => this.inFlight.delete(batch))
    this.inFlight.set(batch, callSids)
  }

  private async store(pieces: Piece[]): Promise<void> {
    const { main, report } = this.context
    const meant = await Promise.all(pieces.map((piece) => withoutQuarantined(main, piece)))
    const count = (of: Piece[]) => of.reduce((sum, piece) => sum + piece.entries.length, 0)
    await this.storeTogether(meant)
    report.leftInQuarantine += count(pieces) - count(meant)
    report.entries += count(pieces)
  }

  /** @throws Gone when a call has been erased while its entries were on their way: they must not come back */
  private async requireStreams(pieces: Piece[]): Promise<void> {
    const { redis } = this.context
    const places = new Map(pieces.map((piece) => [piece.callSid, piece]))
    const found = await Promise.all(
      [...places].map(async ([callSid, piece]) => ((await redis!.exists(streamKey(piece))) === 1 ? [] : [callSid])),
    ).catch((error: Error) => {
      const reason = reasonOf(error)
      throw new OperatorError(`Redis cannot be asked: ${reason}. Run it again: it goes on where it was`, {
        cause: error,
      })
    })
    const gone = found.flat()
    if (gone.length > 0) throw new Gone(new Set(gone))
  }

  private async storeTheOthers(pieces: Piece[], { callSids }: Gone): Promise<void> {
    const { report } = this.context
    for (const { callSid, entries } of pieces) if (callSids.has(callSid)) report.goneEntries += entries.length
    for (const callSid of callSids) report.goneCalls.add(callSid)
    const others = pieces.filter((piece) => !callSids.has(piece.callSid))
    if (others.length > 0) await this.storeTogether(others)
  }

  /** In one transaction if it can be; where that fails for the data, halves, down to the entry at fault: as the sinks do. */
  private async storeTogether(pieces: Piece[]): Promise<void> {
    try {
      await this.write(decodePieces(pieces), pieces)
    } catch (error) {
      if (error instanceof OperatorError) throw error
      if (error instanceof Gone) return await this.storeTheOthers(pieces, error)
      const verdict = verdictOn(error)
      const [only] = pieces
      const isOneEntry = pieces.length === 1 && only!.entries.length <= 1
      if (verdict === 'quarantine' && isOneEntry) {
        const [entry] = only!.entries
        // Without one, all that there is of it is in quarantine, and it is the call's row that cannot be stored: sinks do without it.
        if (entry) await this.quarantine(only!, entry, error as Error)
      } else if ((verdict === 'quarantine' || verdict === 'unclear') && !isOneEntry) {
        for (const half of halves(pieces)) await this.storeTogether(half)
      } else {
        const reason = reasonOf(error as Error)
        throw new OperatorError(`PostgreSQL cannot store: ${reason}. Run it again: it goes on where it was`, {
          cause: error,
        })
      }
    }
  }

  private async quarantine(piece: Piece, entry: Entry, error: Error): Promise<void> {
    const batch = emptyBatch(new EncodedTurns())
    batch.quarantine.push(quarantineRow(leaseOf(piece), entry, `not_storable: ${error.message}`))
    try {
      await this.write({ ...batch, calls: [rowOf(piece, null)] }, [piece]).catch((ofTheRow: unknown) => {
        if (verdictOn(ofTheRow) !== 'quarantine') throw ofTheRow
        return this.write(batch, [piece])
      })
    } catch (gone) {
      if (!(gone instanceof Gone)) throw gone
      await this.storeTheOthers([piece], gone)
    }
  }

  private async write(batch: Batch<EncodedTurns>, pieces: Piece[]): Promise<void> {
    const { pool, redis, legacy, report } = this.context
    batch.belated = true // of a table that was truncated while its calls went on, say
    if (redis) {
      batch.confirm = () => this.requireStreams(pieces)
      await keepBytes(redis, batch.quarantine)
    } else {
      bytesOfPieces(batch, pieces)
    }
    for (let nth = 1; ; nth++) {
      try {
        const written = await writeBatch(pool, batch, WRITE_TIMEOUT_MS, legacy)
        report.turns += written.turns
        report.events += written.events
        report.quarantined += written.quarantined
        return
      } catch (error) {
        if (error instanceof Gone || verdictOn(error) !== 'retry' || nth === TRIES) throw error
        await sleep(PAUSE_MS * nth)
      }
    }
  }
}

const leaseOf = ({ callSid, partition, after }: Piece): Lease => ({
  ...leaseFromStart(callSid, partition),
  cursor: after,
})

function rowOf({ callSid, first }: Piece, lastMs: number | null): CallRow {
  return { callSid, firstMs: entryMs(first), lastMs, finalize: false, begun: true }
}

/** All their rows, and the row of each call. */
function decodePieces(pieces: Piece[]): Batch<EncodedTurns> {
  const batch = emptyBatch(new EncodedTurns())
  for (const piece of pieces) {
    const { entries, isLast } = piece
    const before = batch.calls.length
    if (entries.length > 0) decodeCall(leaseOf(piece), entries, batch)
    const last = entries.at(-1)?.[0]
    // For turns alone a worker would leave a live call's row to the next batch; here there may be none. Nor is there one where
    // all that the call has is in quarantine.
    if (isLast && batch.calls.length === before)
      batch.calls.push(rowOf(piece, last === undefined ? null : entryMs(last)))
  }
  batch.calls = oneRowEach(batch.calls)
  batch.redelivered = pieces.some((piece) => piece.stored.turns > 0)
  return batch
}

/** A call may have several pieces in a batch. Sinks may be writing its row at the same time: hence `begun`. */
function oneRowEach(rows: CallRow[]): CallRow[] {
  const merged = new Map<string, CallRow>()
  for (const row of rows) {
    const other = merged.get(row.callSid)
    const firstMs = Math.min(row.firstMs, other?.firstMs ?? row.firstMs)
    const times = [row.lastMs, other?.lastMs ?? null].filter((ms) => ms !== null)
    const lastMs = times.length > 0 ? Math.max(...times) : null
    merged.set(row.callSid, {
      ...row,
      firstMs,
      lastMs,
      finalize: row.finalize || (other?.finalize ?? false),
      begun: true,
    })
  }
  return [...merged.values()]
}

function halves(pieces: Piece[]): [Piece[], Piece[]] {
  const middle = pieces.length >> 1
  if (middle > 0) return [pieces.slice(0, middle), pieces.slice(middle)]
  const [piece] = pieces
  const { entries } = piece!
  const at = entries.length >> 1
  const first = { ...piece!, entries: entries.slice(0, at), isLast: false }
  return [[first], [{ ...piece!, entries: entries.slice(at), after: entries[at - 1]![0] }]]
}

function bytesOfPieces({ quarantine }: Batch, pieces: Piece[]): void {
  const odd = pieces.filter((piece) => piece.bytes)
  for (const row of quarantine) {
    const fields = odd.find((piece) => streamKey(piece) === row.streamKey && piece.bytes?.has(row.entryId))
    const its = fields?.bytes?.get(row.entryId)
    if (its) row.raw = JSON.stringify(its.map(fieldToJson))
  }
}
