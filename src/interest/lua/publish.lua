-- A process says what it reads. Returns 1 if something else was there. KEYS: readers, maps, versions. ARGV: channel, lease in ms, reader, version, bitmap.
local readers, maps, versions = KEYS[1], KEYS[2], KEYS[3]
local channel, lease, reader, version, map = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('ZADD', readers, string.format('%.0f', now + lease), reader)
if redis.call('HGET', versions, reader) ~= version or redis.call('HSTRLEN', maps, reader) ~= #map then
  redis.call('HSET', maps, reader, map)
  redis.call('HSET', versions, reader, version)
  redis.call('PUBLISH', channel, reader)
  return 1
end
return 0
