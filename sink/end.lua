#!lua flags=allow-oom
-- end: a call that PostgreSQL has as live, and Redis has forgotten (it was flushed, or lost its last writes), gets the
-- `call.ended` that nobody will ever send, in a stream made anew, so that it ends on the same way as all others.
--
-- KEYS  [1] wake channel  [2] ready  [3] leased  [4] open  [5] ended  [6] stream  [7] session
-- ARGV  [1] call_sid  [2] its partition's number
-- Reply 1, or 0 if Redis knows the call after all: then its end comes, or is there already
-- include sink/group.lua
local sid = ARGV[1]
for list = 2, 5 do
  if redis.call('ZSCORE', KEYS[list], sid) then return 0 end
end
-- It got its end before, and that came to nothing (it is in quarantine): one is enough.
if redis.pcall('HGET', KEYS[7], 'ended') == 'presumed' then return 0 end
local id = redis.pcall('XADD', KEYS[6], '*', 'e',
  '{"type":"call.ended","call_sid":"' .. sid .. '","source":"calltape","reason":"abandoned"}')
if type(id) == 'table' then return 0 end -- a key that is not ours
redis.pcall('XGROUP', 'CREATE', KEYS[6], 'sink', '0')
redis.pcall('HSET', KEYS[7], 'ended', 'presumed', 'presumed', '1', 'reason', 'abandoned')
-- Mostly it is this entry alone that waits; but of a call that has merely fallen out of all lists older ones may.
redis.call('ZADD', KEYS[2], waiting_since(KEYS[6], cursor_of(KEYS[6])) or string.match(id, '^%d+'), sid)
redis.call('SPUBLISH', KEYS[1], ARGV[2])
return 1
