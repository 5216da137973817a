#!lua flags=allow-oom
-- reclaim: calls whose lease has lapsed (their sink died, or hangs) become ready again, with all that was not committed.
--
-- KEYS  [1] wake channel
--       then for each partition: ready, leased
-- ARGV  [1] most calls to reclaim
--       then for each partition: stream key prefix, session key prefix
-- Reply {call_sid …} reclaimed
-- include sink/group.lua
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local left = tonumber(ARGV[1])
local reclaimed, woken = {}, {}

local function since(stream)
  local group, err = group_of(stream)
  return not err and waiting_since(stream, group and group['last-delivered-id']) or now
end

for p = 1, (#KEYS - 1) / 2 do
  local ready, leased = KEYS[2 * p], KEYS[2 * p + 1]
  local sids = redis.call('ZRANGE', leased, '-inf', '(' .. now, 'BYSCORE', 'LIMIT', 0, left)
  for _, sid in ipairs(sids) do
    redis.call('ZREM', leased, sid)
    -- Counted here and not by the sink: a count must survive an entry that kills the process.
    redis.pcall('HINCRBY', ARGV[1 + 2 * p] .. sid, 'lapses', 1)
    redis.call('ZADD', ready, since(ARGV[2 * p] .. sid), sid)
    reclaimed[#reclaimed + 1] = sid
  end
  if #sids > 0 then woken[#woken + 1] = string.match(ready, '{(%d+)}') end
  left = left - #sids
  if left <= 0 then break end
end
if #woken > 0 then redis.call('SPUBLISH', KEYS[1], table.concat(woken, ',')) end
return reclaimed
