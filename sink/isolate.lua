#!lua flags=allow-oom
-- isolate: a call that came to nothing too often is tried entry by entry. Before each one, what lies before it is committed;
-- the cursor moves up to it, and the session says which entry is being tried: should it kill its sink, the next one knows.
--
-- KEYS  leased, open, ended, stream, session, wake channel (see shared/script.ts)
-- ARGV  [1] the lease's token  [2] call_sid  [3] last entry committed  [4] entries read up to there (-1: unknown)
--       [5] the entry that is tried next  [6] 1 if the call is finalized by what is committed, else 0
-- Reply 1, or 0 if the lease had lapsed: then nothing was done, and nothing may be tried
-- include sink/group.lua
local leased, open, ended, stream, session = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local sid, last, read = ARGV[2], ARGV[3], ARGV[4]
if redis.call('ZSCORE', leased, sid) ~= ARGV[1] then return 0 end
set_cursor(stream, last, read)
-- Its end is behind the cursor now, where no later lease would see it. (As in settle.lua: unless it has come back.)
if ARGV[6] == '1' and not (redis.call('ZSCORE', open, sid) and not redis.pcall('HGET', session, 'ended')) then
  local time = redis.call('TIME')
  redis.call('ZREM', open, sid)
  redis.call('ZADD', ended, 'NX', time[1] * 1000 + math.floor(time[2] / 1000), sid)
  redis.pcall('HSETNX', session, 'ended', 'presumed') -- as in settle.lua; whatever ended it, what goes on is open again
end
redis.pcall('HSET', session, 'alone', ARGV[5])
return 1
