-- Up Migration

-- A reason in small letters, '-' between its words and around it, whatever its separators were. As ASCII: in a Turkish database, an I
-- is no i.
CREATE FUNCTION reason_words(reason text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN '-' || translate(lower(reason COLLATE "C"), ' _.:,;/()', '---------') || '-';

-- What became of a call that is over. Pure, and a single expression: the planner puts it into the fold. (With LIKE: a regular
-- expression for each rule costs ten times as much.)
--
-- verdict      what the bot itself said (`outcome` of call.ended)
-- status       the call's final status                          reason          why it ended, in its provider's or bot's words
-- answered     somebody took the call                           agent_spoke, customer_spoke   whether there is a turn that says something
-- A null boolean is a false one. The first row that holds counts.
--
-- Reasons are free text, and every provider has its own words. What names a call that never came about is looked for only where
-- the customer has said nothing: who has spoken has answered, and a bot's `customer_busy` or `verification_failed` then tells of
-- the conversation.
CREATE FUNCTION call_outcome(
  verdict text, status text, reason text, answered boolean, agent_spoke boolean, customer_spoke boolean
) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN CASE
  -- The bot was there.
  WHEN btrim(verdict, E' \t\n\r') <> ''
    THEN verdict
  -- Its provider knows that the call never came about.
  WHEN status IN ('busy', 'no-answer')
    THEN 'no_answer'
  WHEN status = 'failed'
    THEN 'error'
  -- Called off: as a rule while it rang; if not, in the middle of the conversation.
  WHEN status = 'canceled' AND customer_spoke IS NOT TRUE
    THEN 'no_answer'
  WHEN status = 'canceled'
    THEN 'disconnected'
  -- A machine took the call. What it announced may have become customer turns.
  WHEN reason_words(reason) LIKE ANY (ARRAY[
      '%-voicemail%', '%-voice-mail%', '%-answering-machine%', '-machine%', '%-ivr-reached-%'])
    THEN 'no_answer'
  -- Something broke, or the provider put an end to it, whatever had been said by then.
  WHEN reason_words(reason) LIKE ANY (ARRAY[
      '%-error-%', '%-errors-%', '%-failure-%', '-failed-', '-failed--%', '%-failed-to-connect-%', '%-call-failed-%',
      '%-connection-failed-%', '%-request-failed-%', '%-generation-failed-%', '-pipeline-%', '%-worker-shutdown-%',
      '%-concurrency-limit-%', '%-quota-limit-%', '%-exceeded-quota-%', '%-no-valid-payment-%', '%-scam-detected-%'])
    THEN 'error'
  -- Nobody was reached.
  WHEN customer_spoke IS NOT TRUE AND reason_words(reason) LIKE ANY (ARRAY[
      '%no-answer%', '%noanswer%', '%not-answer%', '%n''t-answer%', '%unanswered%', '%-no-response%', '%-no-user-response%',
      '%busy%', '%rejected%', '%declined%', '%-absent-%'])
    THEN 'no_answer'
  -- Nobody could be reached: a wrong number, a network without a way to it, an account or an assistant that is not set up.
  WHEN customer_spoke IS NOT TRUE AND reason_words(reason) LIKE ANY (ARRAY[
      '%fail%', '%invalid%', '%not-found%', '%not-valid%', '%not-provided%', '%not-registered%', '%-no-assistant%', '%-no-route%',
      '%-no-server%', '%-no-concurrency%', '%misdial%', '%unallocated%', '%-provider-unavailable-%', '%-service-unavailable-%',
      '%-out-of-order-%', '%-out-of-service-%', '%-out-of-credits%', '%-account-limit-%', '%-daily-limit-%', '%-dial-limit-%',
      '%-barred-%', '%congestion%', '%-denied-%', '%forbidden%', '%incompatible%', '%-marked-as-spam-%'])
    THEN 'error'
  -- Hung up before the customer had said a word, or the connection was lost.
  WHEN customer_spoke IS NOT TRUE AND agent_spoke
    THEN 'no_answer'
  WHEN customer_spoke IS NOT TRUE AND answered IS NOT TRUE
    THEN 'no_answer'
  -- Dropped mid-way: nobody ended it. A call that went silent counts, whoever noticed; one that reached its longest duration does not.
  WHEN reason_words(reason) LIKE ANY (ARRAY[
      '-abandoned-', '-disconnected-', '-vonage-disconnected-', '-inactivity-', '%-silence-time%', '%-inactivity-time%',
      '%-idle-time%', '%-media-time%', '%-call-dropped-%', '%-line-dropped-%', '%-connection-dropped-%', '%-connection-reset-%',
      '%-connection-lost-%', '%-lost-connection-%', '%-closed-websocket-%'])
    THEN 'disconnected'
  -- Over in the usual way, or without a transcript to judge by: nobody has said what came of it.
END;

-- A provider may number more than a call's turns with their seq: each message of a transcription, say, and from the start again
-- when it is started again. Gaps between turns then prove nothing. Such an event that is no turn is marked, in its meta:
--   "sequence": {"of": the sequence's name, "at": its number, "starts": true, "ends": true, "dense": true}
-- `starts`, `ends`: nothing of the sequence is before it, behind it. `dense`: each number between is a turn's or a mark's. A turn
-- of the sequence has the id <of>-<at>. Anybody may write anything into meta: what reads otherwise marks nothing.

-- How many sequences there are, null if none.
CREATE FUNCTION sequences_of(marks jsonb[]) RETURNS integer LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE RETURN (
  SELECT nullif(count(DISTINCT mark->>'of'), 0)::integer FROM unnest(marks) AS m(mark) WHERE jsonb_typeof(mark->'of') = 'string'
);

-- Of a call's only sequence: false if a number is missing, true if none is, null if that cannot be told: it is not dense, its start
-- or end is not known, or there are turns beyond these, or of another origin.
CREATE FUNCTION sequence_is_whole(marks jsonb[], turn_ids text[]) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN (
  WITH marked AS (
    SELECT mark->>'of' AS name, mark->'starts' = 'true' AS starts, mark->'ends' = 'true' AS ends, mark->'dense' = 'true' AS dense,
      CASE WHEN jsonb_typeof(mark->'at') = 'number' AND mark->>'at' ~ '^[0-9]{1,9}$' THEN (mark->>'at')::integer END AS number
    FROM unnest(marks) AS m(mark) WHERE jsonb_typeof(mark->'of') = 'string'
  ), bounds AS (
    SELECT min(name) AS name, min(number) FILTER (WHERE starts) AS first, max(number) FILTER (WHERE ends) AS last FROM marked
    HAVING bool_and(dense)
  ), numbers AS (
    SELECT number FROM marked
    UNION ALL
    SELECT CASE WHEN starts_with(id, name || '-') AND substr(id, length(name) + 2) ~ '^[0-9]{1,9}$'
                THEN substr(id, length(name) + 2)::integer END
    FROM bounds, unnest(turn_ids) AS t(id)
  )
  SELECT CASE
    WHEN count(DISTINCT number) FILTER (WHERE number BETWEEN first AND last) <= last - first THEN false
    WHEN bool_and(number IS NOT NULL AND number BETWEEN first AND last) THEN true
  END
  FROM bounds, numbers WHERE first <= last GROUP BY first, last
);

-- Final calls whose row in the table of LEGACY_CALL_SESSIONS could not be filled when they were written: it was locked. Any sink that
-- fills that table takes them from here, those first that have waited longest.
CREATE TABLE legacy_held (
  call_sid text COLLATE "C" PRIMARY KEY,
  held_at  timestamptz NOT NULL DEFAULT now() -- when it was last tried
);

-- Down Migration

DROP TABLE legacy_held;
DROP FUNCTION sequence_is_whole, sequences_of, call_outcome, reason_words;
