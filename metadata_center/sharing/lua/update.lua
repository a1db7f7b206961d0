-- Takes one update of one member: writes its share, gives reservations a place, informs all subscribers.
--
-- KEYS[1]  sorted set: members by the end of their lease, in milliseconds of this server's clock; and '@clock', what
--          that clock said last, less than zero. Where it says less now it was set back: all ends go back as far. So a
--          lease is late by half a second and the time between two updates at most, however far that was
-- KEYS[2]  hash: the member's share; shares of the others are named alike, in the same slot
-- ARGV[1]  channel
-- ARGV[2]  what KEYS[2] begins with, before the member's id
-- ARGV[3]  the update: {version, member, sequence, rows, full, lease_s, {}, leaving}, MessagePack
-- ARGV[4]  reservations: {{candidates}, ...}, MessagePack, or empty; a candidate is
--          {endpoint, believed requests, prefill tokens, context tokens}
-- ARGV[5]  the message with its blocks and who waits at the member, or empty if it has neither; Redis' MessagePack
--          cannot read them
-- ARGV[6]  per kind of load, in the order of rows, what a charge adds: which item of a candidate, 0 for one, -1 for
--          nothing; MessagePack
-- returns  {1 if there was something of the member, else 0;
--           per reservation {row of the candidate charged, total requests per candidate before}}
--
-- A share's fields: '@newest' and '@full' are sequences of the newest and the last full update; all others
-- are endpoints, each its sequence and one number per kind of load, the first of them requests.
local members, share, channel = KEYS[1], KEYS[2], ARGV[1]
local payload = ARGV[5] == '' and ARGV[3] or ARGV[5]
local update, adds = cmsgpack.unpack(ARGV[3]), cmsgpack.unpack(ARGV[6])
local member, sequence, rows, full, lease_ms = update[2], update[3], update[4], update[5], update[6] * 1000
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local MOST = 9007199254740991 -- what a double counts exactly
local STEP_MS = 500 -- the clock is noted no more often: that costs as much as the rest of a short update
local CHUNK = 1000 -- fields of one command: a Lua call takes fewer than 8,000 arguments

local function text(row, at)
  local numbers = {string.format('%.0f', at)}
  for kind = 1, #adds do
    numbers[kind + 1] = string.format('%.0f', row[kind + 1])
  end
  return table.concat(numbers, ' ')
end

-- Of a damaged row, older than everything: what is written next makes it good.
local function sequence_of(value)
  return tonumber(string.match(value, '^%d+') or 0)
end

local function call_in_chunks(command, arguments)
  for first = 1, #arguments, CHUNK do
    redis.call(command, share, unpack(arguments, first, math.min(first + CHUNK - 1, #arguments)))
  end
end

local function is_of_other_type(answer)
  return answer.err and string.find(answer.err, 'WRONGTYPE', 1, true)
end

-- What is no set of members, and whose lease ends before there was time, is damage: nobody else would ever mend it.
local early = redis.pcall('ZRANGEBYSCORE', members, '-inf', '(0', 'WITHSCORES', 'LIMIT', 0, CHUNK)
if is_of_other_type(early) then
  redis.call('DEL', members)
end
local said_ms = 0
for i = 1, #early, 2 do
  if early[i] == '@clock' and -tonumber(early[i + 1]) <= MOST then
    said_ms = -tonumber(early[i + 1])
  else
    redis.call('ZREM', members, early[i])
  end
end
local back_ms = said_ms - now_ms
if back_ms > 0 then
  local ends = redis.call('ZRANGEBYSCORE', members, 0, '+inf', 'WITHSCORES')
  for i = 1, #ends, 2 do
    redis.call('ZADD', members, string.format('%.0f', ends[i + 1] - back_ms), ends[i])
    local left_ms = redis.call('PTTL', ARGV[2] .. ends[i])
    if left_ms >= 0 then
      redis.call('PEXPIRE', ARGV[2] .. ends[i], string.format('%.0f', left_ms - back_ms))
    end
  end
end
if back_ms > 0 or back_ms < -STEP_MS then
  redis.call('ZADD', members, -now_ms, '@clock')
end
redis.call('ZREMRANGEBYSCORE', members, 0, now_ms)

if update[8] then
  redis.call('DEL', share)
  redis.call('ZREM', members, member)
  if #redis.call('ZRANGEBYSCORE', members, 0, '+inf', 'LIMIT', 0, 1) == 0 then
    redis.call('DEL', members)
  end
  redis.call('PUBLISH', channel, payload)
  return {1, {}}
end

local known = redis.pcall('HMGET', share, '@newest', '@full')
if is_of_other_type(known) then
  redis.call('DEL', share)
end
local had_share = (known[1] or known[2]) and 1 or 0
local newest, last_full = tonumber(known[1] or 0) or 0, tonumber(known[2] or 0) or 0
local in_order = sequence > newest

if full and in_order then
  redis.call('DEL', share)
elseif full and sequence > last_full then
  local fields, old = redis.call('HGETALL', share), {}
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 1) ~= '@' and sequence_of(fields[i + 1]) < sequence then
      old[#old + 1] = fields[i]
    end
  end
  call_in_chunks('HDEL', old)
end

local written = {}
for _, row in ipairs(rows) do
  local applies = in_order
  if not applies then
    local value = redis.call('HGET', share, row[1])
    applies = sequence > (value and sequence_of(value) or last_full)
  end
  if applies then
    written[#written + 1] = row[1]
    written[#written + 1] = text(row, sequence)
  end
end
call_in_chunks('HSET', written)
if full and sequence > last_full then
  redis.call('HSET', share, '@full', string.format('%.0f', sequence))
end
if in_order then
  redis.call('HSET', share, '@newest', string.format('%.0f', sequence))
  redis.call('PEXPIRE', share, math.ceil(lease_ms))
  redis.call('ZADD', members, now_ms + math.ceil(lease_ms), member)
end

if ARGV[4] == '' then
  redis.call('PUBLISH', channel, payload)
  return {had_share, {}}
end

local reservations = cmsgpack.unpack(ARGV[4])
local endpoints, totals, places = {}, {}, {}
for _, reservation in ipairs(reservations) do
  for _, candidate in ipairs(reservation[1]) do
    if totals[candidate[1]] == nil then
      endpoints[#endpoints + 1] = candidate[1]
      totals[candidate[1]] = 0
    end
  end
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', members, 0, '+inf')) do
  for first = 1, #endpoints, CHUNK do
    local last = math.min(first + CHUNK - 1, #endpoints)
    -- What is no share, or has no such row, is another member's damage: it counts nothing.
    local values = redis.pcall('HMGET', ARGV[2] .. name, unpack(endpoints, first, last))
    for i, value in ipairs(values.err and {} or values) do
      if value then
        local endpoint = endpoints[first + i - 1]
        totals[endpoint] = math.min(MOST, totals[endpoint] + tonumber(string.match(value, '^%d+ (%d+)') or 0))
      end
    end
  end
end

local charged = {}
for number, reservation in ipairs(reservations) do
  local chosen, least, place = nil, nil, {}
  for i, candidate in ipairs(reservation[1]) do
    local total = totals[candidate[1]]
    local excess = math.max(0, total - candidate[2])
    if least == nil or excess < least then
      chosen, least = i, excess
    end
    place[i] = total
  end
  local candidate = reservation[1][chosen]
  local row = charged[candidate[1]]
  if row == nil then
    row = {candidate[1]}
    for kind = 1, #adds do
      row[kind + 1] = 0
    end
    local value = redis.call('HGET', share, candidate[1])
    if value then
      local i = 1
      for amount in string.gmatch(value, ' (%d+)') do
        i = i + 1
        row[i] = tonumber(amount)
      end
    end
    charged[candidate[1]] = row
  end
  totals[candidate[1]] = totals[candidate[1]] + 1
  for kind, item in ipairs(adds) do
    if item >= 0 then
      row[kind + 1] = row[kind + 1] + (item == 0 and 1 or candidate[item])
    end
  end
  places[number] = {chosen - 1, place}
end

local rows_now = {}
for _, row in ipairs(rows) do
  if charged[row[1]] == nil then
    rows_now[#rows_now + 1] = row
  end
end
local changed = {}
for endpoint, row in pairs(charged) do
  rows_now[#rows_now + 1] = row
  changed[#changed + 1] = endpoint
  changed[#changed + 1] = text(row, sequence)
end
call_in_chunks('HSET', changed)
redis.call('PUBLISH', channel, cmsgpack.pack({update[1], member, sequence, rows_now, full, update[6], {}, false}))
return {had_share, places}
