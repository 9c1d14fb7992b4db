-- One heartbeat. ARGV: …, node, incarnation or 0, info, counts. Answers fenced or not, incarnation, now, and whether the
-- node was a member already.
local node, incarnation, said, held = ARGV[4], tonumber(ARGV[5]), ARGV[6], ARGV[7]
local known = tonumber(redis.call('HGET', incarnations, node) or '0')
if incarnation ~= 0 and incarnation < known then
  return {1, text(known), text(now), 1}
end
local member = redis.call('ZSCORE', nodes, node)
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
return {0, text(incarnation), text(now), member and 1 or 0}
