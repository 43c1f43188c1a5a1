"""What happens in the conversations that the server holds, as it happens: a short stream for each, kept a few minutes in Redis.

Any process can read it from any position, so a client that lost its connection goes on elsewhere. The stream is what counts;
the wake-ups on one pub/sub channel say that there is more, and what: who has read all before it need not read it again. Losing
one costs no more than a delay. Streams carry a TTL: a full memory may evict them, as the log has every answer once it is whole.
"""

import asyncio
import json
import logging
from collections import defaultdict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from bot.conversations.ending import end
from prompt_bank.cache import asking_redis
from prompt_bank.errors import RedisUnavailableError

log = logging.getLogger(__name__)

_KEPT_S = 300
_MAX_EVENTS = 10_000  # of one conversation; an answer has some hundreds
MAX_PAGE = 100
_MAX_TOLD = 20  # for a reader that is slower; it reads on in the stream
_RECONNECT_S = 1.0

APPEND_EVENT = f"""
local function append_event(p, conversation, event)
  local key = p .. 'events:' .. conversation
  local newest = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  local id = redis.call('XADD', key, 'MAXLEN', '~', {_MAX_EVENTS}, '*', 'event', event)
  redis.call('EXPIRE', key, {_KEPT_S})
  redis.call('PUBLISH', p .. 'wakeups', cjson.encode({{conversation, newest and newest[1] or '0', id, event}}))
end
"""
IS_STOPPED = """
local function is_stopped(p, conversation)
  local head = redis.call('LINDEX', p .. 'inbox:' .. conversation, 0)
  return head and redis.call('HEXISTS', p .. 'stopped', string.match(head, '^[^\\n]*')) == 1
end
"""

# ARGV: conversation, token of the claim, event. Who has lost the conversation tells nothing any more.
_APPEND = (
    APPEND_EVENT
    + IS_STOPPED
    + """
if redis.call('HGET', KEYS[1] .. 'owners', ARGV[1]) ~= ARGV[2] then return 'lost' end
append_event(KEYS[1], ARGV[1], ARGV[3])
return is_stopped(KEYS[1], ARGV[1]) and 'stopped' or 'leased'
"""
)


@dataclass(frozen=True, slots=True)
class Event:
    """`id` is its place in the conversation's stream; `data` has a `type` and a `message_id`."""

    id: str
    data: dict[str, Any]


class Wake:
    """Set whenever there may be more for whoever waits; of a conversation, with the events themselves if they are few."""

    def __init__(self) -> None:
        self._is_set = asyncio.Event()
        self.is_stream_news = True  # what is there already was told to nobody
        self._told: deque[tuple[str, Event]] = deque(maxlen=_MAX_TOLD)  # each with the id of the one before it

    def set(self, told: tuple[str, Event] | None = None) -> None:
        if told is not None:
            self._told.append(told)
        else:
            self.is_stream_news = True
        self._is_set.set()

    @property
    def is_set(self) -> bool:
        return self._is_set.is_set()

    async def wait(self, seconds: float) -> bool:
        """Whether it was set within `seconds`; it is cleared then."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._is_set.wait()
        was_set = self.is_set
        self._is_set.clear()
        self.is_stream_news |= not was_set  # a wake-up may have been lost
        return was_set

    def take(self, after: str) -> list[Event] | None:
        """What was told of the events after the one with id `after`; None when they have to be read in the stream."""
        must_read, self.is_stream_news = self.is_stream_news, False
        taken = []
        while self._told and not must_read:
            before, event = self._told[0]
            if before == after:
                taken.append(event)
                after = event.id
            elif _place(event.id) > _place(after):
                must_read = True  # there is one between
                break
            self._told.popleft()
        return None if must_read else taken


def _place(id_: str) -> tuple[int, ...]:
    return tuple(int(number) for number in id_.split("-"))


class Events:
    """Used from one event loop, inside `listening`. Methods raise RedisUnavailableError."""

    def __init__(self, redis: "Redis", prefix: str) -> None:
        self._redis = redis
        self._prefix = prefix
        self._append = redis.register_script(_APPEND)
        self._waiting: defaultdict[str, set[Wake]] = defaultdict(set)

    async def append(self, conversation_id: str, token: str, data: dict[str, Any]) -> str:
        """Tells an event, as the owner of the conversation; `leased`, `stopped` or `lost` as Inbox.renew says."""
        with asking_redis():
            state: bytes = await self._append(keys=[self._prefix], args=[conversation_id, token, json.dumps(data)])
        return state.decode()

    async def read(self, conversation_id: str, after: str) -> list[Event]:
        """The next events after the one with id `after` ("0" for the first); at most a hundred."""
        with asking_redis():
            entries: Any = await self._redis.xrange(f"{self._prefix}events:{conversation_id}", f"({after}", "+", count=MAX_PAGE)
        return [Event(id_.decode(), json.loads(fields[b"event"])) for id_, fields in entries]

    async def next(self, conversation_id: str, after: str, wake: Wake) -> list[Event]:
        """As `read`, but not what `wake` was told of already."""
        told = wake.take(after)
        if told is not None:
            return told
        page = await self.read(conversation_id, after)
        wake.is_stream_news |= len(page) == MAX_PAGE  # there may be more
        return page

    async def last_id(self, conversation_id: str) -> str:
        """The newest event's id; "0" when there is none."""
        with asking_redis():
            newest: Any = await self._redis.xrevrange(f"{self._prefix}events:{conversation_id}", count=1)
        return newest[0][0].decode() if newest else "0"

    async def has(self, conversation_id: str, event_id: str) -> bool:
        """Whether an event is still kept, so that reading on from it misses nothing."""
        if event_id == "0":
            return True
        try:
            return bool(await self._redis.xrange(f"{self._prefix}events:{conversation_id}", event_id, event_id))
        except ResponseError:
            return False  # not an id at all
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}") from error

    @asynccontextmanager
    async def woken(self, key: str) -> AsyncIterator[Wake]:
        """Set whenever there may be more: to read in a conversation (`key` is its id), to stop in it (`stop:` and its id), or
        to claim (`ready`)."""
        wake = Wake()
        self._waiting[key].add(wake)
        try:
            yield wake
        finally:
            self._waiting[key].discard(wake)
            if not self._waiting[key]:
                del self._waiting[key]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Hears the wake-ups meanwhile, on one connection for all conversations."""
        task = asyncio.create_task(self._listen())
        try:
            yield
        finally:
            await end(task)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as heard:
                    await heard.subscribe(f"{self._prefix}wakeups")
                    self.wake_all()  # whatever happened while nobody listened
                    while True:
                        # Without a limit of its own: silence is no failure here.
                        message = await heard.get_message(timeout=None)
                        if message is not None:
                            self._wake(*json.loads(message["data"]))
            except Exception as error:
                log.warning("no wake-ups from redis, trying again: %s", error, exc_info=not isinstance(error, RedisError))
                await asyncio.sleep(_RECONNECT_S)

    def _wake(self, key: str, before: str | None = None, id_: str = "", event: str = "") -> None:
        if (wakes := self._waiting.get(key)) is not None:
            told = (before, Event(id_, json.loads(event))) if before is not None else None
            for wake in wakes:
                wake.set(told)

    def wake_all(self) -> None:
        """For what no wake-up tells: a new connection, or the end."""
        for wakes in self._waiting.values():
            for wake in wakes:
                wake.set()
