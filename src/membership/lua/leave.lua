-- ARGV: …, node, incarnation. A later process of that name is left alone.
if redis.call('HGET', incarnations, ARGV[4]) == ARGV[5] then
  forget(ARGV[4])
  rise()
end
return 0
