#!lua flags=allow-oom
-- due: calls that are presumed over. PostgreSQL may have them as final already: their end went with their retention, and then
-- something came late. Those are not to be ended once more.
--
-- KEYS  [1] unused (all of the sinks' scripts begin with the wake channel)
--       then for each partition: ready, leased, open, ended
-- ARGV  `look`, most calls, then for each partition: stream key prefix
--       or `close`, by how many ms, then for each call: partition index from 1, call_sid, stream key, session key, the last entry
--       as `look` said
-- Reply to `look`: {partition index, call_sid, last entry; '' while a sink has yet to commit something; nil when there is nobody to
--         wait for (its stream is gone, say)} for each call that is due
--       to `close`: how many are closed. One of which something is not committed may go on: its end is put off, by so many ms
-- include sink/group.lua
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- The stream's last entry, if all is committed up to there; '' if that is to come.
local function committed_up_to(p, sid, stream)
  if redis.call('ZSCORE', KEYS[4 * p - 2], sid) or redis.call('ZSCORE', KEYS[4 * p - 1], sid) then return '' end
  local last = named(redis.pcall('XINFO', 'STREAM', stream))['last-generated-id']
  if cursor_of(stream) == last then return last end
end

if ARGV[1] == 'look' then
  local found, left = {}, tonumber(ARGV[2])
  for p = 1, (#KEYS - 1) / 4 do
    if left <= 0 then break end
    local sids = redis.call('ZRANGE', KEYS[4 * p], '-inf', '(' .. now, 'BYSCORE', 'LIMIT', 0, left)
    left = left - #sids
    for _, sid in ipairs(sids) do found[#found + 1] = { p, sid, committed_up_to(p, sid, ARGV[2 + p] .. sid) or false } end
  end
  return found
end

local closed = 0
for a = 3, #ARGV, 5 do
  local p, sid, stream, session, last = tonumber(ARGV[a]), ARGV[a + 1], ARGV[a + 2], ARGV[a + 3], ARGV[a + 4]
  local due = redis.call('ZSCORE', KEYS[4 * p], sid)
  if due and last ~= '' and committed_up_to(p, sid, stream) == last then
    redis.call('ZREM', KEYS[4 * p], sid)
    redis.call('ZADD', KEYS[4 * p + 1], now, sid)
    -- Not known is whether somebody ended it: should it go on, append.lua brings it back, and PostgreSQL says what it is then.
    redis.pcall('HSET', session, 'ended', 'presumed', 'presumed', '1')
    closed = closed + 1
  elseif due and tonumber(due) < now then
    redis.call('ZADD', KEYS[4 * p], now + tonumber(ARGV[2]), sid)
  end
end
return closed
