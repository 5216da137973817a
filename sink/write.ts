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
import { isPooled, type Pool, type PoolClient, sqlState } from '../shared/postgres.js'
import { type EncodedTurns, TURN_COLUMNS } from './copy.js'
import { type Batch, type EventRow, entryMs, iso, type QuarantineRow, storable } from './decode.js'
import { type Finalized, finalizeCalls } from './finalize.js'
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

const INSERT_EVENTS = {
  name: 'events',
  text: `
    INSERT INTO call_events (call_sid, event_id, type, occurred_at, event, stream_id, ingested_at)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[], $5::jsonb[], $6::text[], $7::timestamptz[])
    ON CONFLICT DO NOTHING`,
}
/**
 * For belated batches: rows of the same keys that were made from later entries. (They are inserted anew, and not updated: ON CONFLICT
 * DO UPDATE would lock all the other rows, too, which whoever erases a call takes in another order.)
 */
const laterThan = (stored: string, given: string) =>
  `(${given}.ingested_at, split_part(${given}.stream_id, '-', 2)::numeric)
     < (${stored}.ingested_at, split_part(${stored}.stream_id, '-', 2)::numeric)`
const REMOVE_LATER_TURNS = `
  DELETE FROM call_transcript_turns t USING staged_turns s
  WHERE t.call_sid = s.call_sid AND t.turn_id = s.turn_id AND ${laterThan('t', 's')}`
const REMOVE_LATER_EVENTS = {
  name: 'later-events',
  text: `
    DELETE FROM call_events e
    USING unnest($1::text[], $2::text[], $3::text[], $4::timestamptz[]) AS g(call_sid, event_id, stream_id, ingested_at)
    WHERE e.call_sid = g.call_sid AND e.event_id = g.event_id AND ${laterThan('e', 'g')}`,
}
/** Kept for the connection's life: making and dropping it every time takes 1 ms and leaves 50 dead rows in the catalog. */
const STAGING_FOR_CONNECTION =
  'CREATE TEMP TABLE IF NOT EXISTS staged_turns (LIKE call_transcript_turns INCLUDING DEFAULTS) ON COMMIT DELETE ROWS'
/** Where somebody has left one on the pooler's connection, it may be of another schema, or of an older table. */
const STAGING_FOR_TRANSACTION = `
  DROP TABLE IF EXISTS pg_temp.staged_turns;
  CREATE TEMP TABLE staged_turns (LIKE call_transcript_turns INCLUDING DEFAULTS) ON COMMIT DROP`
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
  /** What became of its calls; absent where none was folded. */
  calls?: Finalized
  /** Of the COPY; absent where there was none. */
  copySeconds?: number
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
  const write = (writeTurns: TurnWriter) =>
    inTransaction(client, async () => {
      const written = await writeAll(client, batch, writeTurns, legacy)
      await batch.confirm?.()
      return written
    })
  const stage: TurnWriter = (_client, rows) => stageTurns(client, rows, batch.belated)
  if (batch.redelivered) return await write(stage)
  try {
    const isOneStatement = batch.events.length + batch.quarantine.length + batch.calls.length === 0 && !batch.confirm
    // One COPY is a transaction by itself: BEGIN and COMMIT would be two round trips more for most batches of live calls.
    if (isOneStatement && !isPooled(client)) return await writeAll(client, batch, copyTurns)
    return await write(copyTurns)
  } catch (error) {
    if (sqlState(error) !== UNIQUE_VIOLATION) throw error
    return await write(stage)
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
  const written: Written = { turns: 0, staged: false, events: 0, quarantined: 0 }
  if (batch.turns.length > 0) {
    const started = performance.now()
    Object.assign(written, await writeTurns(client, batch.turns))
    written.copySeconds = secondsSince(started)
  }
  if (batch.events.length > 0) {
    const values = eventColumns(batch.events)
    if (batch.belated) await client.query({ ...REMOVE_LATER_EVENTS, values: [0, 1, 5, 6].map((i) => values[i]) })
    const { rowCount } = await client.query({ ...INSERT_EVENTS, values })
    written.events = rowCount ?? 0
  }
  if (batch.quarantine.length > 0) {
    const { rowCount } = await client.query({ ...INSERT_QUARANTINE, values: quarantineColumns(batch.quarantine) })
    written.quarantined = rowCount ?? 0
  }
  if (batch.release) await client.query('DELETE FROM quarantined_events WHERE id = ANY($1::bigint[])', [batch.release])
  if (batch.calls.length > 0) {
    written.calls = await finalizeCalls(client, batch.calls)
    const { ended } = written.calls
    if (legacy && ended.length > 0) written.legacy = await legacy.fill(client, ended)
  }
  return written
}

const secondsSince = (started: number) => (performance.now() - started) / 1000

async function copyTurns(client: PoolClient, rows: EncodedTurns) {
  await copy(client, 'call_transcript_turns', rows)
  return { turns: rows.length, staged: false }
}

async function stageTurns(client: PoolClient, rows: EncodedTurns, belated?: true) {
  await client.query(isPooled(client) ? STAGING_FOR_TRANSACTION : STAGING_FOR_CONNECTION)
  await copy(client, 'staged_turns', rows)
  if (belated) await client.query(REMOVE_LATER_TURNS)
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
