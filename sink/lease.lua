#!lua flags=allow-oom
-- (allow-oom, here and in the sink's other scripts: a full Redis must still be emptied into PostgreSQL.)
-- lease: takes ready calls for one sink until they hold enough, and says where to read on in each.
--
-- KEYS  for each partition: ready, leased, ended
--       last: the wake channel; so a slot that is on its way to another server is not looked into (shared/script.ts)
-- ARGV  [1] most calls  [2] most entries  [3] most bytes (at least one call is leased, however much it holds)
--       [4] how long the lease lasts, ms  [5] most entries of one call that are read at once: a call counts for no more
--       [6] lapses from which on a call is a suspect  [7] 1 if one of these may be leased, too, else 0
--       then for each partition: stream key prefix, session key prefix
-- Reply {deadline of these leases (ms; the token to settle with),
--        {partition index from 1, call_sid, cursor (last entry committed), entries waiting,
--         entries read so far (-1: Redis cannot say), 1 if the call was finalized before, its lapses (deliveries that came
--         to nothing), when its oldest waiting entry arrived (ms), bytes an entry has on average,
--         the entry that was being tried alone when the last lease of it lapsed, '' for none,
--         1 if it was ever presumed over, 1 if what is waiting is all that was added (0: nobody knows)} for each call,
--        {indexes of partitions that may have more ready calls},
--        {call_sid of ready calls whose stream is gone, with all that waited in it}}
-- Of the suspects, which may take their sink with them once more, one is leased at a time, that with the fewest lapses: so the
-- innocent ones among them get through first. A call leaves `ready` only when it is leased: whatever stops this script,
-- none of them is forgotten.
-- include sink/group.lua
local PAGE = 100
local MOST_LEFT = 1000 -- calls that are passed over in a partition
local time = redis.call('TIME')
local deadline = time[1] * 1000 + math.floor(time[2] / 1000) + tonumber(ARGV[4])
local deadline_text = string.format('%.0f', deadline) -- else Redis prints the number anew for each call
local calls_left, entries_left, bytes_left = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local most_of_a_call = tonumber(ARGV[5])
local suspect_lapses, may_take_suspect = tonumber(ARGV[6]), ARGV[7] == '1'
local leases, more, gone = {}, {}, {}

-- Progress of group `sink`: cursor, entries read, entries waiting, whether none that was added is missing there. A lost group is
-- made again from the start: rows are idempotent, so reading a call twice is safe and skipping is not. Else nil, and whether the
-- stream is gone: a Cluster that just moves it to another node cannot say, and it will be asked again.
local function progress(stream)
  local group, err = group_of(stream)
  if err then return nil, string.find(err, 'no such key', 1, true) or string.find(err, 'WRONGTYPE', 1, true) end
  if not group then
    redis.call('XGROUP', 'CREATE', stream, 'sink', '0')
    return '0-0', 0, redis.call('XLEN', stream)
  end
  local cursor = group['last-delivered-id']
  -- Where all that is left waits, as when more than was read has been trimmed away, newer servers count just what is left.
  local is_counted = group.lag and cursor ~= '0-0' and group.lag < redis.call('XLEN', stream)
  -- A group that has not moved yet has no count of entries read: it is 0.
  return cursor, group['entries-read'] or (cursor == '0-0' and 0 or -1), group.lag or redis.call('XLEN', stream), is_counted
end

-- Returns whether the call is to leave `ready`: it goes into `taken`, or its stream is gone.
local function lease(p, sid, since, session, lapses, taken)
  local cursor, read, waiting, is_counted = progress(ARGV[6 + 2 * p] .. sid)
  if not cursor then
    local is_gone = read
    if is_gone then
      redis.call('ZREM', KEYS[3 * p - 2], sid)
      gone[#gone + 1] = sid
    end
    return is_gone
  end
  -- Whoever is among the ended calls has `ended` in his session.
  local finalized = (session[5] or session.err) and redis.call('ZSCORE', KEYS[3 * p], sid) and 1 or 0
  taken[#taken + 1] = sid
  local bytes_an_entry = math.ceil(tonumber(session[1] or 0) / math.max(1, read + waiting))
  leases[#leases + 1] = {
    p, sid, cursor, waiting, read, finalized, lapses, since, bytes_an_entry, session[3] or '', session[4] and 1 or 0,
    is_counted and 1 or 0,
  }
  waiting = math.min(waiting, most_of_a_call)
  calls_left = calls_left - 1
  entries_left = entries_left - waiting
  bytes_left = bytes_left - waiting * bytes_an_entry
  return true
end

-- Notes the leases of a partition's calls, together: that costs hardly more than one.
local function note(p, taken)
  if #taken == 0 then return end
  local deadlines = {}
  for i, sid in ipairs(taken) do
    deadlines[2 * i - 1], deadlines[2 * i] = deadline_text, sid
  end
  redis.call('ZADD', KEYS[3 * p - 1], unpack(deadlines))
  redis.call('ZREM', KEYS[3 * p - 2], unpack(taken))
end

local suspects, chosen = {}, nil

-- Looks through a page of ready calls. Returns how many it passes over, and whether there is room for more.
local function look_through(p, page)
  local passed, taken = 0, {}
  for i = 1, #page, 2 do
    if calls_left <= 0 or entries_left <= 0 or bytes_left <= 0 then
      more[#more + 1] = p
      note(p, taken)
      return passed, false
    end
    local sid, since = page[i], page[i + 1]
    local session = redis.pcall('HMGET', ARGV[7 + 2 * p] .. sid, 'bytes', 'lapses', 'alone', 'presumed', 'ended')
    local lapses = tonumber(session[2] or 0)
    if lapses >= suspect_lapses then
      local suspect = { p, sid, since, session, lapses }
      suspects[#suspects + 1] = suspect
      if not chosen or lapses < chosen[5] then chosen = suspect end
      passed = passed + 1
    elseif not lease(p, sid, since, session, lapses, taken) then
      passed = passed + 1
    end
  end
  note(p, taken)
  return passed, true
end

local function look_into(p)
  local left, has_room = 0, true -- in front, passed over
  repeat
    local page = redis.call('ZRANGE', KEYS[3 * p - 2], left, left + PAGE - 1, 'WITHSCORES')
    local passed
    passed, has_room = look_through(p, page)
    left = left + passed
  until not has_room or #page < 2 * PAGE or left > MOST_LEFT
end

local function lease_suspect(p, sid, since, session, lapses)
  local taken = {}
  local has_left = lease(p, sid, since, session, lapses, taken)
  note(p, taken)
  return has_left
end

for p = 1, (#KEYS - 1) / 3 do look_into(p) end
if chosen and may_take_suspect and lease_suspect(unpack(chosen)) then
  local told = {}
  for _, suspect in ipairs(suspects) do
    if suspect ~= chosen and not told[suspect[1]] then
      told[suspect[1]] = true
      more[#more + 1] = suspect[1]
    end
  end
end
return { deadline, leases, more, gone }
