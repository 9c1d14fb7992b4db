-- Adds to or takes out of a holder's set. KEYS: holders, maps, versions, the set. ARGV: channel, lease in ms, holder,
-- version, bitmap, "SADD" or "SREM", users …
local holders, maps, versions, set = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local channel, lease, holder, version, map, act = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
for n = 7, #ARGV do
  redis.call(act, set, ARGV[n])
end
redis.call('PEXPIRE', set, lease)
if map == '' then
  redis.call('ZREM', holders, holder)
  redis.call('HDEL', maps, holder)
  redis.call('HDEL', versions, holder)
else
  redis.call('ZADD', holders, string.format('%.0f', now + lease), holder)
  if redis.call('HGET', versions, holder) ~= version then
    redis.call('HSET', maps, holder, map)
    redis.call('HSET', versions, holder, version)
    -- Who is no longer here is asked for in vain until the next poll; who is here must be seen at once.
    if act == 'SADD' then
      redis.call('PUBLISH', channel, holder)
    end
  end
end
return redis.call('SCARD', set)
