-- Reads the shares of all live members.
--
-- KEYS[1]  sorted set: members by the end of their lease
-- ARGV[1]  what the key of a share begins with, before the member's id
-- returns  per member {its id, what is left of its lease in milliseconds, the share's fields and values}
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local shares = {}
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. string.format('%.0f', now_ms), '+inf')) do
  local share = ARGV[1] .. member
  local left_ms = redis.call('PTTL', share)
  if left_ms > 0 then
    shares[#shares + 1] = {member, left_ms, redis.call('HGETALL', share)}
  end
end
return shares
