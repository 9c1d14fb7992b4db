-- ARGV: …, node, incarnation. A later process of that name is left alone.
if redis.call('HGET', incarnations, ARGV[5]) == ARGV[6] then
  forget(ARGV[5])
  if not full then
    rise()
  end
end
return 0
