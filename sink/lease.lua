#!lua flags=allow-oom
-- (allow-oom, here and in the sink's other scripts: a full Redis must still be emptied into PostgreSQL.)
-- lease: takes ready calls for one sink until they hold enough, and says where to read on in each.
--
-- KEYS  for each partition: ready, leased, ended
-- ARGV  [1] most calls  [2] most entries  [3] most bytes (at least one call is leased, however much it holds)
--       [4] how long the lease lasts, ms
--       then for each partition: stream key prefix, session key prefix
-- Reply {deadline of these leases (ms; the token to settle with),
--        {partition index from 1, call_sid, cursor (last entry committed), entries waiting,
--         entries read so far (-1: Redis cannot say), 1 if the call was finalized before, its lapses (deliveries that came
--         to nothing), when its oldest waiting entry arrived (ms), bytes an entry has on average,
--         the entry that was being tried alone when the last lease of it lapsed, '' for none} for each call,
--        {indexes of partitions that may have more ready calls},
--        {call_sid of ready calls whose stream is gone, with all that waited in it}}
-- A call with lapses is leased by itself, so that whatever it does to its sink it does not do to its neighbours.
local time = redis.call('TIME')
local deadline = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[4])
local calls_left, entries_left, bytes_left = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
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

for p = 1, #KEYS / 3 do
  local ready, leased, ended = KEYS[3 * p - 2], KEYS[3 * p - 1], KEYS[3 * p]
  while true do
    if calls_left <= 0 or entries_left <= 0 or bytes_left <= 0 then
      if redis.call('EXISTS', ready) == 1 then more[#more + 1] = p end
      break
    end
    local popped = redis.call('ZPOPMIN', ready)
    local sid = popped[1]
    if not sid then break end
    local session = redis.pcall('HMGET', ARGV[4 + 2 * p] .. sid, 'bytes', 'lapses', 'alone')
    local lapses = tonumber(session[2] or 0)
    if lapses > 0 and #leases > 0 then
      redis.call('ZADD', ready, popped[2], sid)
      calls_left = 0
    else
      local cursor, read, waiting = progress(ARGV[3 + 2 * p] .. sid)
      if cursor then
        redis.call('ZADD', leased, deadline, sid)
        local bytes_an_entry = math.ceil(tonumber(session[1] or 0) / math.max(1, read + waiting))
        leases[#leases + 1] = {
          p, sid, cursor, waiting, read, redis.call('ZSCORE', ended, sid) and 1 or 0, lapses, popped[2], bytes_an_entry,
          session[3] or '',
        }
        calls_left = lapses > 0 and 0 or calls_left - 1
        entries_left = entries_left - waiting
        bytes_left = bytes_left - waiting * bytes_an_entry
      else
        gone[#gone + 1] = sid
      end
    end
  end
end
return { deadline, leases, more, gone }
