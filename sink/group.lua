-- group: what the sinks' consumer group says of a stream. No script by itself: it stands in those that say `-- include sink/group.lua`.

-- A reply that lists names and values, by name; empty for an error.
local function named(flat)
  local info = {}
  for i = 1, #flat, 2 do info[flat[i]] = flat[i + 1] end
  return info
end

-- What XINFO GROUPS says of it. Else nil; and the error, if the stream cannot be asked: it is gone, say, or not ours.
local function group_of(stream)
  local groups = redis.pcall('XINFO', 'GROUPS', stream)
  if groups.err then return nil, groups.err end
  for _, flat in ipairs(groups) do
    local group = named(flat)
    if group.name == 'sink' then return group end
  end
end

-- The last entry committed; nil when there is no group.
local function cursor_of(stream)
  local group = group_of(stream)
  return group and group['last-delivered-id']
end

-- Moves the cursor to `last`, up to which `read` entries were read (-1: unknown).
local function set_cursor(stream, last, read)
  if read == '-1' then
    redis.pcall('XGROUP', 'SETID', stream, 'sink', last)
  else
    redis.pcall('XGROUP', 'SETID', stream, 'sink', last, 'ENTRIESREAD', read)
  end
end

-- When the oldest entry behind the cursor arrived (ms, as text): for so long the call has been waiting, whoever had it meanwhile.
-- Nil when there is none.
local function waiting_since(stream, cursor)
  local oldest = redis.call('XRANGE', stream, '(' .. (cursor or '0-0'), '+', 'COUNT', 1)[1]
  return oldest and string.match(oldest[1], '^%d+')
end
