#!lua flags=allow-oom
-- keep: calls past their retention that have to stay. Each is moved on in `ended`, so that it does not stand before those
-- behind it, and is noted in `kept` until it is tried again.
--
-- KEYS  for each call: ended, kept
-- ARGV  [1] retention, ms  [2] in how many ms they are tried again
--       then for each call: call_sid, its claim's token
-- Reply how many were noted
local time = redis.call('TIME')
local again = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2])
local noted = 0
for c = 1, #KEYS / 2 do
  local sid, token = ARGV[1 + 2 * c], ARGV[2 + 2 * c]
  if redis.call('ZSCORE', KEYS[2 * c - 1], sid) == token then
    redis.call('ZADD', KEYS[2 * c - 1], again - tonumber(ARGV[1]), sid)
    redis.call('ZADD', KEYS[2 * c], again, sid)
    noted = noted + 1
  end
end
return noted
