#!lua flags=no-writes,allow-oom
-- waiting: for how long the oldest ready call of some partitions has been waiting. Reads no stream.
--
-- KEYS  for each partition: ready
-- Reply for each partition: ms; -1 where no call is ready
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local waiting = {}
for p = 1, #KEYS do
  local oldest = redis.call('ZRANGE', KEYS[p], 0, 0, 'WITHSCORES')[2]
  waiting[p] = oldest and math.max(0, now - tonumber(oldest)) or -1
end
return waiting
