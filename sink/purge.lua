#!lua flags=allow-oom
-- purge: what PostgreSQL (and the archive) has of a final call goes from Redis, all of it at once or nothing.
--
-- KEYS  for each call: ready, leased, open, ended, kept, stream, session
-- ARGV  for each call: call_sid
--                      its claim's token
--                      the last entry that is known to be committed (and archived), '' for a call that had no stream
-- Reply for each call: what became of it: `purged`; or why all of it stays:
--         `claim`: it is another sink's, or began its retention anew; `busy`: it waits for a sink, is with one, or is open;
--         `added`: something came behind that entry; `cursor`: not all of it is committed
-- include sink/group.lua
local function why_it_stays(k, sid, token, last)
  if redis.call('ZSCORE', KEYS[k + 3], sid) ~= token then return 'claim' end
  for list = k, k + 2 do
    if redis.call('ZSCORE', KEYS[list], sid) then return 'busy' end
  end
  local stream = KEYS[k + 5]
  if last == '' then return redis.call('EXISTS', stream) == 1 and 'added' end
  -- (Nil when it is gone, or not ours: not what was looked at.)
  if named(redis.pcall('XINFO', 'STREAM', stream))['last-generated-id'] ~= last then return 'added' end
  return cursor_of(stream) ~= last and 'cursor'
end

local outcomes = {}
for c = 0, #KEYS / 7 - 1 do
  local k = 7 * c + 1
  local sid = ARGV[3 * c + 1]
  local why = why_it_stays(k, sid, ARGV[3 * c + 2], ARGV[3 * c + 3])
  if not why then
    redis.call('UNLINK', KEYS[k + 5], KEYS[k + 6])
    redis.call('ZREM', KEYS[k + 3], sid)
    redis.call('ZREM', KEYS[k + 4], sid)
  end
  outcomes[#outcomes + 1] = why or 'purged'
end
return outcomes
