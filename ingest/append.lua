#!lua
-- append: puts events into their calls' streams and tells the sinks. All of it or, when it has been done before, none of it.
--
-- KEYS  [1] producer key: the last batch of this producer that was applied
--       [2] wake channel
--       then for each partition in the batch: ready, leased, open, ended
--       then for each call in the batch: stream, session
-- ARGV  [1] the batch's number (1, 2, 3 … for a producer)
--       [2] number of the last batch that its producer knows to be applied, 0 for none
--       [3] ms without any event after which a call is presumed over
--       [4] the same for a call that seems over: it has an end status, or its connection is gone
--       [5] number of partitions in the batch
--       then for each call: call_sid
--                           index of its partition among those above, from 1
--                           bytes of its events
--                           1 if they bring the call back, should it have been presumed over (before, or by one of them), else 0
--                           number of events, then each event's JSON
--                           number of session fields and values, then field, value, field, value … (`ended`: it is over;
--                           `presumed`: why it is presumed over; `connected`, `disconnected`: which bound connection
--                           of the call opened or closed)
-- Reply  the calls that could not be appended to, as {index of the call from 1, error}; empty when all is well.
--        'GAP' when an earlier batch of this producer is missing: send that one first.
--
-- The producer key may be gone or old (expired; Redis lost its last writes): then what the producer knows counts. Otherwise a
-- first batch that failed would pass for applied because the second one was, or one that is lost would be waited for for ever.
local KEPT_SECONDS = 86400 -- long enough for any retry; a producer's id is never used again
local REFUSED = KEYS[1] .. ':refused' -- hash: batch number, its reply; only of batches with a refusal, and only while it may be asked for
local last = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), tonumber(ARGV[2]))
local batch = tonumber(ARGV[1])
if batch <= last then
  -- Written again, though it stands there: a WAIT or WAITAOF that follows waits only for what this connection has written.
  redis.call('SET', KEYS[1], last, 'EX', KEPT_SECONDS)
  -- What was refused then is refused again, for the reply that said so may have been lost.
  local said = redis.call('HGET', REFUSED, batch)
  return said and cjson.decode(said) or {}
end
if batch > last + 1 then return redis.error_reply('GAP batch ' .. last + 1 .. ' has not been applied') end

-- The same as END_STATUSES in shared/events.ts.
local END_STATUS = { completed = true, busy = true, failed = true, ['no-answer'] = true, canceled = true }
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
-- As text, once: Redis prints a number of Lua's anew for each command that gets it, which takes as long as the command itself.
local function text(number) return string.format('%.0f', number) end
-- (The first is given a little more than it is told, so that it need not be told again with every event.)
local now, idle, over = text(now_ms), text(now_ms + ARGV[3] + math.floor(ARGV[3] / 16)), text(now_ms + ARGV[4])
local far = now_ms + math.max(ARGV[3], ARGV[4])
local farthest = math.max(tonumber(idle), tonumber(over))
local partitions = tonumber(ARGV[5])
local call_key = 3 + 4 * partitions
local arg = 6
local refused = {}
local woken = {}

-- The error of a reply, if it is one of its key. What this user may not do is no call's fault: that ends the script, before the
-- batch counts as applied. (Redis says so in other words from 7.2 on.)
local function error_of(reply)
  local err = type(reply) == 'table' and reply.err or nil
  if err and (string.find(err, 'NOPERM', 1, true) or string.find(err, "user executing the script can't", 1, true)) then error(err) end
  return err
end

-- Counts and appends a call's events. An error (a key that is something else than ours, a stream that has had the last id there
-- is) is returned: it must not stop the other calls of the batch, nor make the whole batch be tried again for ever.
-- Returns how many are in the stream now, and the error.
local function append_events(stream, session, bytes, first, count)
  local total = redis.pcall('HINCRBY', session, 'bytes', bytes)
  local appended, err = 0, error_of(total)
  if err then return 0, err end
  for i = first, first + count - 1 do
    local id = redis.pcall('XADD', stream, '*', 'e', ARGV[i])
    err = error_of(id)
    if err then break end
    appended = appended + 1
  end
  -- The counter started at what was just added: this was the call's first entry.
  if total == tonumber(bytes) and appended > 0 then redis.pcall('XGROUP', 'CREATE', stream, 'sink', '0') end
  return appended, err
end

local function set_session(session, first, count)
  for i = first, first + count - 1, 2 do
    local field, value = ARGV[i], ARGV[i + 1]
    if field == 'connected' then
      redis.call('HSET', session, 'connection', field, 'connection_id', value)
    elseif field == 'disconnected' then
      -- The end of an older connection may be noticed long after the call has come back on a new one.
      local latest = redis.call('HGET', session, 'connection_id')
      if not latest or latest == value then redis.call('HSET', session, 'connection', field) end
    elseif field == 'presumed' then
      -- As reap.lua has it. An end that somebody said stays.
      if redis.call('HGET', session, 'ended') ~= '1' then
        redis.call('HSET', session, 'ended', 'presumed', 'presumed', '1', 'reason', value)
      end
    elseif field ~= 'status' or END_STATUS[value] or not END_STATUS[redis.call('HGET', session, 'status')] then
      -- The session keeps an end status once it has one, whatever order callbacks arrive in.
      redis.call('HSET', session, field, value)
    end
  end
end

-- What is told of the calls of a partition together: a command for many of them costs hardly more than one for one.
local opened, news, turns = {}, {}, {}
for p = 1, partitions do
  opened[p], news[p], turns[p] = {}, {}, { sids = {}, sessions = {} }
end

-- Once a call has ended, whatever comes late does not open it again; nor does what comes of a call that seems over, such
-- as its recording's URL, keep it open for longer than the grace.
local function keep_open(p, sid, session, resumes)
  local open, ended = KEYS[4 * p + 1], KEYS[4 * p + 2]
  local state = redis.call('HMGET', session, 'ended', 'status', 'connection')
  if state[1] == 'presumed' and resumes then
    redis.call('HDEL', session, 'ended', 'reason')
    redis.call('ZREM', ended, sid)
    state[1] = false
  end
  if state[1] then
    redis.call('ZREM', open, sid)
  else
    local seems_over = END_STATUS[state[2]] or state[3] == 'disconnected'
    local its = opened[p]
    its[#its + 1] = seems_over and over or idle
    its[#its + 1] = sid
  end
end

-- Of calls that have turns only. One that is open, and will be for the whole time after this one, has not ended and does not seem over.
-- (One that would be for even longer has its deadline from a longer IDLE_TIMEOUT, or a clock that was ahead: it gets today's.)
local function keep_talking_open(p)
  local sids, sessions = turns[p].sids, turns[p].sessions
  for i, deadline in ipairs(redis.call('ZMSCORE', KEYS[4 * p + 1], unpack(sids))) do
    local due = tonumber(deadline or 0)
    if due < far or due > farthest then keep_open(p, sids[i], sessions[i], true) end
  end
end

-- News of a leased call is found by settle, which looks behind what was committed.
local function make_ready(p)
  local ready, leased, sids = KEYS[4 * p - 1], KEYS[4 * p], news[p]
  local added = {}
  for i, deadline in ipairs(redis.call('ZMSCORE', leased, unpack(sids))) do
    if not deadline then
      added[#added + 1] = now
      added[#added + 1] = sids[i]
    end
  end
  if #added == 0 then return end
  local count = redis.call('ZADD', ready, 'NX', unpack(added))
  -- A partition that had ready calls before has woken its sink already.
  if count > 0 and redis.call('ZCARD', ready) == count then woken[#woken + 1] = string.match(ready, '{(%d+)}') end
end

local index = 0
while arg <= #ARGV do
  index = index + 1
  local sid, p, bytes, events = ARGV[arg], tonumber(ARGV[arg + 1]), ARGV[arg + 2], tonumber(ARGV[arg + 4])
  local stream, session = KEYS[call_key], KEYS[call_key + 1]
  local fields = arg + 5 + events
  local field_count = tonumber(ARGV[fields])

  local appended, err = append_events(stream, session, bytes, arg + 5, events)
  if err then refused[#refused + 1] = { index, err } end
  -- Of a call that is refused, what came before the error is stored all the same. What its session would say may be of the rest.
  if not err then set_session(session, fields + 1, field_count) end
  if not err or appended > 0 then
    local resumes = ARGV[arg + 3] == '1'
    if resumes and field_count == 0 then
      local its = turns[p]
      its.sids[#its.sids + 1], its.sessions[#its.sessions + 1] = sid, session
    else
      keep_open(p, sid, session, resumes)
    end
    news[p][#news[p] + 1] = sid
  end
  call_key = call_key + 2
  arg = fields + field_count + 1
end
for p = 1, partitions do
  if #turns[p].sids > 0 then keep_talking_open(p) end
  if #opened[p] > 0 then redis.call('ZADD', KEYS[4 * p + 1], unpack(opened[p])) end
  if #news[p] > 0 then make_ready(p) end
end

redis.call('SET', KEYS[1], batch, 'EX', KEPT_SECONDS)
if #refused > 0 then
  -- What its producer knows will not be asked for again; without this, the hash would grow for as long as the producer lives.
  for _, said in ipairs(redis.call('HKEYS', REFUSED)) do
    if tonumber(said) <= tonumber(ARGV[2]) then redis.call('HDEL', REFUSED, said) end
  end
  redis.call('HSET', REFUSED, batch, cjson.encode(refused))
  redis.call('EXPIRE', REFUSED, KEPT_SECONDS)
end
if #woken > 0 then redis.call('SPUBLISH', KEYS[2], table.concat(woken, ',')) end
return refused
