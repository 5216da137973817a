#!lua flags=allow-oom
-- announce: a sink says that it lives and can store, or that it leaves, and learns who else does.
--
-- KEYS  [1] the sinks that share the work
-- ARGV  [1] the sink's id  [2] for how long that holds, ms; 0: it leaves
-- Reply {the ids of all that share it}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ms = tonumber(ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. now)
if ms > 0 then
  redis.call('ZADD', KEYS[1], now + ms, ARGV[1])
else
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return redis.call('ZRANGE', KEYS[1], 0, -1)
