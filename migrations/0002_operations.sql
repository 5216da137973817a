-- Up Migration

-- An operator may give up a quarantined entry: its data goes, but that it was there, and why, stays known.
ALTER TABLE quarantined_events ADD COLUMN dropped_at timestamptz;

-- The live calls, for what has to find them among all there ever were. Updates of a live row leave it alone.
CREATE INDEX call_sessions_live ON call_sessions (call_sid) WHERE finalized_at IS NULL;

-- Down Migration

DROP INDEX call_sessions_live;
ALTER TABLE quarantined_events DROP COLUMN dropped_at;
