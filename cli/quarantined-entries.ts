/**
 * The quarantine, as operators work on it: what is in it, trying it again once its cause is mended, giving it up.
 *
 * An entry that is tried again goes the sink's own way, decode and writeBatch, under the id it has in its stream: its rows
 * get the same keys, times and place in the call as if they had been stored at once. It leaves the quarantine in the
 * transaction that stores it.
 */
import { OperatorError } from '../shared/config.js'
import { compareIds, isEntryId } from '../shared/entry-ids.js'
import { type CallPlace, callSidInSql, parseStreamKey } from '../shared/keys.js'
import { reasonOf } from '../shared/log.js'
import type { Pool } from '../shared/postgres.js'
import { EncodedTurns } from '../sink/copy.js'
import { type Batch, decodeCall, type Entry, emptyBatch, entryMs, storable } from '../sink/decode.js'
import type { Lease } from '../sink/lease.js'
import type { Legacy } from '../sink/legacy.js'
import { fieldsFromJson } from '../sink/raw-fields.js'
import { verdictOn } from '../sink/verdict.js'
import { writeBatch, writeSettings } from '../sink/write.js'
import { type DecodedEntry, decodeAlone, leaseFromStart } from './entries.js'

/** A row of quarantined_events, without the data. */
export interface Listed {
  id: string
  streamKey: string
  entryId: string
  reason: string
  quarantinedAt: Date
  /** Given up then; null while it is not. */
  droppedAt: Date | null
}

export interface Quarantined extends Listed {
  /** The entry's fields as `readFields` understands them; empty once it is dropped. */
  raw: Buffer
}

/** Which of them: some by id, those of a call, or all. Dropped ones are never meant. */
export type Choice = { ids: string[] } | { callSid: string } | { all: true }

const LISTED = `id::text, stream_key AS "streamKey", entry_id AS "entryId", reason, quarantined_at AS "quarantinedAt",
  dropped_at AS "droppedAt"`
const COLUMNS = `${LISTED}, raw`
const PAGE = 500
/** For the rows of one call. */
export const WRITE_TIMEOUT_MS = 60_000
/** PostgreSQL's settings for connections that `retryQuarantined` uses. */
export const RETRY_SETTINGS = writeSettings(WRITE_TIMEOUT_MS, WRITE_TIMEOUT_MS)
const TURN_HOLDER = `SELECT stream_id AS "streamId" FROM call_transcript_turns WHERE call_sid = $1 AND turn_id = $2`
const EVENT_HOLDER = `SELECT stream_id AS "streamId" FROM call_events WHERE call_sid = $1 AND event_id = $2`
const UNREADABLE = 'unreadable_raw: what was kept of the entry is not a JSON array of its fields'

function condition(choice: Choice): { sql: string; value: unknown } {
  if ('ids' in choice) return { sql: 'id = ANY($1::bigint[])', value: choice.ids }
  // By the name in the key: whichever partition it was found in.
  if ('callSid' in choice) return { sql: `${callSidInSql('stream_key')} = $1`, value: storable(choice.callSid) }
  return { sql: '$1::text IS NULL', value: null }
}

/** @returns the newest of them, newest first, and how many there are in all */
export async function listQuarantine(
  pool: Pool,
  choice: Choice,
  limit: number,
): Promise<{ total: number; entries: Listed[] }> {
  const { sql, value } = condition(choice)
  const [counted, listed] = await Promise.all([
    pool.query<{ total: number }>(
      `SELECT count(*)::int AS total FROM quarantined_events WHERE dropped_at IS NULL AND ${sql}`,
      [value],
    ),
    pool.query<Listed>(
      `SELECT ${LISTED} FROM quarantined_events WHERE dropped_at IS NULL AND ${sql} ORDER BY quarantined_events.id DESC
       LIMIT $2`,
      [value, limit],
    ),
  ])
  return { total: counted.rows[0]!.total, entries: listed.rows }
}

/** @throws OperatorError that names the ids which are not there */
export async function findQuarantined(pool: Pool, ids: string[]): Promise<Quarantined[]> {
  const { rows } = await pool.query<Quarantined>(
    `SELECT ${COLUMNS} FROM quarantined_events WHERE id = ANY($1::bigint[]) ORDER BY quarantined_events.id`,
    [ids],
  )
  const unknown = ids.filter((id) => !rows.some((row) => row.id === id))
  if (unknown.length > 0) throw new OperatorError(`nothing in quarantine has the id ${unknown.join(', ')}`)
  return rows
}

/**
 * Gives entries up: their data goes; that they were there, and why, stays known.
 *
 * @returns how many; those that were dropped before do not count
 */
export async function dropQuarantined(pool: Pool, choice: Choice): Promise<number> {
  const { sql, value } = condition(choice)
  const { rowCount } = await pool.query(
    `UPDATE quarantined_events SET dropped_at = now(), raw = '' WHERE dropped_at IS NULL AND ${sql}`,
    [value],
  )
  return rowCount ?? 0
}

/** @returns the fields and values in turn; a Buffer for what is not UTF-8; undefined when `raw` is something else */
export function readFields(raw: Buffer): (string | Buffer)[] | undefined {
  let fields: unknown
  try {
    fields = JSON.parse(raw.toString())
  } catch {
    return undefined
  }
  return fieldsFromJson(fields)
}

/** What came of trying one entry again. */
export interface Retried {
  id: string
  /** Its stream's name in Redis, and its id there. */
  streamKey: string
  entryId: string
  /** Why it stays in quarantine; undefined when it is stored. */
  reason: string | undefined
}

/**
 * Tries entries again, each call's in their order in the stream. One that still cannot be stored stays, with its new reason,
 * and does not affect the others.
 *
 * @param legacy the table of LEGACY_CALL_SESSIONS, if there is one
 * @param tell called for each entry, and for each call that is finalized, before or now: Redis may not know it
 * @throws OperatorError when an id is unknown or dropped (then nothing was tried), or PostgreSQL cannot store at all
 */
export async function retryQuarantined(
  pool: Pool,
  choice: Choice,
  tell: { entry(retried: Retried): void; finalized(call: CallPlace): Promise<void> },
  legacy?: Legacy,
): Promise<void> {
  if ('ids' in choice) {
    const dropped = (await findQuarantined(pool, choice.ids)).filter((row) => row.droppedAt)
    const ids = dropped.map((row) => row.id).join(', ')
    if (dropped.length > 0) throw new OperatorError(`dropped, its data is gone: ${ids}`)
  }
  const { sql, value } = condition(choice)
  for (let after = '0'; ; ) {
    const { rows } = await pool.query<Quarantined>(
      `SELECT ${COLUMNS} FROM quarantined_events WHERE dropped_at IS NULL AND ${sql} AND id > $2
       ORDER BY quarantined_events.id LIMIT ${PAGE}`,
      [value, after],
    )
    for (const streamKey of new Set(rows.map((row) => row.streamKey))) {
      const itsOwn = rows.filter((row) => row.streamKey === streamKey)
      await retryStream(pool, streamKey, itsOwn, tell, legacy)
    }
    if (rows.length < PAGE) return
    after = rows.at(-1)!.id
  }
}

async function retryStream(
  pool: Pool,
  streamKey: string,
  rows: Quarantined[],
  tell: Parameters<typeof retryQuarantined>[2],
  legacy: Legacy | undefined,
): Promise<void> {
  const stays = async (row: Quarantined, reason: string) => {
    await pool.query('UPDATE quarantined_events SET reason = $2 WHERE id = $1', [row.id, storable(reason)])
    tell.entry({ id: row.id, streamKey, entryId: row.entryId, reason })
  }
  const name = parseStreamKey(streamKey)
  if (!name) {
    for (const row of rows) await stays(row, "foreign_stream: its stream is no call's")
    return
  }
  const lease = leaseFromStart(name.callSid, name.partition)
  const tries: Try[] = []
  for (const row of rows) {
    const fields = isEntryId(row.entryId) ? readFields(row.raw) : undefined
    if (!fields) {
      await stays(row, UNREADABLE)
      continue
    }
    const entry: Entry = [row.entryId, fields.map(String)]
    const decoded = decodeAlone(lease, entry)
    const reason = 'refused' in decoded ? decoded.refused.reason : await takenBy(pool, name.callSid, decoded)
    if (reason !== undefined) await stays(row, reason)
    else tries.push({ row, entry })
  }
  tries.sort((a, b) => compareIds(a.row.entryId, b.row.entryId))
  const write = (batch: Batch<EncodedTurns>) => writeBatch(pool, batch, WRITE_TIMEOUT_MS, legacy)
  await store(write, lease, tries, stays, tell.entry)
  if (tries.length > 0 && (await isFinalized(pool, name.callSid))) await tell.finalized(name)
}

interface Try {
  row: Quarantined
  entry: Entry
}

/** All at once; where that fails for the data, halves, down to the entry at fault. */
async function store(
  write: (batch: Batch<EncodedTurns>) => Promise<unknown>,
  lease: Lease,
  tries: Try[],
  stays: (row: Quarantined, reason: string) => Promise<void>,
  stored: (retried: Retried) => void,
): Promise<void> {
  if (tries.length === 0) return
  const entries = tries.map((each) => each.entry)
  const batch = emptyBatch(new EncodedTurns())
  decodeCall(lease, entries, batch)
  if (batch.calls.length === 0) {
    // Its row is folded again in any case: for a turn alone, a worker would leave it to the next batch.
    const ms = entryMs(entries[0]![0])
    batch.calls.push({ callSid: lease.callSid, firstMs: ms, lastMs: ms, finalize: false })
  }
  batch.redelivered = true
  batch.release = tries.map(({ row }) => row.id)
  try {
    await write(batch)
  } catch (error) {
    const verdict = verdictOn(error)
    if (verdict === 'retry' || verdict === 'stop') {
      throw new OperatorError(`PostgreSQL cannot store: ${reasonOf(error as Error)}`, { cause: error })
    }
    if (tries.length === 1) {
      await stays(tries[0]!.row, `not_storable: ${reasonOf(error as Error)}`)
      return
    }
    const middle = tries.length >> 1
    await store(write, lease, tries.slice(0, middle), stays, stored)
    await store(write, lease, tries.slice(middle), stays, stored)
    return
  }
  for (const { row } of tries) stored({ id: row.id, streamKey: row.streamKey, entryId: row.entryId, reason: undefined })
}

async function isFinalized(pool: Pool, callSid: string): Promise<boolean> {
  const sql = 'SELECT finalized_at IS NOT NULL AS finalized FROM call_sessions WHERE call_sid = $1'
  const { rows } = await pool.query<{ finalized: boolean }>(sql, [storable(callSid)])
  return rows[0]?.finalized ?? false
}

/**
 * Of two entries with the same key the first one is stored. When the first one was in quarantine, the second one is the row,
 * and stays it: what was read by somebody must not change. The first one would vanish without a trace if it left.
 *
 * @returns why the entry cannot be stored any more; undefined when its place is free, or its own
 */
async function takenBy(
  pool: Pool,
  callSid: string,
  decoded: Exclude<DecodedEntry, { refused: unknown }>,
): Promise<string | undefined> {
  const { what, sql, key, streamId } =
    'turn' in decoded
      ? { what: 'turn', sql: TURN_HOLDER, key: decoded.turn.turnId, streamId: decoded.turn.streamId }
      : { what: 'event', sql: EVENT_HOLDER, key: decoded.event.eventId, streamId: decoded.event.streamId }
  const { rows } = await pool.query<{ streamId: string }>(sql, [storable(callSid), key])
  const holder = rows[0]?.streamId
  if (holder === undefined || !isEntryId(holder) || compareIds(holder, streamId) <= 0) return undefined
  return `duplicate: ${what} ${key} is stored already, from the later entry ${holder}; drop this one`
}
