#!lua flags=allow-oom
-- erase: removes all that Redis has of a call, at once; or only says what there is.
--
-- KEYS  ready, leased, open, ended, kept, stream, session
-- ARGV  [1] call_sid
--       [2] `look`: remove nothing; `ended`: only if nobody works on it and nothing more is expected; `any`: in any case
-- Reply {1 if it is live (open, waiting for a sink, or with one), else 0,
--        ms that its lease lasts from now: -1 without one, 0 for one that has lapsed,
--        entries of its stream, 1 if there is a session, else 0,
--        in how many of the lists it is,
--        1 if it was removed, else 0}
-- A lease that lasts is left: it says that a sink may be about to commit what it has read, and only that sink can end it. Its settle
-- finds no stream, and moves and adds nothing but what the next erase takes away: so it is run again until there is no lease. (One
-- whose lease is gone instead, or has lapsed, has its settle, prolong and isolate refused by the ZSCORE they begin with.)
local LEASED, STREAM, SESSION = 2, 6, 7
local sid, how = ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local scores, lists = {}, 0
for list = 1, 5 do
  scores[list] = redis.call('ZSCORE', KEYS[list], sid)
  if scores[list] then lists = lists + 1 end
end
local live = (scores[1] or scores[2] or scores[3]) and 1 or 0
local lease = scores[LEASED] and math.max(0, tonumber(scores[LEASED]) - now) or -1
local entries = redis.pcall('XLEN', KEYS[STREAM])
if type(entries) == 'table' then entries = 1 end -- something else, under the name of the call's stream
local session = redis.call('EXISTS', KEYS[SESSION])

local removes = how == 'any' or (how == 'ended' and live == 0)
if removes then
  redis.call('UNLINK', KEYS[STREAM], KEYS[SESSION])
  for list = 1, 5 do
    if scores[list] and not (list == LEASED and lease > 0) then redis.call('ZREM', KEYS[list], sid) end
  end
end
return { live, lease, entries, session, lists, removes and 1 or 0 }
