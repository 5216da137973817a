#!lua flags=no-writes,allow-oom
-- access: what the user who runs this may not run. Nothing is run.
--
-- ARGV  [1] JSON: {{command, argument, …} for each}
-- Reply the indexes, from 1, of those that are refused
local refused = {}
for i, command in ipairs(cjson.decode(ARGV[1])) do
  -- An error means that this server does not know the command, or cannot be asked: then it is for whoever runs it to find out.
  local is_answered, may = pcall(redis.acl_check_cmd, unpack(command))
  if is_answered and not may then refused[#refused + 1] = i end
end
return refused
