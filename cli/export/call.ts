/** A call as PostgreSQL has it, read for an export in one snapshot. */
import type { Pool } from '../../shared/postgres.js'
import { storable } from '../../sink/decode.js'

/** The row of call_sessions, but for what the export has beside it: call_sid, full_transcript. Null: not known. */
export interface CallFacts {
  provider: string | null
  direction: 'inbound' | 'outbound' | null
  from_number: string | null
  to_number: string | null
  status: string | null
  outcome: string | null
  initiated_at: Date | null
  answered_at: Date | null
  ended_at: Date | null
  duration_seconds: number | null
  recording_url: string | null
  conversation_stage: string | null
  collected_data: Record<string, unknown> | null
  objections_encountered: string[] | null
  turn_count: number | null
  expected_turns: number | null
  complete: boolean | null
  end_reason: string | null
  meta: Record<string, unknown> | null
  last_event_at: Date | null
  /** Null while it is live. */
  finalized_at: Date | null
}

export interface ExportedTurn {
  turn_id: string
  seq: number | null
  speaker: string
  text: string
  spoken_at: Date
  started_at: Date | null
  ended_at: Date | null
  confidence: number | null
  language: string | null
  interrupted: boolean | null
  meta: Record<string, unknown> | null
  stream_id: string
}

export interface ExportedEvent {
  event_id: string
  type: string
  occurred_at: Date
  event: Record<string, unknown>
  stream_id: string
}

export interface ExportedCall {
  call_sid: string
  /** Null when only turns have come so far. */
  call: CallFacts | null
  /** In call order, as in full_transcript. */
  turns: ExportedTurn[]
  /** As they happened. */
  events: ExportedEvent[]
  /** Entries that could not be stored, and are not in it. */
  quarantined: number
}

const CALL = `
  SELECT provider, direction, from_number, to_number, status, outcome, initiated_at, answered_at, ended_at, duration_seconds,
    recording_url, conversation_stage, collected_data, objections_encountered, turn_count, expected_turns, complete, end_reason,
    meta, last_event_at, finalized_at
  FROM call_sessions WHERE call_sid = $1`

/** The order is fold.sql's, told by numbers. */
const TURNS = `
  SELECT turn_id, seq, speaker, text, spoken_at, started_at, ended_at, confidence, language, interrupted, meta, stream_id
  FROM (
    SELECT *, row_number() OVER spoken AS n,
      CASE WHEN sequences > 1 THEN row_number() OVER spoken ELSE coalesce(seq, max(seq) OVER spoken) END AS place
    FROM call_transcript_turns, (
      SELECT sequences_of(array_agg(event #> '{meta,sequence}') FILTER (WHERE event->'meta' ? 'sequence')) AS sequences
      FROM call_events WHERE call_sid = $1) marked
    WHERE call_sid = $1
    WINDOW spoken AS (ORDER BY spoken_at, ingested_at, split_part(stream_id, '-', 2)::numeric)
  ) placed
  ORDER BY place NULLS FIRST, seq NULLS LAST, n`

const EVENTS = `
  SELECT event_id, type, occurred_at, event, stream_id FROM call_events WHERE call_sid = $1
  ORDER BY occurred_at, ingested_at, split_part(stream_id, '-', 2)::numeric`

/** @returns undefined when PostgreSQL has nothing of the call */
export async function readCall(pool: Pool, quarantined: number, callSid: string): Promise<ExportedCall | undefined> {
  const client = await pool.connect()
  let isFit = false
  try {
    await client.query('BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY')
    const values = [storable(callSid)]
    const call = (await client.query<CallFacts>(CALL, values)).rows[0] ?? null
    const turns = (await client.query<ExportedTurn>(TURNS, values)).rows
    const events = (await client.query<ExportedEvent>(EVENTS, values)).rows
    await client.query('COMMIT')
    isFit = true
    if (!call && turns.length + events.length + quarantined === 0) return undefined
    return { call_sid: callSid, call, turns, events, quarantined }
  } finally {
    client.release(!isFit)
  }
}
