#!lua flags=allow-oom
-- settle: what was leased is committed in PostgreSQL. Moves each call's cursor, ends its lease, and makes it ready again
-- if it has more. The holder of a lapsed lease moves and releases nothing: the call is another's now, who reads the same
-- entries again and finds their rows there.
--
-- KEYS  [1] wake channel
--       then for each partition: ready, leased, open, ended
--       then for each call, partition by partition: stream, session
-- ARGV  [1] the leases' token (their deadline)
--       [2] number of partitions
--       then for each partition: number of its calls
--       then for each call: call_sid
--                           last entry committed (the cursor as it was: the call is only given back)
--                           entries read by the group up to there (-1: unknown)
--                           1 if that is all that Redis said was waiting when it was leased, else 0
--                           `finalized`; `presumed`: it is, but only because it is presumed over; `quarantined`:
--                           what was to end it may be in quarantine now; else `unknown`
--                           its lapses: `none` it had; `forget` them; `add` one, this delivery was it; `keep` them
-- Reply {number of leases that had lapsed, {partition numbers with calls that are ready again},
--        {call_sid, entries that were added behind the cursor and are gone: lost} for each call with any}
-- include sink/group.lua
local CALL_ARGS = 6
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local partitions = tonumber(ARGV[2])
local lapsed, again, woken, lost = 0, {}, {}, {}

-- The first entry behind the cursor. What is there is looked for whatever the group's lag says: the group may be gone, and after
-- a failover as many entries may have come as it has lost. (From the end first: usually nothing is there, and from the front Redis
-- would go through all that is stored together with the cursor's entry. XINFO STREAM gives two entries with all that is in them.)
local function first_behind(stream, last)
  local behind = '(' .. last
  local newest = redis.pcall('XREVRANGE', stream, '+', behind, 'COUNT', 1)
  if newest.err then return nil, true end
  if not newest[1] then return nil end
  return redis.call('XRANGE', stream, behind, '+', 'COUNT', 1)[1][1]
end

-- Where nothing is behind the cursor: whether any that were added are not known to be read. (Of a stream that was trimmed to
-- nothing, newer servers say that nothing is behind.)
local function may_have_lost(stream)
  local group = group_of(stream)
  return group and (group.lag ~= 0 or redis.call('XLEN', stream) == 0)
end

-- Returns the first entry behind the new cursor, if there is one.
local function move_cursor(stream, sid, last, read, is_all)
  set_cursor(stream, last, read)
  local news, unknown = first_behind(stream, last)
  if not news and not unknown and not is_all and may_have_lost(stream) then
    -- Nothing waits, so all that was added was read. If it was not, somebody has trimmed away what nobody had read.
    local added = named(redis.call('XINFO', 'STREAM', stream))['entries-added']
    if read ~= '-1' and added > tonumber(read) then lost[#lost + 1] = { sid, added - tonumber(read) } end
    set_cursor(stream, last, added)
  end
  return news
end

local function note_lapses(session, lapses)
  if lapses == 'none' then return end
  -- Whatever was being tried alone, its sink has lived to settle.
  redis.pcall('HDEL', session, 'alone')
  if lapses == 'forget' then redis.pcall('HDEL', session, 'lapses') end
  if lapses == 'add' then redis.pcall('HINCRBY', session, 'lapses', 1) end
end

local function note_end(open, ended, session, sid, ending, news)
  -- A call that was presumed over may have come back meanwhile.
  local is_final = ending == 'finalized' or ending == 'presumed'
  if is_final and not (redis.call('ZSCORE', open, sid) and not redis.pcall('HGET', session, 'ended')) then
    redis.call('ZREM', open, sid)
    redis.call('ZADD', ended, now, sid)
    -- It stands there, unless a foreign writer wrote the end, or somebody has removed the session: lease.lua goes by it.
    redis.pcall('HSETNX', session, 'ended', ending == 'presumed' and ending or '1')
  end
  -- An end that could not be stored: the reaper says it in our own words, once.
  if ending == 'quarantined' and not news and not redis.call('ZSCORE', ended, sid) and redis.pcall('HGET', session, 'ended') == '1'
    and redis.call('HSETNX', session, 'end_quarantined', '1') == 1 then
    redis.call('ZADD', open, now, sid)
  end
end

local key, arg = 2 + 4 * partitions, 3 + partitions -- of the next call
for p = 1, partitions do
  local ready, leased, open, ended = unpack(KEYS, 4 * p - 2, 4 * p + 1)
  local sids = {}
  for c = 1, tonumber(ARGV[2 + p]) do sids[c] = ARGV[arg + CALL_ARGS * (c - 1)] end
  local tokens = redis.call('ZMSCORE', leased, unpack(sids))
  local held = {}
  for c, sid in ipairs(sids) do
    local last, read, is_all, ending, lapses = unpack(ARGV, arg + 1, arg + CALL_ARGS - 1)
    local stream, session = KEYS[key], KEYS[key + 1]
    key, arg = key + 2, arg + CALL_ARGS
    if tokens[c] ~= ARGV[1] then
      lapsed = lapsed + 1
    else
      held[#held + 1] = sid
      local news = move_cursor(stream, sid, last, read, is_all == '1')
      note_lapses(session, lapses)
      if ending ~= 'unknown' then note_end(open, ended, session, sid, ending, news) end
      if news then
        local partition = string.match(ready, '{(%d+)}')
        -- The entry's own time, so that the age of the oldest entry waiting stays exact.
        redis.call('ZADD', ready, string.match(news, '^%d+'), sid)
        if redis.call('ZCARD', ready) == 1 then woken[#woken + 1] = partition end
        again[#again + 1] = tonumber(partition)
      end
    end
  end
  if #held > 0 then redis.call('ZREM', leased, unpack(held)) end
end
if #woken > 0 then redis.call('SPUBLISH', KEYS[1], table.concat(woken, ',')) end
return { lapsed, again, lost }
