#!lua flags=no-writes,allow-oom
-- backlog: how many calls wait in some partitions and since when, and which ones behind.lua is to look into. Reads no stream.
--
-- KEYS  for each partition: ready, leased, open, ended
-- ARGV  [1] most ready calls to name in a partition: where there are more, evenly spaced by how long they have been waiting
-- Reply {Redis' clock (ms),
--        {number of ready calls, of leased, of open, of ended ones,
--         when the oldest entry of a ready call arrived (ms), '' for none,
--         {call_sid of every leased call}, {call_sid of ready calls}} for each partition}
-- That ready and leased calls are read together is what makes the lag exact: a call with something that is not committed is in
-- one of the two at every moment.
local time = redis.call('TIME')
local most = tonumber(ARGV[1])
local partitions = {}

local function ready_calls(ready, count)
  if count <= most then return redis.call('ZRANGE', ready, 0, -1) end
  local sids = {}
  for i = 0, most - 1 do
    local rank = math.floor((i + 0.5) * count / most)
    sids[#sids + 1] = redis.call('ZRANGE', ready, rank, rank)[1]
  end
  return sids
end

for k = 1, #KEYS, 4 do
  local ready, leased = KEYS[k], KEYS[k + 1]
  local count = redis.call('ZCARD', ready)
  partitions[#partitions + 1] = {
    count, redis.call('ZCARD', leased), redis.call('ZCARD', KEYS[k + 2]), redis.call('ZCARD', KEYS[k + 3]),
    redis.call('ZRANGE', ready, 0, 0, 'WITHSCORES')[2] or '',
    redis.call('ZRANGE', leased, 0, -1), ready_calls(ready, count),
  }
end
return { time[1] * 1000 + math.floor(time[2] / 1000), partitions }
