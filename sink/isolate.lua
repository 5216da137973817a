#!lua flags=allow-oom
-- isolate: a call that came to nothing too often is tried entry by entry. Before each one, what lies before it is committed;
-- the cursor moves up to it, and the session says which entry is being tried: should it kill its sink, the next one knows.
--
-- KEYS  leased, stream, session
-- ARGV  [1] the lease's token  [2] call_sid  [3] last entry committed  [4] entries read up to there (-1: unknown)
--       [5] the entry that is tried next
-- Reply 1, or 0 if the lease had lapsed: then nothing was done, and nothing may be tried
if redis.call('ZSCORE', KEYS[1], ARGV[2]) ~= ARGV[1] then return 0 end
if ARGV[4] == '-1' then
  redis.pcall('XGROUP', 'SETID', KEYS[2], 'sink', ARGV[3])
else
  redis.pcall('XGROUP', 'SETID', KEYS[2], 'sink', ARGV[3], 'ENTRIESREAD', ARGV[4])
end
redis.pcall('HSET', KEYS[3], 'alone', ARGV[5])
return 1
