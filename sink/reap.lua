#!lua flags=allow-oom
-- reap: calls that are presumed over (silent for too long, or their connection did not come back) get the `call.ended`
-- that nobody sent, in their stream, so that they end on the same way as all others.
--
-- KEYS  [1] wake channel
--       then for each partition: ready, leased, open
-- ARGV  [1] most calls to reap
--       then for each partition: stream key prefix, session key prefix
--       then, if not all that are due may be reaped: `among`, the call_sids of those that may
-- Reply {call_sid …} reaped
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local left = tonumber(ARGV[1])
-- The same as END_STATUSES in shared/events.ts.
local END_STATUS = { completed = true, busy = true, failed = true, ['no-answer'] = true, canceled = true }
local partitions = (#KEYS - 1) / 3
local reaped, woken = {}, {}

local among = ARGV[2 * partitions + 2] and {} -- a set
for a = 2 * partitions + 3, #ARGV do among[ARGV[a]] = true end

for p = 1, partitions do
  local ready, leased, open = KEYS[3 * p - 1], KEYS[3 * p], KEYS[3 * p + 1]
  local due, sids = redis.call('ZRANGE', open, '-inf', '(' .. now, 'BYSCORE', 'LIMIT', 0, left), {}
  for _, sid in ipairs(due) do
    if not among or among[sid] then sids[#sids + 1] = sid end
  end
  for _, sid in ipairs(sids) do
    local session_key = ARGV[2 * p + 1] .. sid
    local session = redis.pcall('HMGET', session_key, 'connection', 'status')
    -- What the call looked like when it was last heard of is why it is presumed over.
    local reason = END_STATUS[session[2]] and session[2] or session[1] == 'disconnected' and 'disconnected' or 'abandoned'
    -- A stream that is gone is not made anew; a key that is not ours any more must not stop the calls behind it.
    local id = redis.pcall('XADD', ARGV[2 * p] .. sid, 'NOMKSTREAM', '*', 'e',
      '{"type":"call.ended","call_sid":"' .. sid .. '","source":"calltape","reason":"' .. reason .. '"}')
    -- A stream that a Cluster just moves to another node can be asked the next time.
    local is_gone = not id or string.find(id.err or '', 'WRONGTYPE', 1, true)
    if type(id) == 'string' or is_gone then redis.call('ZREM', open, sid) end
    if type(id) == 'string' then
      -- Presumed for its silence alone: then append.lua brings it back should it go on.
      if reason == session[2] then
        redis.pcall('HSET', session_key, 'ended', '1', 'reason', reason)
      else
        redis.pcall('HSET', session_key, 'ended', 'presumed', 'presumed', '1', 'reason', reason)
      end
      if not redis.call('ZSCORE', leased, sid) then redis.call('ZADD', ready, 'NX', now, sid) end
      reaped[#reaped + 1] = sid
    end
  end
  if #sids > 0 then woken[#woken + 1] = string.match(ready, '{(%d+)}') end
  left = left - #due
  if left <= 0 then break end
end
if #woken > 0 then redis.call('SPUBLISH', KEYS[1], table.concat(woken, ',')) end
return reaped
