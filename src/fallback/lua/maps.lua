-- The bitmaps of all holders. KEYS: holders, maps, versions. ARGV: lease in ms; how many holders are looked at; how many bytes a
-- holder's name, a version and a bitmap have at the most; then pairs of a holder and the version that is known. Takes out whose
-- lease is over.
local holders, maps, versions = KEYS[1], KEYS[2], KEYS[3]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local lease, most = tonumber(ARGV[1]), tonumber(ARGV[2])
local longest_name, longest_version, longest_map = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
for _, holder in ipairs(redis.call('ZRANGEBYSCORE', holders, '(' .. string.format('%.0f', now + lease), '+inf')) do
  redis.call('ZADD', holders, string.format('%.0f', now + lease), holder)
end
for _, holder in ipairs(redis.call('ZRANGEBYSCORE', holders, '-inf', string.format('%.0f', now))) do
  redis.call('ZREM', holders, holder)
  redis.call('HDEL', maps, holder)
  redis.call('HDEL', versions, holder)
end
local known = {}
for n = 6, #ARGV, 2 do
  known[ARGV[n]] = ARGV[n + 1]
end
local all = {}
-- Whatever else somebody has written there is left alone: more holders than there can be nodes, and what is no bitmap.
for _, holder in ipairs(redis.call('ZRANGE', holders, 0, most - 1)) do
  local version = redis.call('HGET', versions, holder) or ''
  if #version > longest_version or #holder > longest_name or redis.call('HSTRLEN', maps, holder) > longest_map then
    version = ''
    known[holder] = ''
  end
  local map = ''
  if known[holder] ~= version then
    map = redis.call('HGET', maps, holder) or ''
  end
  all[#all + 1] = {holder, version, map}
end
return all
