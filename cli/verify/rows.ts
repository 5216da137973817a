/** verify's side of PostgreSQL: the rows that a page of entries must have made, and how they differ from what they must be. */
import { isDeepStrictEqual } from 'node:util'
import type { Pool } from '../../shared/postgres.js'
import { type EventRow, entryMs, storable, type TurnRow } from '../../sink/decode.js'

/** All statements here find their rows by an index, however large or small the tables are. */
export const READ_SETTINGS = { enable_seqscan: 'off', jit: 'off' }

/** A row of call_transcript_turns or call_events: times in epoch ms, jsonb as JSON.parse gives it. */
export type StoredRow = { stream_id: string } & Record<string, unknown>

const ms = (column: string) => `(extract(epoch FROM ${column}) * 1000)::float8 AS ${column}`

const TURNS = {
  name: 'verify-turns',
  text: `
    SELECT call_sid, turn_id, seq, speaker, text, ${ms('spoken_at')}, ${ms('started_at')}, ${ms('ended_at')},
      confidence::float8 AS confidence, language, interrupted, meta, stream_id, ${ms('ingested_at')}
    FROM call_transcript_turns
    JOIN (SELECT DISTINCT * FROM unnest($1::text[], $2::text[]) AS k(call_sid, turn_id)) keys USING (call_sid, turn_id)`,
}
const EVENTS = {
  name: 'verify-events',
  text: `
    SELECT call_sid, event_id, type, ${ms('occurred_at')}, event, stream_id, ${ms('ingested_at')}
    FROM call_events
    JOIN (SELECT DISTINCT * FROM unnest($1::text[], $2::text[]) AS k(call_sid, event_id)) keys USING (call_sid, event_id)`,
}
const QUARANTINE = {
  name: 'verify-quarantine',
  text: `
    SELECT stream_key, entry_id, dropped_at IS NOT NULL AS dropped
    FROM quarantined_events JOIN unnest($1::text[], $2::text[]) AS k(stream_key, entry_id) USING (stream_key, entry_id)`,
}

/**
 * One statement, so that all of it is of one moment. A transcript fits if it has the call's turns, each once. (Its order is
 * the fold's own affair: to check it here would be to write it again.)
 */
const CALLS = {
  name: 'verify-calls',
  text: `
    SELECT call_sid, s.call_sid IS NOT NULL AS known, s.finalized_at IS NOT NULL AS finalized, t.count AS turns,
      (SELECT count(*)::int FROM call_events e WHERE e.call_sid = k.call_sid) AS events,
      s.finalized_at IS NULL OR s.turn_count IS NOT DISTINCT FROM t.count AS "countFits",
      CASE
        WHEN s.finalized_at IS NULL THEN true
        WHEN jsonb_typeof(full_transcript) IS DISTINCT FROM 'array' THEN false
        ELSE jsonb_array_length(full_transcript) = t.count AND NOT EXISTS (
          SELECT value FROM jsonb_array_elements(full_transcript)
          EXCEPT ALL
          SELECT jsonb_build_object('seq', seq, 'speaker', speaker, 'text', text, 'timestamp', spoken_at)
          FROM call_transcript_turns o WHERE o.call_sid = k.call_sid)
      END AS "transcriptFits"
    FROM unnest($1::text[]) AS k(call_sid) LEFT JOIN call_sessions s USING (call_sid)
    CROSS JOIN LATERAL (SELECT count(*)::int AS count FROM call_transcript_turns c WHERE c.call_sid = k.call_sid) t`,
}

/** Of the kind that verify looks for in each direction: from an entry to its row, and from a row to its entry. */
export const TABLES = {
  turns: { name: 'call_transcript_turns', key: 'turn_id' },
  events: { name: 'call_events', key: 'event_id' },
} as const
export type Table = keyof typeof TABLES

/** One string for a pair of strings: the length in front keeps any two pairs apart, whatever is in them. */
export const pair = (a: string, b: string) => `${a.length} ${a} ${b}`

/** @returns the rows there are, by `pair` of call and idempotency key */
export async function readRows(
  pool: Pool,
  table: Table,
  keys: [callSid: string, key: string][],
): Promise<Map<string, StoredRow>> {
  if (keys.length === 0) return new Map()
  const statement = table === 'turns' ? TURNS : EVENTS
  const { rows } = await pool.query<StoredRow>({ ...statement, values: columns(keys) })
  return new Map(rows.map((row) => [pair(String(row.call_sid), String(row[TABLES[table].key])), row]))
}

/** @returns which entries are in quarantine, or were dropped from there, by `pair` of stream and entry */
export async function readQuarantine(
  pool: Pool,
  entries: [streamKey: string, entryId: string][],
): Promise<Map<string, 'quarantined' | 'dropped'>> {
  if (entries.length === 0) return new Map()
  const { rows } = await pool.query<{ stream_key: string; entry_id: string; dropped: boolean }>({
    ...QUARANTINE,
    values: columns(entries),
  })
  return new Map(rows.map((row) => [pair(row.stream_key, row.entry_id), row.dropped ? 'dropped' : 'quarantined']))
}

export interface CallState {
  /** It has a row in call_sessions. */
  known: boolean
  finalized: boolean
  /** Rows of the call. */
  turns: number
  events: number
  /** turn_count is the number of its turns; true while it is not finalized. */
  countFits: boolean
  /** full_transcript holds its turns, each once; true while it is not finalized. */
  transcriptFits: boolean
}

export async function readCalls(pool: Pool, callSids: string[]): Promise<Map<string, CallState>> {
  const { rows } = await pool.query<CallState & { call_sid: string }>({ ...CALLS, values: [callSids.map(storable)] })
  return new Map(rows.map((row) => [row.call_sid, row]))
}

/** The keys and entry ids of all rows of a call, in pages by key. */
export async function* rowsOfCall(
  pool: Pool,
  table: Table,
  callSid: string,
  pageSize: number,
): AsyncGenerator<{ key: string; streamId: string }[]> {
  const { name, key } = TABLES[table]
  for (let after = ''; ; ) {
    const { rows } = await pool.query<{ key: string; streamId: string }>(
      `SELECT ${key} AS key, stream_id AS "streamId" FROM ${name} WHERE call_sid = $1 AND ${key} > $2
       ORDER BY ${key} LIMIT $3`,
      [callSid, after, pageSize],
    )
    if (rows.length > 0) yield rows
    if (rows.length < pageSize) return
    after = rows.at(-1)!.key
  }
}

/** A stream may have any name: where PostgreSQL cannot hold it, the sink writes it like this, too. */
const columns = (pairs: [string, string][]) => [pairs.map(([a]) => storable(a)), pairs.map(([, b]) => b)]

/** @returns the columns in which the row is not what its entry makes of it */
export function wrongTurnColumns({ turn, turnId, streamId, meta }: TurnRow, row: StoredRow): string[] {
  return wrongColumns(row, {
    turn_id: turnId,
    seq: turn.seq,
    speaker: turn.speaker,
    text: turn.text,
    spoken_at: turn.ts ?? entryMs(streamId),
    started_at: turn.started_at,
    ended_at: turn.ended_at,
    confidence: turn.confidence === undefined ? undefined : Math.fround(turn.confidence), // PostgreSQL's real is a float4
    language: turn.language,
    interrupted: turn.interrupted,
    meta: meta === null ? undefined : JSON.parse(meta),
    stream_id: streamId,
    ingested_at: entryMs(streamId),
  })
}

/** @returns the columns in which the row is not what its entry makes of it */
export function wrongEventColumns(expected: EventRow, row: StoredRow): string[] {
  return wrongColumns(row, {
    event_id: expected.eventId,
    type: expected.type,
    occurred_at: expected.occurredMs,
    event: JSON.parse(expected.event),
    stream_id: expected.streamId,
    ingested_at: entryMs(expected.streamId),
  })
}

/** jsonb keeps neither the order of names nor how a number was written: values are compared, not their spelling. */
function wrongColumns(row: StoredRow, expected: Record<string, unknown>): string[] {
  return Object.entries(expected).flatMap(([column, value = null]) => {
    const stored = row[column]
    const isSame = typeof value === 'object' ? isDeepStrictEqual(stored, value) : stored === value
    return isSame ? [] : [column]
  })
}
