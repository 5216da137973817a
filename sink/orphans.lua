#!lua flags=allow-oom
-- orphans: looks at what is called like a call, says which of it nobody works on, and on demand makes it somebody's again.
-- All lists are read in one moment with the key, so that nothing which merely moves between them is taken for an orphan.
--
-- KEYS  [1] wake channel
--       then for each call: ready, leased, open, ended, stream, session
-- ARGV  [1] `look` or `adopt`  [2] for `adopt`: ms after which an adopted call that has no end is presumed over
--       then for each call: call_sid
--                           the key that was found: `stream` or `session`
--                           1 to measure the memory of both of its keys, else 0 (with `stream`)
-- Reply for each call: {what it is: '' for no orphan, `none` when the key is gone, else as in ORPHAN_KINDS of sink/orphans.ts;
--                       bytes}
--       `adopt` replies what it was; it is not changed where it is `foreign`, or a `lost_stream` that has not ended
-- include sink/group.lua
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local adopting, idle = ARGV[1] == 'adopt', tonumber(ARGV[2])
local woken = {}

-- What it is, and the sinks' cursor where there is one.
local function judge(k, sid, found)
  local function is_in(list) return redis.call('ZSCORE', KEYS[k + list], sid) end
  local stream, session = KEYS[k + 4], KEYS[k + 5]
  local type_of = redis.call('TYPE', found == 'stream' and stream or session).ok
  if type_of == 'none' then return 'none' end
  if type_of ~= (found == 'stream' and 'stream' or 'hash') then return 'foreign' end
  if found == 'session' then
    if redis.call('EXISTS', stream) == 1 or is_in(0) or is_in(1) or is_in(2) or is_in(3) then return '' end
    return 'lost_stream'
  end
  if is_in(0) or is_in(1) then return '' end -- the sink that has it next makes the group, should there be none
  local cursor = cursor_of(stream)
  if not cursor then return 'no_group' end
  if cursor ~= named(redis.call('XINFO', 'STREAM', stream))['last-generated-id'] then return 'unread', cursor end
  return (is_in(2) or is_in(3)) and '' or 'unended', cursor
end

local function adopt(k, sid, kind, cursor)
  local ready, open, ended, stream, session = KEYS[k], KEYS[k + 2], KEYS[k + 3], KEYS[k + 4], KEYS[k + 5]
  local said = redis.pcall('HGET', session, 'ended')
  local has_ended = type(said) == 'string'
  if kind == 'unread' or kind == 'no_group' then
    redis.call('ZADD', ready, waiting_since(stream, cursor) or now, sid)
    woken[#woken + 1] = string.match(ready, '{(%d+)}')
  end
  -- Final, or to be so by what is read of it now: its retention begins. PostgreSQL is asked before anything is removed.
  if has_ended then
    redis.call('ZADD', ended, 'NX', now, sid)
  elseif kind ~= 'lost_stream' then
    redis.call('ZADD', open, 'NX', now + idle, sid)
  end
end

local function bytes_of(k)
  return (redis.call('MEMORY', 'USAGE', KEYS[k + 4]) or 0) + (redis.call('MEMORY', 'USAGE', KEYS[k + 5]) or 0)
end

local looks = {}
for c = 0, (#KEYS - 1) / 6 - 1 do
  local k, a = 2 + 6 * c, 3 + 3 * c
  local kind, cursor = judge(k, ARGV[a], ARGV[a + 1])
  looks[#looks + 1] = { kind, ARGV[a + 2] == '1' and bytes_of(k) or 0 }
  if adopting and kind ~= '' and kind ~= 'none' and kind ~= 'foreign' then adopt(k, ARGV[a], kind, cursor) end
end
if #woken > 0 then redis.call('SPUBLISH', KEYS[1], table.concat(woken, ',')) end
return looks
