"""The inbox's steps as Lua, each one atomic. `inbox` says what they are for.

    inbox:<conversation>   the messages, oldest first          leases       conversation -> when its lease ends, ms
    ready                  conversations to work, in order     owners       conversation -> token of its claim
    deliveries             conversation -> of its head         stopped      message that is not to be answered -> conversation
    seen                   message -> when it came, ms         dead         dead letters, newest first
    queued                 messages in all inboxes             waiting      owner -> how many of its messages are there

KEYS[1] is the prefix of all keys, KEYS[2] the pointer table's key. A message is its id, its owners with
blanks between, and its JSON, a line each.
"""

from bot.conversations.events import APPEND_EVENT, IS_STOPPED

MAX_SEEN = 1_000_000  # the log knows the others

_COMMON = (
    IS_STOPPED
    + """
local p = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function make_ready(conversation)
  if redis.call('LLEN', p .. 'inbox:' .. conversation) == 0 then return end
  redis.call('ZADD', p .. 'ready', redis.call('INCR', p .. 'ready_number'), conversation)
  redis.call('PUBLISH', p .. 'wakeups', '["ready"]')
end
local function head_id(conversation)
  local head = redis.call('LINDEX', p .. 'inbox:' .. conversation, 0)
  return head and string.match(head, '^[^\\n]*')
end
local function count_owners(message, change)
  for owner in string.gmatch(string.match(message, '^[^\\n]*\\n([^\\n]*)') or '', '%S+') do
    if redis.call('HINCRBY', p .. 'waiting', owner, change) <= 0 then redis.call('HDEL', p .. 'waiting', owner) end
  end
end
local function pop_head(conversation)
  redis.call('HDEL', p .. 'stopped', head_id(conversation))
  count_owners(redis.call('LPOP', p .. 'inbox:' .. conversation), -1)
  redis.call('DECR', p .. 'queued')
  redis.call('HDEL', p .. 'deliveries', conversation)
end
"""
)

# ARGV: conversation, message id, message, most messages of all, most of one conversation, seen for ms, and how many each of the
# message's owners may have waiting
_PUT = """
local conversation, id = ARGV[1], ARGV[2]
if redis.call('ZSCORE', p .. 'seen', id) then return 'duplicate' end
if tonumber(redis.call('GET', p .. 'queued') or 0) >= tonumber(ARGV[4]) then return 'full' end
if redis.call('LLEN', p .. 'inbox:' .. conversation) >= tonumber(ARGV[5]) then return 'conversation full' end
local limit = 6
for owner in string.gmatch(string.match(ARGV[3], '^[^\\n]*\\n([^\\n]*)'), '%S+') do
  limit = limit + 1
  if tonumber(redis.call('HGET', p .. 'waiting', owner) or 0) >= tonumber(ARGV[limit]) then return 'owner full' end
end
redis.call('RPUSH', p .. 'inbox:' .. conversation, ARGV[3])
redis.call('INCR', p .. 'queued')
count_owners(ARGV[3], 1)
redis.call('ZADD', p .. 'seen', now, id)
redis.call('ZREMRANGEBYSCORE', p .. 'seen', '-inf', now - ARGV[6])
redis.call('ZREMRANGEBYRANK', p .. 'seen', 0, -MAX_SEEN - 1)
if not redis.call('ZSCORE', p .. 'leases', conversation) and not redis.call('ZSCORE', p .. 'ready', conversation) then
  make_ready(conversation)
end
return 'queued'
""".replace("MAX_SEEN", str(MAX_SEEN))

# ARGV: token, lease ms, most deliveries, what a person is told of a dead letter. Gives ms until a lease ends; id, epoch and
# pending of the pointer table; and of the claim: conversation, message, which delivery it is, and whether it is to be stopped.
_CLAIM = (
    APPEND_EVENT
    + """
for _, conversation in ipairs(redis.call('ZRANGEBYSCORE', p .. 'leases', '-inf', now, 'LIMIT', 0, 100)) do
  redis.call('ZREM', p .. 'leases', conversation)
  redis.call('HDEL', p .. 'owners', conversation)
  make_ready(conversation)
end
local claimed
while not claimed do
  local conversation = redis.call('ZPOPMIN', p .. 'ready')[1]
  if not conversation then break end
  local message = redis.call('LINDEX', p .. 'inbox:' .. conversation, 0)
  local deliveries = message and redis.call('HINCRBY', p .. 'deliveries', conversation, 1)
  if message and deliveries > tonumber(ARGV[3]) then
    local id = head_id(conversation)
    pop_head(conversation)
    redis.call('LPUSH', p .. 'dead', cjson.encode({conversation, message, deliveries - 1, now}))
    append_event(p, conversation, cjson.encode({type = 'turn.failed', message_id = id,
      error = {code = 'dead_letter', message = ARGV[4]}}))
    make_ready(conversation)
  elseif message then
    redis.call('HSET', p .. 'owners', conversation, ARGV[1])
    redis.call('ZADD', p .. 'leases', now + ARGV[2], conversation)
    claimed = {conversation, message, deliveries, is_stopped(p, conversation) and 1 or 0}
  end
end
local first = redis.call('ZRANGE', p .. 'leases', 0, 0, 'WITHSCORES')[2]
local pointers = redis.call('HMGET', KEYS[2], 'id', 'epoch', 'pending')
return {first and first - now or -1, pointers[1], pointers[2], pointers[3], unpack(claimed or {})}
"""
)

# ARGV: conversation, token, lease ms. As above, without a message; nothing when the conversation is being worked or has to be.
_CLAIM_ONE = """
local conversation = ARGV[1]
local lease = redis.call('ZSCORE', p .. 'leases', conversation)
if (lease and tonumber(lease) > now) or redis.call('LLEN', p .. 'inbox:' .. conversation) > 0 then return {} end
redis.call('ZREM', p .. 'leases', conversation)
redis.call('HSET', p .. 'owners', conversation, ARGV[2])
redis.call('ZADD', p .. 'leases', now + ARGV[3], conversation)
local pointers = redis.call('HMGET', KEYS[2], 'id', 'epoch', 'pending')
return {pointers[1], pointers[2], pointers[3]}
"""

_OWNED = """
local conversation = ARGV[1]
if redis.call('HGET', p .. 'owners', conversation) ~= ARGV[2] then return 'lost' end
"""

# ARGV: conversation, token, lease ms
_RENEW = (
    _OWNED
    + """
redis.call('ZREM', p .. 'leases', conversation)
redis.call('ZADD', p .. 'leases', now + ARGV[3], conversation)
return is_stopped(p, conversation) and 'stopped' or 'leased'
"""
)

# ARGV: conversation, token, id of the message that was answered
_FINISH = (
    _OWNED
    + """
if head_id(conversation) ~= ARGV[3] then return 'lost' end
pop_head(conversation)
redis.call('ZREM', p .. 'leases', conversation)
redis.call('HDEL', p .. 'owners', conversation)
make_ready(conversation)
return 'leased'
"""
)

# ARGV: conversation, token, ms until it may be claimed again, how many deliveries are taken back. An empty conversation is
# found by its token: of a claim whose answer was lost.
_RELEASE = """
if ARGV[1] == '' then
  local owners = redis.call('HGETALL', p .. 'owners')
  for i = 2, #owners, 2 do
    if owners[i] == ARGV[2] then ARGV[1] = owners[i - 1] end
  end
end
""" + (
    _OWNED
    + """
redis.call('HDEL', p .. 'owners', conversation)
redis.call('ZREM', p .. 'leases', conversation)
if tonumber(ARGV[4]) > 0 and redis.call('HEXISTS', p .. 'deliveries', conversation) == 1 then
  redis.call('HINCRBY', p .. 'deliveries', conversation, -ARGV[4])
end
if tonumber(ARGV[3]) > 0 then
  redis.call('ZADD', p .. 'leases', now + ARGV[3], conversation)
  redis.call('PUBLISH', p .. 'wakeups', '["ready"]')
else
  make_ready(conversation)
end
return 'leased'
"""
)

# ARGV: conversation, message id or nothing for the one at the head
_STOP = """
local conversation, id = ARGV[1], ARGV[2]
for _, message in ipairs(redis.call('LRANGE', p .. 'inbox:' .. conversation, 0, -1)) do
  local waiting = string.match(message, '^[^\\n]*')
  if id == '' or id == waiting then
    redis.call('HDEL', p .. 'stopped', waiting)
    redis.call('HSET', p .. 'stopped', waiting, conversation)
    redis.call('PUBLISH', p .. 'wakeups', cjson.encode({'stop:' .. conversation}))
    return waiting
  end
end
return false
"""

# ARGV: how many of the oldest dead letters
_REPLAY = """
local num_replayed = 0
for _ = 1, tonumber(ARGV[1]) do
  local letter = redis.call('RPOP', p .. 'dead')
  if not letter then break end
  local conversation, message = unpack(cjson.decode(letter))
  redis.call('RPUSH', p .. 'inbox:' .. conversation, message)
  redis.call('INCR', p .. 'queued')
  count_owners(message, 1)
  if not redis.call('ZSCORE', p .. 'leases', conversation) and not redis.call('ZSCORE', p .. 'ready', conversation) then
    make_ready(conversation)
  end
  num_replayed = num_replayed + 1
end
return num_replayed
"""


SCRIPTS = {
    name: _COMMON + script
    for name, script in {
        "put": _PUT,
        "claim": _CLAIM,
        "claim_one": _CLAIM_ONE,
        "renew": _RENEW,
        "finish": _FINISH,
        "release": _RELEASE,
        "stop": _STOP,
        "replay": _REPLAY,
    }.items()
}
