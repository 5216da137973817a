/**
 * How the peers write to PostgreSQL, into the same tables and with the same result as calltape: several rows a statement, arrays
 * unnested, which is known to be the fastest INSERT; the call's row with its transcript when the call ends.
 */
import type { SentEvent } from '../../cli/compare.js'
import type { Pool } from '../../shared/postgres.js'

type TurnEvent = Extract<SentEvent, { type: 'turn' }>

export const isTurn = (event: SentEvent): event is TurnEvent => event.type === 'turn'

/** The two words that calltape's own table has for who speaks. */
export const speakerOf = (speaker: string) => (['user', 'caller', 'customer'].includes(speaker) ? 'customer' : 'agent')

const COLUMNS = 'call_sid, turn_id, seq, speaker, text, spoken_at, confidence, language'

/** A turn's values, for `INSERT_TURN`. */
export function turnValues(turn: TurnEvent): unknown[] {
  const { call_sid: sid, seq, speaker, text, ts, confidence, language } = turn
  return [sid, String(seq), seq, speakerOf(speaker), text, new Date(ts!), confidence ?? null, language ?? null]
}

/** Named, so that it is planned once a connection. */
export const INSERT_TURN = {
  name: 'insert-turn',
  text: `INSERT INTO call_transcript_turns (${COLUMNS}) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT DO NOTHING`,
}

const TYPES = ['text', 'text', 'int', 'text', 'text', 'timestamptz', 'real', 'text']
const INSERT_TURNS = {
  name: 'insert-turns',
  text: `INSERT INTO call_transcript_turns (${COLUMNS})
    SELECT * FROM unnest(${TYPES.map((type, i) => `$${i + 1}::${type}[]`).join(', ')}) ON CONFLICT DO NOTHING`,
}
const START_CALLS = {
  name: 'start-calls',
  text: `INSERT INTO call_sessions (call_sid, status, provider, direction, from_number, to_number)
    SELECT sid, 'in-progress', provider, direction, "from", "to"
    FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[]) AS s(sid, provider, direction, "from", "to")
    ON CONFLICT DO NOTHING`,
}
const END_CALLS = {
  name: 'end-calls',
  text: `UPDATE call_sessions AS c
    SET status = 'completed', end_reason = e.reason, outcome = e.outcome, ended_at = e.at, finalized_at = now(),
      expected_turns = e.turns, turn_count = t.count, complete = t.count = e.turns, full_transcript = t.transcript
    FROM unnest($1::text[], $2::timestamptz[], $3::text[], $4::text[], $5::int[]) AS e(sid, at, reason, outcome, turns),
      LATERAL (
        SELECT count(*)::int AS count, jsonb_agg(
          jsonb_build_object('seq', seq, 'speaker', speaker, 'text', text, 'timestamp', spoken_at) ORDER BY seq
        ) AS transcript FROM call_transcript_turns WHERE call_sid = e.sid
      ) AS t
    WHERE c.call_sid = e.sid`,
}

/** An array a column. */
const columnsOf = (rows: unknown[][]) => rows[0]!.map((_, column) => rows.map((row) => row[column] ?? null))

/** Turns first, so that a call that is over has all that came before its end. */
export async function storeEvents(pool: Pool, events: SentEvent[]): Promise<void> {
  const turns = events.filter(isTurn).map(turnValues)
  if (turns.length > 0) {
    await pool.query({ ...INSERT_TURNS, values: columnsOf(turns) })
  }
  const started = events.filter((event) => event.type === 'call.started')
  if (started.length > 0) {
    const calls = started.map(({ call_sid: sid, provider, direction, from, to }) => [
      sid,
      provider,
      direction,
      from,
      to,
    ])
    await pool.query({ ...START_CALLS, values: columnsOf(calls) })
  }
  const ended = events.filter((event) => event.type === 'call.ended')
  if (ended.length > 0) {
    const calls = ended.map((end) => [end.call_sid, new Date(end.ts!), end.reason, end.outcome, end.turn_count])
    await pool.query({ ...END_CALLS, values: columnsOf(calls) })
  }
}
