#!lua flags=allow-oom
-- claim: takes calls whose retention is over for one sink, which asks PostgreSQL (and archives them) before it purges them.
-- A claim moves a call on in `ended`, so that it comes up again when the claim lapses; its new score is the claim's token.
--
-- KEYS  for each partition: ready, leased, open, ended, kept
--       last: the wake channel; so a slot that is on its way to another server is not looked into (shared/script.ts)
-- ARGV  [1] most calls  [2] retention, ms  [3] how long the claim lasts, ms
--       then for each partition: stream key prefix, session key prefix
-- Reply {{partition index from 1, call_sid, token,
--         first entry ('' when there is none),
--         last entry (the stream's last-generated-id; '' when there is no stream: then there is nothing left to lose),
--         entries, bytes of their JSON,
--         '' if all of it is committed; `busy`: a sink or a producer is at it; `uncommitted`: nobody is} for each call,
--        calls kept in all these partitions}
-- include sink/group.lua
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local left, retention = tonumber(ARGV[1]), tonumber(ARGV[2])
local token = now + tonumber(ARGV[3]) - retention
local claimed, kept = {}, 0

local function look_at(stream, session, p, sid)
  local bytes = redis.pcall('HGET', session, 'bytes')
  bytes = type(bytes) == 'string' and tonumber(bytes) or 0
  for list = 5 * p - 4, 5 * p - 2 do
    if redis.call('ZSCORE', KEYS[list], sid) then return '', '', 0, 0, 'busy' end
  end
  if redis.call('EXISTS', stream) == 0 then return '', '', 0, 0, '' end
  local info = named(redis.pcall('XINFO', 'STREAM', stream))
  local last = info['last-generated-id']
  if not last then return '', '', 0, 0, 'uncommitted' end -- a key that is not ours
  local first = info['first-entry'] and info['first-entry'][1] or ''
  return first, last, info.length, bytes, cursor_of(stream) == last and '' or 'uncommitted'
end

for p = 1, (#KEYS - 1) / 5 do
  local ended, kept_calls = KEYS[5 * p - 1], KEYS[5 * p]
  -- What is in `kept` and was not tried again in time is not past its retention any more, or gone.
  redis.call('ZREMRANGEBYSCORE', kept_calls, '-inf', now - 3600000)
  kept = kept + redis.call('ZCARD', kept_calls)
  if left > 0 then
    local sids = redis.call('ZRANGE', ended, '-inf', now - retention, 'BYSCORE', 'LIMIT', 0, left)
    left = left - #sids
    for _, sid in ipairs(sids) do
      redis.call('ZADD', ended, token, sid)
      local first, last, entries, bytes, why = look_at(ARGV[2 + 2 * p] .. sid, ARGV[3 + 2 * p] .. sid, p, sid)
      claimed[#claimed + 1] = { p, sid, token, first, last, entries, bytes, why }
    end
  end
end
return { claimed, kept }
