-- One heartbeat. ARGV: …, node, incarnation or 0, info, counts, the store's identity or nothing. Answers 0, or 1 where the node is
-- fenced, or 2 where others have another store; incarnation, now, whether the node was a member already, and who has another
-- store, and which.
if full then
  return probe
end
local node, incarnation, said, held, store = ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8], ARGV[9]
local known = number(redis.call('HGET', incarnations, node))
if incarnation ~= 0 and incarnation < known then
  return {1, text(known), text(now), 1, '', ''}
end
local member = redis.call('ZSCORE', nodes, node)
if store ~= '' and (not member or incarnation == 0) then
  -- Who comes, or comes back, must have the store of those who are here; also of the process that has its name, or it would
  -- close that one's sessions.
  for _, other in ipairs(redis.call('ZRANGE', nodes, 0, 999)) do
    local read, theirs = pcall(cjson.decode, redis.call('HGET', info, other) or '')
    theirs = read and type(theirs) == 'table' and theirs['store']
    if type(theirs) == 'string' and theirs ~= '' and theirs ~= store then
      return {2, '0', text(now), 0, other, string.sub(theirs, 1, 100)}
    end
  end
end
if incarnation == 0 then
  incarnation = math.max(rise(), known + 1)
end
redis.call('ZADD', nodes, text(now + lease), node)
redis.call('HSET', counts, node, held)
if not member or incarnation ~= known or redis.call('HGET', info, node) ~= said then
  redis.call('HSET', incarnations, node, text(incarnation))
  redis.call('HSET', info, node, said)
  rise()
end
return {0, text(incarnation), text(now), member and 1 or 0, '', ''}
