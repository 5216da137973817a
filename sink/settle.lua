#!lua flags=allow-oom
-- settle: what was leased is committed in PostgreSQL. Moves each call's cursor, ends its lease, and makes it ready again
-- if it has more. The holder of a lapsed lease moves and releases nothing: the call is another's now, who reads the same
-- entries again and finds their rows there.
--
-- KEYS  [1] wake channel
--       then for each call: ready, leased, open, ended, stream, session
-- ARGV  [1] the leases' token (their deadline)
--       then for each call: call_sid
--                           last entry committed (the cursor as it was: the call is only given back)
--                           entries read by the group up to there (-1: unknown)
--                           1 if the call is finalized, else 0
--                           1 if its lapses are to be forgotten, else 0
-- Reply {number of leases that had lapsed, {partition numbers with calls that are ready again}}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lapsed, again, woken = 0, {}, {}

for c = 0, (#KEYS - 1) / 6 - 1 do
  local k, a = 2 + 6 * c, 2 + 5 * c
  local ready, leased, open, ended, stream = KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3], KEYS[k + 4]
  local sid, last, read = ARGV[a], ARGV[a + 1], ARGV[a + 2]
  if redis.call('ZSCORE', leased, sid) ~= ARGV[1] then
    lapsed = lapsed + 1
  else
    redis.call('ZREM', leased, sid)
    if read == '-1' then
      redis.pcall('XGROUP', 'SETID', stream, 'sink', last)
    else
      redis.pcall('XGROUP', 'SETID', stream, 'sink', last, 'ENTRIESREAD', read)
    end
    if ARGV[a + 4] == '1' then redis.pcall('HDEL', KEYS[k + 5], 'lapses') end
    -- A call that was presumed over may have come back meanwhile.
    if ARGV[a + 3] == '1' and not (redis.call('ZSCORE', open, sid) and not redis.pcall('HGET', KEYS[k + 5], 'ended')) then
      redis.call('ZREM', open, sid)
      redis.call('ZADD', ended, now, sid)
    end
    local news = redis.pcall('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)
    if news[1] then
      local partition = string.match(ready, '{(%d+)}')
      -- The entry's own time, so that the age of the oldest entry waiting stays exact.
      redis.call('ZADD', ready, string.match(news[1][1], '^%d+'), sid)
      if redis.call('ZCARD', ready) == 1 then woken[#woken + 1] = partition end
      again[#again + 1] = tonumber(partition)
    end
  end
end
if #woken > 0 then redis.call('SPUBLISH', KEYS[1], table.concat(woken, ',')) end
return { lapsed, again }
