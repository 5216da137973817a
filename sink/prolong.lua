#!lua flags=allow-oom
-- prolong: a batch takes longer than its leases last, and its sink is alive. Gives all of them a new deadline.
--
-- KEYS  for each call: leased
-- ARGV  [1] the leases' token (their deadline)  [2] how long they are to last from now, ms
--       then for each call: call_sid
-- Reply the new deadline, which is their token from now on; a lease that had lapsed and is another's now stays as it is
local time = redis.call('TIME')
local deadline = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[2])
for c, leased in ipairs(KEYS) do
  local sid = ARGV[2 + c]
  if redis.call('ZSCORE', leased, sid) == ARGV[1] then redis.call('ZADD', leased, deadline, sid) end
end
return deadline
