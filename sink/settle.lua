#!lua flags=allow-oom
-- settle: what was leased is committed in PostgreSQL. Moves each call's cursor, ends its lease, and makes it ready again
-- if it has more. The holder of a lapsed lease moves and releases nothing: the call is another's now, who reads the same
-- entries again and finds their rows there.
--
-- KEYS  [1] wake channel
--       then for each call: ready, leased, open, ended, stream, session
-- ARGV  [1] the leases' token (their deadline)
--       then for each call: call_sid
--                           last entry committed (the cursor as it was: the call is only given back)
--                           entries read by the group up to there (-1: unknown)
--                           `finalized`; `quarantined`: what was to end it may be in quarantine now; else `unknown`
--                           its lapses: `none` it had; `forget` them; `add` one, this delivery was it; `keep` them
-- Reply {number of leases that had lapsed, {partition numbers with calls that are ready again},
--        {call_sid, entries that were added behind the cursor and are gone: lost} for each call with any}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lapsed, again, woken, lost = 0, {}, {}, {}

-- Moves the group's cursor to `last`, where `read` entries were read (-1: unknown).
local function set_cursor(stream, last, read)
  if read == '-1' then
    redis.pcall('XGROUP', 'SETID', stream, 'sink', last)
  else
    redis.pcall('XGROUP', 'SETID', stream, 'sink', last, 'ENTRIESREAD', read)
  end
end

-- The first entry behind the cursor; if there is none, whether any that were added are not known to be read. What is there is looked
-- for whatever the group's lag says: the group may be gone, and after a failover as many entries may have come as it has lost.
-- (XINFO GROUPS says what is added without a look at the entries; XINFO STREAM gives two of them with all that is in them. Of a
-- stream that was trimmed to nothing, newer servers say that nothing is behind.)
local function look_behind(stream, last)
  local news = redis.pcall('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)
  if news.err then return nil, false end
  if news[1] then return news[1][1], true end
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if groups.err then return nil, false end
  for _, g in ipairs(groups) do
    local info = {}
    for i = 1, #g, 2 do info[g[i]] = g[i + 1] end
    if info.name == 'sink' then
      return nil, info.lag ~= 0 or redis.call('XLEN', stream) == 0
    end
  end
  return nil, false
end

local function entries_added(stream)
  local info = redis.call('XINFO', 'STREAM', stream)
  for i = 1, #info, 2 do
    if info[i] == 'entries-added' then return info[i + 1] end
  end
end

for c = 0, (#KEYS - 1) / 6 - 1 do
  local k, a = 2 + 6 * c, 2 + 5 * c
  local ready, leased, open, ended, stream = KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3], KEYS[k + 4]
  local sid, last, read, ending, lapses = ARGV[a], ARGV[a + 1], ARGV[a + 2], ARGV[a + 3], ARGV[a + 4]
  if redis.call('ZSCORE', leased, sid) ~= ARGV[1] then
    lapsed = lapsed + 1
  else
    redis.call('ZREM', leased, sid)
    set_cursor(stream, last, read)
    local news, is_behind = look_behind(stream, last)
    if is_behind and not news then
      -- Nothing waits, so all that was added was read. If it was not, somebody has trimmed away what nobody had read.
      local added = entries_added(stream)
      if read ~= '-1' and added > tonumber(read) then lost[#lost + 1] = { sid, added - tonumber(read) } end
      set_cursor(stream, last, added)
    end
    -- Whatever was being tried alone, its sink has lived to settle.
    if lapses ~= 'none' then redis.pcall('HDEL', KEYS[k + 5], 'alone') end
    if lapses == 'forget' then redis.pcall('HDEL', KEYS[k + 5], 'lapses') end
    if lapses == 'add' then redis.pcall('HINCRBY', KEYS[k + 5], 'lapses', 1) end
    -- A call that was presumed over may have come back meanwhile.
    if ending == 'finalized' and not (redis.call('ZSCORE', open, sid) and not redis.pcall('HGET', KEYS[k + 5], 'ended')) then
      redis.call('ZREM', open, sid)
      redis.call('ZADD', ended, now, sid)
    end
    -- An end that could not be stored: the reaper says it in our own words, once.
    if ending == 'quarantined' and not news and not redis.call('ZSCORE', ended, sid) and redis.pcall('HGET', KEYS[k + 5], 'ended') == '1'
      and redis.call('HSETNX', KEYS[k + 5], 'end_quarantined', '1') == 1 then
      redis.call('ZADD', open, now, sid)
    end
    if news then
      local partition = string.match(ready, '{(%d+)}')
      -- The entry's own time, so that the age of the oldest entry waiting stays exact.
      redis.call('ZADD', ready, string.match(news, '^%d+'), sid)
      if redis.call('ZCARD', ready) == 1 then woken[#woken + 1] = partition end
      again[#again + 1] = tonumber(partition)
    end
  end
end
if #woken > 0 then redis.call('SPUBLISH', KEYS[1], table.concat(woken, ',')) end
return { lapsed, again, lost }
