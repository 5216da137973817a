#!lua flags=allow-oom
-- (allow-oom, here and in the sink's other scripts: a full Redis must still be emptied into PostgreSQL.)
-- lease: takes ready calls for one sink until they hold enough, and says where to read on in each.
--
-- KEYS  for each partition: ready, leased, ended
-- ARGV  [1] most calls  [2] most entries  [3] most bytes (at least one call is leased, however much it holds)
--       [4] how long the lease lasts, ms  [5] most entries of one call that are read at once: a call counts for no more
--       then for each partition: stream key prefix, session key prefix
-- Reply {deadline of these leases (ms; the token to settle with),
--        {partition index from 1, call_sid, cursor (last entry committed), entries waiting,
--         entries read so far (-1: Redis cannot say), 1 if the call was finalized before, its lapses (deliveries that came
--         to nothing), when its oldest waiting entry arrived (ms), bytes an entry has on average,
--         the entry that was being tried alone when the last lease of it lapsed, '' for none,
--         1 if it was ever presumed over} for each call,
--        {indexes of partitions that may have more ready calls},
--        {call_sid of ready calls whose stream is gone, with all that waited in it}}
-- Of the calls with lapses, one is leased, that with the fewest: whatever such a call does to its sink, the innocent ones
-- among them get through before it.
local MOST_ASIDE = 100 -- that are looked at for it
local time = redis.call('TIME')
local deadline = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[4])
local calls_left, entries_left, bytes_left = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local most_of_a_call = tonumber(ARGV[5])
local leases, more, gone = {}, {}, {}

-- Progress of group `sink`: cursor, entries read, entries waiting. A lost group is made again from the start: rows are
-- idempotent, so reading a call twice is safe and skipping is not. Nil when there is no such stream.
local function progress(stream)
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if groups.err then return nil end
  for _, g in ipairs(groups) do
    local info = {}
    for i = 1, #g, 2 do info[g[i]] = g[i + 1] end
    if info.name == 'sink' then
      local cursor = info['last-delivered-id']
      -- A group that has not moved yet has no count of entries read: it is 0.
      return cursor, info['entries-read'] or (cursor == '0-0' and 0 or -1), info.lag or redis.call('XLEN', stream)
    end
  end
  redis.call('XGROUP', 'CREATE', stream, 'sink', '0')
  return '0-0', 0, redis.call('XLEN', stream)
end

local function lease(p, sid, since, session, lapses)
  local cursor, read, waiting = progress(ARGV[4 + 2 * p] .. sid)
  if not cursor then
    gone[#gone + 1] = sid
    return
  end
  redis.call('ZADD', KEYS[3 * p - 1], deadline, sid)
  local bytes_an_entry = math.ceil(tonumber(session[1] or 0) / math.max(1, read + waiting))
  local finalized = redis.call('ZSCORE', KEYS[3 * p], sid) and 1 or 0
  leases[#leases + 1] = {
    p, sid, cursor, waiting, read, finalized, lapses, since, bytes_an_entry, session[3] or '', session[4] and 1 or 0,
  }
  waiting = math.min(waiting, most_of_a_call)
  calls_left = calls_left - 1
  entries_left = entries_left - waiting
  bytes_left = bytes_left - waiting * bytes_an_entry
end

local aside = {}
for p = 1, #KEYS / 3 do
  local ready = KEYS[3 * p - 2]
  while true do
    if calls_left <= 0 or entries_left <= 0 or bytes_left <= 0 or #aside >= MOST_ASIDE then
      if redis.call('EXISTS', ready) == 1 then more[#more + 1] = p end
      break
    end
    local popped = redis.call('ZPOPMIN', ready)
    local sid, since = popped[1], popped[2]
    if not sid then break end
    local session = redis.pcall('HMGET', ARGV[5 + 2 * p] .. sid, 'bytes', 'lapses', 'alone', 'presumed')
    local lapses = tonumber(session[2] or 0)
    if lapses == 0 then
      lease(p, sid, since, session, 0)
    else
      aside[#aside + 1] = { p, sid, since, session, lapses }
    end
  end
end
table.sort(aside, function(a, b) return a[5] < b[5] end)
for i, call in ipairs(aside) do
  if i == 1 then
    lease(unpack(call))
  else
    redis.call('ZADD', KEYS[3 * call[1] - 2], call[3], call[2])
    more[#more + 1] = call[1]
  end
end
return { deadline, leases, more, gone }
