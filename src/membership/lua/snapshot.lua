-- What there is. Answers generation, epoch, and for each node its name, info, incarnation and counts.
local all = {}
for _, node in ipairs(redis.call('ZRANGE', nodes, 0, -1)) do
  all[#all + 1] = {
    node,
    redis.call('HGET', info, node) or '',
    redis.call('HGET', incarnations, node) or '0',
    redis.call('HGET', counts, node) or '',
  }
end
return {redis.call('HGET', meta, 'generation'), redis.call('HGET', meta, 'epoch') or '0', all}
