-- Up Migration

-- Final calls by when they were finalized: for the dashboards, and whoever else asks for the last hours' calls. It costs one entry a
-- finalization (22 bytes), which is no HOT update anyway: call_sessions_live already loses an entry then.
CREATE INDEX call_sessions_finalized ON call_sessions (finalized_at) WHERE finalized_at IS NOT NULL;

-- Down Migration

DROP INDEX call_sessions_finalized;
