/** replay's look at PostgreSQL, a page of calls at a time: what is there of them already. */
import { type CallPlace, streamKey } from '../../shared/keys.js'
import type { Pool } from '../../shared/postgres.js'
import { entryMs, iso, storable } from '../../sink/decode.js'

const CALLS = {
  name: 'replay-calls',
  text: `
    SELECT t.count AS turns, t.between + e.between AS rows,
      s.call_sid IS NOT NULL
        AND (s.finalized_at IS NOT NULL) = (has_ended OR coalesce(presumed_place > coalesce(greatest(connected_place, last_place), '{0,0}'), false))
        AND (s.finalized_at IS NULL OR s.turn_count IS NOT DISTINCT FROM t.count)
        AND coalesce(s.initiated_at <= least(t.first_at, e.first_at), true) AS fits
    FROM unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) WITH ORDINALITY AS k(call_sid, first, last, n)
    LEFT JOIN call_sessions s USING (call_sid)
    CROSS JOIN LATERAL (
      SELECT (count(*) FILTER (WHERE ingested_at BETWEEN k.first AND k.last))::int AS between,
        min(occurred_at) FILTER (WHERE event->>'source' IS DISTINCT FROM 'calltape') AS first_at,
        coalesce(bool_or(type = 'call.ended' AND NOT presumed), false) AS has_ended,
        max(place) FILTER (WHERE presumed) AS presumed_place, max(place) FILTER (WHERE type = 'call.connected') AS connected_place
      FROM (
        SELECT *, CASE WHEN type IN ('call.ended', 'call.connected') THEN string_to_array(stream_id, '-')::numeric[] END AS place,
          type = 'call.ended' AND event @> '{"source": "calltape"}'
            AND event->>'reason' IN ('abandoned', 'disconnected', 'expired') AS presumed
        FROM call_events o WHERE o.call_sid = k.call_sid) placed) e
    CROSS JOIN LATERAL (
      SELECT count(*)::int AS count, (count(*) FILTER (WHERE ingested_at BETWEEN k.first AND k.last))::int AS between,
        min(spoken_at) AS first_at,
        max(CASE WHEN presumed_place IS NOT NULL THEN string_to_array(stream_id, '-')::numeric[] END) AS last_place
      FROM call_transcript_turns o WHERE o.call_sid = k.call_sid) t
    ORDER BY n`,
}
const QUARANTINED = {
  name: 'replay-quarantined',
  text: `
    SELECT stream_key, count(*)::int AS entries, (count(*) FILTER (
      WHERE split_part(entry_id, '-', 1)::numeric BETWEEN k.first AND k.last))::int AS between
    FROM unnest($1::text[], $2::numeric[], $3::numeric[]) AS k(stream_key, first, last)
    JOIN quarantined_events USING (stream_key) GROUP BY stream_key`,
}

export interface StoredCall {
  /** Turns there are, whatever they were made of. */
  turns: number
  /** Of what arrived from the first to the last of the entries in question: rows, and what is in quarantine or was dropped from there. */
  rows: number
  /** Its row in call_sessions can be right: final if it is over (as in fold.sql), with as many turns as there are, begun with the first. */
  fits: boolean
  /** Of the whole call, entries in quarantine and those dropped from there. */
  quarantined: number
}

/**
 * @param pool of the schema that is written
 * @param main of the schema whose quarantine counts
 * @param calls each with the first and the last of the entries in question
 * @returns what there is of each
 */
export async function readStoredCalls(
  pool: Pool,
  main: Pool,
  calls: (CallPlace & { first: string; last: string })[],
): Promise<StoredCall[]> {
  const names = calls.map((call) => storable(call.callSid))
  const first = calls.map((call) => entryMs(call.first))
  const last = calls.map((call) => entryMs(call.last))
  const keys = calls.map((call) => storable(streamKey(call)))
  const [stored, quarantined] = await Promise.all([
    pool.query<Omit<StoredCall, 'quarantined'>>({ ...CALLS, values: [names, first.map(iso), last.map(iso)] }),
    main.query<{ stream_key: string; entries: number; between: number }>({
      ...QUARANTINED,
      values: [keys, first, last],
    }),
  ])
  const counts = new Map(quarantined.rows.map((row) => [row.stream_key, row]))
  return stored.rows.map((row, i) => {
    const { entries = 0, between = 0 } = counts.get(keys[i]!) ?? {}
    return { ...row, rows: row.rows + between, quarantined: entries }
  })
}
