/**
 * copy → finalize → COMMIT: one batch, one transaction.
 *
 * Fresh turns are COPYed straight into the table. Only a batch that may hold turns which are there already goes the slow
 * way: COPY into a staging table, then INSERT … ON CONFLICT DO NOTHING. The first writer of a turn wins.
 */
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { from as copyFrom } from 'pg-copy-streams'
import { crashPoint } from '../shared/crash.js'
import { readPackageFile } from '../shared/package-root.js'
import { type Pool, type PoolClient, sqlState } from '../shared/postgres.js'
import { type EncodedTurns, TURN_COLUMNS } from './copy.js'
import { type Batch, type CallRow, type EventRow, entryMs, type QuarantineRow, storable } from './decode.js'
import type { Filled, Legacy } from './legacy.js'
import { verdictOn, WriteTimeout } from './verdict.js'

/**
 * All statements here find their rows by primary key, however many rows there are. So one plan each, made once, serves: planning
 * the fold costs more than running it for a single call (1.0 against 0.3 ms). What was planned while the tables were small
 * must not scan them when they are large, hence no seqscan; compiling a plan (jit) takes longer than running it, too.
 */
const PLAN_SETTINGS = { plan_cache_mode: 'force_generic_plan', enable_seqscan: 'off', jit: 'off' }

/**
 * A sink that dies without a word (its machine, its network) must not hold its locks for the two hours of TCP's keepalive: another
 * sink that has taken over its calls waits for them.
 *
 * @param timeoutMs for one statement @param leaseMs how long a sink is waited for that does nothing
 * @returns PostgreSQL's settings for the connections that `writeBatch` uses
 */
export function writeSettings(timeoutMs: number, leaseMs: number): Record<string, string> {
  return {
    ...PLAN_SETTINGS,
    statement_timeout: String(timeoutMs),
    idle_in_transaction_session_timeout: String(leaseMs),
    tcp_keepalives_idle: '10',
    tcp_keepalives_interval: '5',
    tcp_keepalives_count: '3',
    tcp_user_timeout: '30000',
  }
}

const UNIQUE_VIOLATION = '23505'
const COPY_CHUNK_BYTES = 256 * 1024
const FOLD = { name: 'fold', text: readPackageFile('sink/fold.sql') }

/**
 * A sink whose lease has lapsed may still be about to write. Whoever comes second must see what the first one wrote: so the
 * rows are locked before the fold takes its snapshot, always in the same order. Gives the calls that are final already.
 */
const LOCK_CALLS = {
  name: 'lock',
  text: `SELECT CASE WHEN finalized_at IS NOT NULL THEN call_sid END AS final
         FROM call_sessions WHERE call_sid = ANY($1::text[]) ORDER BY call_sid FOR UPDATE`,
}

const INSERT_EVENTS = {
  name: 'events',
  text: `
    INSERT INTO call_events (call_sid, event_id, type, occurred_at, event, stream_id, ingested_at)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::jsonb[], $6::text[], $7::timestamptz[])
    ON CONFLICT DO NOTHING`,
}
const INSERT_QUARANTINE = {
  name: 'quarantine',
  text: `
    INSERT INTO quarantined_events (stream_key, entry_id, reason, raw)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[])
    ON CONFLICT DO NOTHING`,
}

export interface Written {
  /** What was not in PostgreSQL before. */
  turns: number
  events: number
  quarantined: number
  /** It went through staging. */
  staged: boolean
  /** In the table of LEGACY_CALL_SESSIONS. */
  legacy?: Filled
}

/** What PostgreSQL's own statement_timeout does not end in time: then nobody answers any more. */
const SILENCE_MS = 5000

/**
 * @param timeoutMs for a statement, as in `writeSettings`; all of it may take a little longer
 * @param legacy the table of LEGACY_CALL_SESSIONS, if there is one
 * @throws whatever PostgreSQL says, WriteTimeout, or LegacyFailure; then nothing of the batch is stored, or nobody knows
 */
export async function writeBatch(
  pool: Pool,
  batch: Batch<EncodedTurns>,
  timeoutMs: number,
  legacy?: Legacy,
): Promise<Written> {
  const client = await pool.connect()
  let late: WriteTimeout | undefined
  const timer = setTimeout(() => {
    late = new WriteTimeout(`PostgreSQL has not finished a batch within ${(timeoutMs + SILENCE_MS) / 1000} s`)
    client.release(late) // ends the connection, and with it what waits for its answer
  }, timeoutMs + SILENCE_MS)
  try {
    const written = await copyOrStage(client, batch, legacy)
    if (!late) client.release()
    if (written.legacy) legacy?.committed(written.legacy)
    return written
  } catch (error) {
    // Unless only the data was wrong, the connection may lead to the wrong server by now: the next batch gets a new one.
    if (!late) client.release(verdictOn(error) !== 'quarantine')
    throw late ?? error
  } finally {
    clearTimeout(timer)
  }
}

/** Straight into the table; through staging when that meets a turn which is there already, or is bound to. */
async function copyOrStage(client: PoolClient, batch: Batch<EncodedTurns>, legacy?: Legacy): Promise<Written> {
  const write = (writeTurns: TurnWriter) => inTransaction(client, () => writeAll(client, batch, writeTurns, legacy))
  if (batch.redelivered) return await write(stageTurns)
  try {
    const isOneStatement = batch.events.length + batch.quarantine.length + batch.calls.length === 0
    // One COPY is a transaction by itself: BEGIN and COMMIT would be two round trips more for most batches of live calls.
    if (isOneStatement) return await writeAll(client, batch, copyTurns)
    return await write(copyTurns)
  } catch (error) {
    if (sqlState(error) !== UNIQUE_VIOLATION) throw error
    return await write(stageTurns)
  }
}

async function inTransaction<T>(client: PoolClient, work: () => Promise<T>): Promise<T> {
  await client.query('BEGIN')
  try {
    const result = await work()
    crashPoint('before-commit')
    await client.query('COMMIT')
    return result
  } catch (error) {
    // A ROLLBACK that fails means that the connection is gone, and the transaction with it: the first error tells why.
    await client.query('ROLLBACK').catch(() => undefined)
    throw error
  }
}

type TurnWriter = (client: PoolClient, rows: EncodedTurns) => Promise<Pick<Written, 'turns' | 'staged'>>

async function writeAll(
  client: PoolClient,
  batch: Batch<EncodedTurns>,
  writeTurns: TurnWriter,
  legacy?: Legacy,
): Promise<Written> {
  const turns = batch.turns.length > 0 ? await writeTurns(client, batch.turns) : { turns: 0, staged: false }
  const written: Written = { ...turns, events: 0, quarantined: 0 }
  if (batch.events.length > 0) {
    const { rowCount } = await client.query({ ...INSERT_EVENTS, values: eventColumns(batch.events) })
    written.events = rowCount ?? 0
  }
  if (batch.quarantine.length > 0) {
    const { rowCount } = await client.query({ ...INSERT_QUARANTINE, values: quarantineColumns(batch.quarantine) })
    written.quarantined = rowCount ?? 0
  }
  if (batch.release) await client.query('DELETE FROM quarantined_events WHERE id = ANY($1::bigint[])', [batch.release])
  if (batch.calls.length > 0) {
    const values = callColumns(batch.calls)
    const { rows } = await client.query<{ final: string | null }>({ ...LOCK_CALLS, values: [values[0]] })
    crashPoint('before-finalize')
    await client.query({ ...FOLD, values })
    crashPoint('after-finalize')
    // Those that end with this batch, or had ended before: only these can be final now.
    const ended = batch.calls.filter((call) => call.finalize).map((call) => call.callSid)
    const final = new Set([...ended, ...rows.flatMap((row) => row.final ?? [])])
    if (legacy && final.size > 0) written.legacy = await legacy.fill(client, [...final])
  }
  return written
}

async function copyTurns(client: PoolClient, rows: EncodedTurns) {
  await copy(client, 'call_transcript_turns', rows)
  return { turns: rows.length, staged: false }
}

async function stageTurns(client: PoolClient, rows: EncodedTurns) {
  // Kept for the connection's life: making and dropping it every time takes 1 ms and leaves 50 dead rows in the catalog.
  await client.query(
    'CREATE TEMP TABLE IF NOT EXISTS staged_turns (LIKE call_transcript_turns INCLUDING DEFAULTS) ON COMMIT DELETE ROWS',
  )
  await copy(client, 'staged_turns', rows)
  const { rowCount } = await client.query(
    'INSERT INTO call_transcript_turns SELECT * FROM staged_turns ON CONFLICT (call_sid, turn_id) DO NOTHING',
  )
  return { turns: rowCount ?? 0, staged: true }
}

/** Whether an entry's row is there already, whatever is in the entry. */
export async function isStored(pool: Pool, callSid: string, streamId: string, timeoutMs: number): Promise<boolean> {
  const question = {
    text: `SELECT FROM call_transcript_turns WHERE call_sid = $1 AND stream_id = $2
           UNION ALL SELECT FROM call_events WHERE call_sid = $1 AND stream_id = $2`,
    values: [callSid, streamId],
    query_timeout: timeoutMs + SILENCE_MS,
  }
  return (await pool.query(question)).rows.length > 0
}

/** Through `pipeline`: it is the one way in which an error in the middle leaves both stream and connection usable. */
async function copy(client: PoolClient, table: string, rows: EncodedTurns): Promise<void> {
  crashPoint('before-copy')
  const data = rows.encoded()
  const chunks: Buffer[] = []
  for (let at = 0; at < data.length; at += COPY_CHUNK_BYTES) chunks.push(data.subarray(at, at + COPY_CHUNK_BYTES))
  await pipeline(
    Readable.from(chunks),
    client.query(copyFrom(`COPY ${table} (${TURN_COLUMNS}) FROM STDIN (FORMAT binary)`)),
  )
  crashPoint('after-copy')
}

const iso = (ms: number) => new Date(ms).toISOString()

function eventColumns(rows: EventRow[]): unknown[] {
  return [
    rows.map((r) => r.callSid),
    rows.map((r) => r.eventId),
    rows.map((r) => r.type),
    rows.map((r) => iso(r.occurredMs)),
    rows.map((r) => r.event),
    rows.map((r) => r.streamId),
    rows.map((r) => iso(entryMs(r.streamId))),
  ]
}

function quarantineColumns(rows: QuarantineRow[]): unknown[] {
  return [
    rows.map((r) => storable(r.streamKey)),
    rows.map((r) => r.entryId),
    rows.map((r) => storable(r.reason)),
    rows.map((r) => Buffer.from(r.raw)),
  ]
}

function callColumns(rows: CallRow[]): unknown[] {
  const sorted = rows.toSorted((a, b) => (a.callSid < b.callSid ? -1 : 1))
  return [
    sorted.map((r) => r.callSid),
    sorted.map((r) => iso(r.firstMs)),
    sorted.map((r) => (r.lastMs === null ? null : iso(r.lastMs))),
  ]
}
