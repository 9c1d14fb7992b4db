-- What there is. Answers generation, epoch, for each node its name, info, incarnation and counts, and why renewals are refused, if they
-- are. No more than ARGV[5] nodes, and nothing longer than ARGV[6] bytes: whoever looks reads all of it every second.
local all, longest = {}, tonumber(ARGV[6])
local function short(written)
  if written and #written <= longest then
    return written
  end
  return ''
end
for _, node in ipairs(redis.call('ZRANGE', nodes, 0, tonumber(ARGV[5]) - 1)) do
  all[#all + 1] = {
    short(node),
    short(redis.call('HGET', info, node)),
    short(redis.call('HGET', incarnations, node)),
    short(redis.call('HGET', counts, node)),
  }
end
return {
  short(redis.call('HGET', meta, 'generation')),
  short(redis.call('HGET', meta, 'epoch')),
  all,
  full or '',
  text(redis.call('ZCARD', nodes)),
}
