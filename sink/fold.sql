-- fold: writes the call_sessions rows of the calls in a batch, each recomputed from all that PostgreSQL has of the call.
-- Run twice, or after events in another order, it gives the same row; a late event just runs it again.
--
-- Gives a row for each call whose own row is new or changed: `final` (its call_sid; null while it is live), `outcome`, `incomplete`.
--
-- $1 text[]        call_sids, sorted (two sinks that meet on the same calls then wait for each other instead of deadlocking)
-- $2 timestamptz[] each call's earliest event in this batch   $3 timestamptz[] its latest
WITH batch AS (
  SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) AS b(call_sid, first_at, last_at)
), folded AS (
  SELECT b.*, e.*, t.*,
    -- A call that was presumed over is live again if it went on after that: with a turn, or a new connection.
    has_ended OR coalesce(presumed_place > coalesce(greatest(connected_place, last_turn_place), '{0,0}'), false) AS final
  FROM batch b
  CROSS JOIN LATERAL (
    -- What was said of the call, first or last in the order in which it happened; over no rows it is one row of nulls.
    SELECT
      (array_agg(event->>'provider'  ORDER BY n) FILTER (WHERE event ? 'provider'))[1]  AS provider,
      (array_agg(event->>'direction' ORDER BY n) FILTER (WHERE event ? 'direction'))[1] AS direction,
      (array_agg(event->>'from'      ORDER BY n) FILTER (WHERE event ? 'from'))[1]      AS from_number,
      (array_agg(event->>'to'        ORDER BY n) FILTER (WHERE event ? 'to'))[1]        AS to_number,
      -- An end status is never left again; of the others, the furthest counts, in whatever order they came.
      (array_agg(status ORDER BY n) FILTER (WHERE is_end))[1] AS end_status,
      coalesce(
        (array_agg(status ORDER BY array_position('{in-progress,ringing,initiated,queued}', status)) FILTER (WHERE event ? 'status'))[1],
        CASE WHEN bool_or(type = 'call.started') THEN 'initiated' END,
        'in-progress' -- no word of its status, but turns
      ) AS status,
      (array_agg(event->>'outcome'                 ORDER BY n DESC) FILTER (WHERE btrim(event->>'outcome', E' \t\n\r') <> ''))[1]          AS outcome,
      (array_agg((event->>'turn_count')::int       ORDER BY n DESC) FILTER (WHERE event ? 'turn_count'))[1]       AS expected_turns,
      (array_agg((event->>'duration_seconds')::int ORDER BY n DESC) FILTER (WHERE event ? 'duration_seconds'))[1] AS duration_seconds,
      (array_agg(event->>'recording_url'           ORDER BY n DESC) FILTER (WHERE event ? 'recording_url'))[1]    AS recording_url,
      (array_agg(event->>'stage'                   ORDER BY n DESC) FILTER (WHERE event ? 'stage'))[1]            AS conversation_stage,
      -- calltape's own call.ended is a presumption: anybody else's word is better.
      (array_agg(event->>'reason' ORDER BY own, n DESC) FILTER (WHERE type = 'call.ended' AND event ? 'reason'))[1] AS end_reason,
      max(place) FILTER (WHERE presumed) AS presumed_place,
      max(place) FILTER (WHERE type = 'call.connected') AS connected_place,
      array_agg(event->'data'       ORDER BY n) FILTER (WHERE event ? 'data')       AS data,
      array_agg(event->'objections' ORDER BY n) FILTER (WHERE event ? 'objections') AS objections,
      array_agg(event->'meta'       ORDER BY n) FILTER (WHERE event ? 'meta')       AS metas,
      -- Null, both, unless `seq` numbers more than turns: see migrations/0003_outcome_and_sequences.sql.
      array_agg(event #> '{meta,sequence}') FILTER (WHERE event->'meta' ? 'sequence') AS marks,
      sequences_of(array_agg(event #> '{meta,sequence}') FILTER (WHERE event->'meta' ? 'sequence')) AS sequences,
      min(occurred_at) FILTER (WHERE NOT own) AS first_event_at,
      max(occurred_at) FILTER (WHERE NOT own) AS last_event_at,
      min(occurred_at) FILTER (WHERE status = 'in-progress') AS answered_at,
      coalesce(min(occurred_at) FILTER (WHERE type = 'call.ended' AND NOT own), min(occurred_at) FILTER (WHERE is_end)) AS over_at,
      -- The call's last connection, and when each one was lost: an older one's end may be noticed after the last one began.
      (array_agg(event->>'connection' ORDER BY n DESC) FILTER (WHERE type = 'call.connected'))[1] AS last_connection,
      jsonb_object_agg(event->>'connection', occurred_at ORDER BY n)
        FILTER (WHERE type = 'call.disconnected' AND event ? 'connection') AS lost,
      coalesce(bool_or(type = 'call.ended' AND NOT presumed), false) AS has_ended,
      -- A part of what was said could not be read: it may have been the customer's.
      bool_or(event @> '{"meta": {"transcript_incomplete": true}}') AS transcript_incomplete
    FROM (
      SELECT type, event, occurred_at, string_to_array(stream_id, '-')::numeric[] AS place,
        row_number() OVER (ORDER BY occurred_at, ingested_at, split_part(stream_id, '-', 2)::numeric) AS n,
        event->>'status' AS status,
        event->>'status' IN ('completed', 'busy', 'failed', 'no-answer', 'canceled') AS is_end,
        event->>'source' IS NOT DISTINCT FROM 'calltape' AS own,
        type = 'call.ended' AND event @> '{"source": "calltape"}'
          AND event->>'reason' IN ('abandoned', 'disconnected', 'expired') AS presumed
      FROM call_events WHERE call_sid = b.call_sid
    ) numbered
  ) e
  CROSS JOIN LATERAL (
    -- Call order: by seq. A turn without one stands behind the last numbered turn spoken before it; then time, then entry.
    SELECT
      -- By way of an array of a composite type: jsonb_agg over jsonb_build_object looks up each value's type again and again, and
      -- takes 1.4 µs a turn longer.
      to_jsonb(array_agg(ROW(seq, speaker, text, spoken_at)::transcript_turn ORDER BY place NULLS FIRST, seq NULLS LAST, n))
        AS full_transcript,
      count(*)::int AS turn_count, count(seq) AS numbered, count(DISTINCT seq) AS distinct_seqs, max(seq) AS last_seq,
      min(spoken_at) AS first_turn_at, max(spoken_at) AS last_turn_at, max(stream_place) AS last_turn_place,
      bool_or(speaker = 'agent' AND said) AS agent_spoke, bool_or(speaker NOT IN ('agent', 'system') AND said) AS customer_spoke
    FROM (
      SELECT seq, speaker, text, spoken_at, row_number() OVER spoken AS n,
        -- By time alone where numbers start over.
        CASE WHEN sequences > 1 THEN row_number() OVER spoken ELSE coalesce(seq, max(seq) OVER spoken) END AS place,
        -- More than white space. Nearly all texts are told by their first byte, which costs far less than trimming them.
        text >= '!' COLLATE "C" OR btrim(text, E' \t\n\r') <> '' AS said,
        -- Only where it is asked for: casts cost.
        CASE WHEN presumed_place IS NOT NULL THEN string_to_array(stream_id, '-')::numeric[] END AS stream_place
      FROM call_transcript_turns
      WHERE call_sid = b.call_sid AND (has_ended OR presumed_place IS NOT NULL) -- a live call's turns are not read
      -- Of entries of one millisecond the ids differ in their last number alone: the longer one is the later one.
      WINDOW spoken AS (ORDER BY spoken_at, ingested_at, octet_length(stream_id), stream_id)
    ) placed
  ) t
)
INSERT INTO call_sessions AS s (
  call_sid, provider, direction, from_number, to_number, status, outcome, initiated_at, answered_at, ended_at, duration_seconds,
  recording_url, conversation_stage, collected_data, objections_encountered, full_transcript, turn_count, expected_turns,
  complete, end_reason, meta, last_event_at, finalized_at
)
SELECT
  call_sid, provider, direction, from_number, to_number,
  coalesce(end_status, CASE WHEN final THEN 'completed' END, status),
  -- (Only who was answered has `completed` said of him.)
  CASE WHEN final THEN call_outcome(
    outcome, coalesce(end_status, 'completed'), end_reason,
    answered_at IS NOT NULL OR end_status = 'completed', agent_spoke, customer_spoke OR transcript_incomplete
  ) ELSE outcome END,
  initiated_at, answered_at,
  CASE WHEN final THEN presumed_over_at ELSE over_at END,
  coalesce(duration_seconds, CASE WHEN final THEN
    least(round(extract(epoch FROM greatest(presumed_over_at - coalesce(answered_at, initiated_at), '0'))), 2147483647)::int END),
  recording_url, conversation_stage,
  (SELECT jsonb_object_agg(key, value ORDER BY n) FROM unnest(data) WITH ORDINALITY AS d(object, n), jsonb_each(object)),
  (SELECT jsonb_agg(objection ORDER BY first_place)
   FROM (SELECT objection, min(ARRAY[n, place]) AS first_place
         FROM unnest(objections) WITH ORDINALITY AS o(list, n),
           jsonb_array_elements_text(list) WITH ORDINALITY AS l(objection, place)
         GROUP BY objection) distinct_ones),
  CASE WHEN final THEN coalesce(full_transcript, '[]') END,
  CASE WHEN final THEN turn_count END, expected_turns,
  CASE WHEN NOT final THEN NULL
       -- Every turn is numbered, and a number up to the last one is missing: a gap. Fewer than the producer sent: a gap, too.
       WHEN turn_count < expected_turns OR (sequences IS NULL AND numbered = turn_count AND distinct_seqs <= last_seq) THEN false
       WHEN turn_count = expected_turns THEN true
       -- Its turns are read once more here, rather than their ids being carried along for every call.
       WHEN sequences = 1 THEN sequence_is_whole(
         marks, ARRAY(SELECT turn_id FROM call_transcript_turns o WHERE o.call_sid = timed.call_sid))
  END,
  CASE WHEN final THEN end_reason END,
  (SELECT jsonb_object_agg(key, value ORDER BY n) FROM unnest(metas) WITH ORDINALITY AS m(object, n), jsonb_each(object)),
  -- Of a final row all is in the tables; what came last may be something sent again.
  coalesce(CASE WHEN final THEN greatest(last_event_at, last_turn_at) END, greatest(last_at, last_event_at), first_at),
  CASE WHEN final THEN now() END
FROM (
  SELECT *, coalesce(least(first_event_at, first_turn_at), first_at) AS initiated_at,
    -- If nobody said when: when its connection was lost, or else when it was last heard of.
    coalesce(over_at, greatest(coalesce((lost->>last_connection)::timestamptz, last_event_at), last_turn_at), first_at)
      AS presumed_over_at
  FROM folded
) timed
ORDER BY call_sid
ON CONFLICT (call_sid) DO UPDATE SET
  provider = excluded.provider, direction = excluded.direction, from_number = excluded.from_number, to_number = excluded.to_number,
  status = excluded.status, outcome = excluded.outcome, initiated_at = least(s.initiated_at, excluded.initiated_at),
  answered_at = excluded.answered_at, ended_at = excluded.ended_at, duration_seconds = excluded.duration_seconds,
  recording_url = excluded.recording_url, conversation_stage = excluded.conversation_stage,
  collected_data = excluded.collected_data, objections_encountered = excluded.objections_encountered,
  full_transcript = excluded.full_transcript, turn_count = excluded.turn_count, expected_turns = excluded.expected_turns,
  complete = excluded.complete, end_reason = excluded.end_reason, meta = excluded.meta,
  last_event_at = greatest(s.last_event_at, excluded.last_event_at),
  finalized_at = excluded.finalized_at
WHERE (
  s.provider, s.direction, s.from_number, s.to_number, s.status, s.outcome, s.initiated_at, s.answered_at, s.ended_at,
  s.duration_seconds, s.recording_url, s.conversation_stage, s.collected_data, s.objections_encountered, s.full_transcript,
  s.turn_count, s.expected_turns, s.complete, s.end_reason, s.meta, s.last_event_at, s.finalized_at IS NULL
) IS DISTINCT FROM (
  excluded.provider, excluded.direction, excluded.from_number, excluded.to_number, excluded.status, excluded.outcome,
  least(s.initiated_at, excluded.initiated_at), excluded.answered_at, excluded.ended_at, excluded.duration_seconds,
  excluded.recording_url, excluded.conversation_stage, excluded.collected_data, excluded.objections_encountered,
  excluded.full_transcript, excluded.turn_count, excluded.expected_turns, excluded.complete, excluded.end_reason,
  excluded.meta, greatest(s.last_event_at, excluded.last_event_at), excluded.finalized_at IS NULL
)
-- For the metrics: which calls are final now, what became of them, and whether a turn is known to be missing.
RETURNING CASE WHEN s.finalized_at IS NOT NULL THEN s.call_sid END AS final, s.complete IS FALSE AS incomplete,
  CASE WHEN s.outcome IS NULL THEN 'none' WHEN s.outcome IN ('no_answer', 'error', 'disconnected') THEN s.outcome ELSE 'other' END AS outcome
