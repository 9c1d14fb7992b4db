-- A process with the role collect says that it is there, or that it leaves, and learns who else is. KEYS: colleagues, info. ARGV:
-- lease in ms; 'stay', 'leave' or 'look'; its name; what it says; how many are looked at, and how many bytes of each. Answers a
-- name and what it says for each.
local colleagues, info = KEYS[1], KEYS[2]
local lease, act, node, said, most, longest =
  tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), tonumber(ARGV[6])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local function text(number)
  return string.format('%.0f', number)
end
-- A clock that was set back leaves leases that would last too long.
for _, other in ipairs(redis.call('ZRANGEBYSCORE', colleagues, '(' .. text(now + lease), '+inf')) do
  redis.call('ZADD', colleagues, text(now + lease), other)
end
local expired = redis.call('ZRANGEBYSCORE', colleagues, '-inf', text(now))
if act == 'leave' then
  -- A later process of that name is left alone.
  if redis.call('HGET', info, node) == said then
    expired[#expired + 1] = node
  end
end
for _, other in ipairs(expired) do
  redis.call('ZREM', colleagues, other)
  redis.call('HDEL', info, other)
end
if act == 'stay' then
  redis.call('ZADD', colleagues, text(now + lease), node)
  redis.call('HSET', info, node, said)
end
local all = {}
for _, other in ipairs(redis.call('ZRANGE', colleagues, 0, most - 1)) do
  local theirs = redis.call('HGET', info, other) or ''
  if #other <= longest and #theirs <= longest then
    all[#all + 1] = {other, theirs}
  end
end
return all
