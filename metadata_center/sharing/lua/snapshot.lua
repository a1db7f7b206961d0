-- Reads the shares of all live members.
--
-- KEYS[1]  sorted set: members by the end of their lease, and '@clock': see update.lua
-- ARGV[1]  what the key of a share begins with, before the member's id
-- ARGV[2]  most members read, those whose lease ends first: leases are short, a forged one is not
-- ARGV[3]  most fields of a share
-- returns  per member {its id, what is left of its lease in milliseconds, the share's fields and values}; what is no
--          share, or larger than one, has a text in their place
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local shares = {}
local early = redis.pcall('ZRANGEBYSCORE', KEYS[1], '-inf', '(0', 'WITHSCORES', 'LIMIT', 0, ARGV[2])
if early.err then
  return string.find(early.err, 'WRONGTYPE', 1, true) and {} or early   -- the next update makes it good
end
local back_ms = 0
for i = 1, #early, 2 do
  local said_ms = -tonumber(early[i + 1])
  if early[i] == '@clock' and said_ms <= 9007199254740991 then
    back_ms = math.max(0, said_ms - now_ms)
  end
end
local first, most = '(' .. string.format('%.0f', now_ms + back_ms), ARGV[2]
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], first, '+inf', 'LIMIT', 0, most)) do
  local share = ARGV[1] .. member
  local left_ms = redis.call('PTTL', share) - back_ms
  if left_ms > 0 then
    local fields = redis.pcall('HGETALL', share)
    if fields.err or #fields > 2 * tonumber(ARGV[3]) then
      fields = 'no share'
    end
    shares[#shares + 1] = {member, left_ms, fields}
  end
end
return shares
