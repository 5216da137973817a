#!lua flags=no-writes,allow-oom
-- behind: what there is in calls' streams behind their cursors, that is, not known to be in PostgreSQL.
--
-- KEYS  streams
-- ARGV  [1] of so many of them, from the first one on, the oldest entry behind the cursor is wanted, too
--       [2] most bytes of such entries: Redis gives no entry's id without all that is in it
-- Reply for each stream: entries behind the cursor, when the oldest of them arrived (ms; '' when there is none, or it is not
--       wanted); for as many streams, from the first one on, as the bytes allow: one at least
-- include sink/group.lua
local wanted, bytes_left = tonumber(ARGV[1]), tonumber(ARGV[2])
local reply = {}

-- The group's cursor, and the entries behind it; as lease.lua has it, but nothing is made anew here.
local function progress(stream)
  local group, err = group_of(stream)
  if err then return nil, 0 end
  if not group then return '0-0', redis.call('XLEN', stream) end
  return group['last-delivered-id'], group.lag or redis.call('XLEN', stream)
end

for s, stream in ipairs(KEYS) do
  if bytes_left <= 0 then break end
  local cursor, behind = progress(stream)
  local oldest
  if cursor and behind > 0 and s <= wanted then
    oldest = redis.call('XRANGE', stream, '(' .. cursor, '+', 'COUNT', 1)[1]
    for _, part in ipairs(oldest and oldest[2] or {}) do bytes_left = bytes_left - #part end
  end
  reply[#reply + 1] = behind
  reply[#reply + 1] = oldest and string.match(oldest[1], '^%d+') or ''
end
return reply
