-- Up Migration

-- Keys are compared byte by byte (COLLATE "C"): identifiers have no language, and a locale's comparison costs several
-- times as much at every index insertion. No foreign keys: a turn may be stored before its call's row is finished.

CREATE TABLE call_transcript_turns (
  call_sid     text COLLATE "C" NOT NULL,
  turn_id      text COLLATE "C" NOT NULL, -- the idempotency key: id, else seq, else the stream entry's id
  seq          integer,
  speaker      text NOT NULL,
  text         text NOT NULL,
  spoken_at    timestamptz NOT NULL,
  started_at   timestamptz,
  ended_at     timestamptz,
  confidence   real,
  language     text,
  interrupted  boolean,
  meta         jsonb,
  stream_id    text COLLATE "C" NOT NULL,
  ingested_at  timestamptz NOT NULL, -- the time in stream_id
  persisted_at timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (call_sid, turn_id)
);

-- What happened to a call besides its turns. call_sessions is folded from this and from the turns, so that it comes out
-- the same in whatever order, and however often, events arrive.
CREATE TABLE call_events (
  call_sid    text COLLATE "C" NOT NULL,
  event_id    text COLLATE "C" NOT NULL, -- the idempotency key: type and id, else the stream entry's id
  type        text NOT NULL,
  occurred_at timestamptz NOT NULL,
  event       jsonb NOT NULL,
  stream_id   text COLLATE "C" NOT NULL,
  ingested_at timestamptz NOT NULL,
  PRIMARY KEY (call_sid, event_id)
);

CREATE TABLE call_sessions (
  call_sid              text COLLATE "C" PRIMARY KEY,
  provider              text,
  direction             text,
  from_number           text,
  to_number             text,
  status                text,
  outcome               text,
  initiated_at          timestamptz,
  answered_at           timestamptz,
  ended_at              timestamptz,
  duration_seconds      integer,
  recording_url         text,
  conversation_stage    text,
  collected_data        jsonb,
  objections_encountered jsonb,
  full_transcript       jsonb, -- [{seq, speaker, text, timestamp}] in call order; null while the call is live
  turn_count            integer,
  expected_turns        integer,
  complete              boolean, -- true: proved that no turn is missing; false: proved that one is; null: no proof
  end_reason            text,
  meta                  jsonb,
  last_event_at         timestamptz,
  finalized_at          timestamptz  -- null while the call is live
) WITH (fillfactor = 80); -- rows are updated a few times in their life: room for it on the same page

CREATE TABLE quarantined_events (
  id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  stream_key     text NOT NULL,
  entry_id       text NOT NULL,
  reason         text NOT NULL,
  raw            bytea NOT NULL, -- as it was in the stream: it may be anything
  quarantined_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (stream_key, entry_id)
);

-- Down Migration

DROP TABLE quarantined_events, call_sessions, call_events, call_transcript_turns;
