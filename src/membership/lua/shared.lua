-- What all scripts begin with. KEYS: nodes, info, meta, incarnations, counts. ARGV: channel, lease in ms, a generation to begin
-- with where there is none, and 1 where the caller knows that renewals were refused a moment ago.
local nodes, info, meta, incarnations, counts = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local channel, lease = ARGV[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

-- Lua would write 1.8e+12.
local function text(number)
  return string.format('%.0f', number)
end

-- A number that this or another program wrote; 0 where it is none, or one that Lua cannot count on from.
local function number(written)
  local value = tonumber(written or '0') or 0
  if value ~= value or value < 0 or value > 9007199254740991 then
    return 0
  end
  return value
end

-- A server that is full refuses what adds, and lets go through what removes: whether it is has to be asked first. It takes what comes
-- after the first write of a script, whatever that was.
local probe = redis.pcall('HSET', meta, 'looked', text(now))
-- Why it takes nothing for now, such as OOM, MISCONF or NOREPLICAS; some reasons are the caller's to mend.
local full = type(probe) == 'table' and probe.err
if full then
  for _, word in ipairs({'READONLY', 'NOPERM', 'WRONGTYPE', 'MOVED', 'CLUSTERDOWN'}) do
    if string.find(full, word, 1, true) then
      return probe
    end
  end
end

-- Never back, also when Redis has forgotten it: it is not below the moment.
local function rise()
  local epoch = math.max(number(redis.call('HGET', meta, 'epoch')) + 1, now)
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

if not full then
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
    if ARGV[4] == '1' then
      -- It could not renew its lease, and now it can.
      redis.call('ZADD', nodes, text(now + lease), node)
    else
      forget(node)
    end
  end
  if #expired > 0 and ARGV[4] ~= '1' then
    rise()
  end
end
