-- What both scripts begin with. KEYS: nodes, info, meta, incarnations, counts. ARGV: channel, lease in ms, a generation to
-- begin with where there is none.
local nodes, info, meta, incarnations, counts = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local channel, lease = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

-- Lua would write 1.8e+12.
local function text(number)
  return string.format('%.0f', number)
end

-- Never back, also when Redis has forgotten it: it is not below the moment.
local function rise()
  local epoch = math.max(tonumber(redis.call('HGET', meta, 'epoch') or '0') + 1, now)
  redis.call('HSET', meta, 'epoch', text(epoch))
  redis.call('PUBLISH', channel, text(epoch))
  return epoch
end

local function forget(node)
  redis.call('ZREM', nodes, node)
  redis.call('HDEL', info, node)
  redis.call('HDEL', counts, node)
  redis.call('HDEL', incarnations, node)
end

if redis.call('HEXISTS', meta, 'generation') == 0 then
  redis.call('HSET', meta, 'generation', ARGV[3])
  rise()
end

-- A clock that was set back leaves leases that would last too long: each counts as one lease from now.
for _, node in ipairs(redis.call('ZRANGEBYSCORE', nodes, '(' .. text(now + lease), '+inf')) do
  redis.call('ZADD', nodes, text(now + lease), node)
end
local expired = redis.call('ZRANGEBYSCORE', nodes, '-inf', text(now))
for _, node in ipairs(expired) do
  forget(node)
end
if #expired > 0 then
  rise()
end
