"""How many turns a key and a person may ask for: in a minute, and at the same time. Counted in Redis, over all processes.

Rates are a moving window of the `limits` library. It has nothing for what runs at the same time, so places are kept here: a
sorted set for each key and person, of members with deadlines. A running service renews its places; those of one that was killed
expire. All these keys have a TTL, so a full Redis evicts them before anything that must stay: a limit may be forgotten.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

from bot.access.roles import Principal, person_digest
from bot.conversations.records import new_id
from bot.settings import Settings
from prompt_bank.cache import redis_pool
from prompt_bank.errors import RateLimitedError, RedisUnavailableError

log = logging.getLogger(__name__)

_PREFIX = "frontdesk:{}:limits"
_LEASE_S = 60  # how long the places of a killed process are taken

# Redis' own clock: those of several machines differ. Gives 0, or which of the sets is full.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
for i, key in ipairs(KEYS) do
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now)
  if redis.call('ZCARD', key) >= tonumber(ARGV[2 + i]) then return i end
end
for _, key in ipairs(KEYS) do
  redis.call('ZADD', key, now + ARGV[2], ARGV[1])
  redis.call('EXPIRE', key, ARGV[2])
end
return 0
"""
_RENEW = """
local time = redis.call('TIME')
local deadline = time[1] + time[2] / 1000000 + ARGV[1]
for i, key in ipairs(KEYS) do
  redis.call('ZADD', key, 'XX', deadline, ARGV[1 + i])
  redis.call('EXPIRE', key, ARGV[1])
end
"""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a rate limit; in `reset_s` there is one turn more."""

    limit: int
    remaining: int
    reset_s: int
    is_exceeded: bool


@dataclass(frozen=True, slots=True)
class Limited:
    """A key, or a person of it, and its limits."""

    id: str
    what: str
    rate_per_minute: int
    max_concurrent: int


class Limiter:
    """Used from one event loop."""

    def __init__(self, pool: BlockingConnectionPool, store_id: str, settings: Settings, lease_s: int = _LEASE_S) -> None:
        self._settings = settings
        self._lease_s = lease_s
        self._prefix = _PREFIX.format(store_id)
        storage = RedisStorage(
            "async+redis://",
            implementation="redispy",
            key_prefix=self._prefix,
            connection_pool=pool,  # type: ignore[arg-type]  # passed on to redis-py, which takes it
        )
        self._window = MovingWindowRateLimiter(storage)
        self._redis = Redis(connection_pool=pool)
        self._take = self._redis.register_script(_TAKE)
        self._renew = self._redis.register_script(_RENEW)
        self._held: dict[str, list[str]] = {}  # the sets a place is in
        self._is_away = False

    @contextmanager
    def bearing_outages(self) -> Iterator[None]:
        """With Redis away it raises RedisUnavailableError, or ends the block if turns are to be served without it."""
        try:
            yield
        except RedisError as error:
            if self._settings.when_redis_is_down == "refuse":
                raise RedisUnavailableError(f"limits cannot be counted, redis does not answer: {error}") from error
            if not self._is_away:
                log.warning("redis is away, turns are served without limits: %s", error)
            self._is_away = True
            return
        if self._is_away:
            log.warning("redis is back, limits are counted again")
        self._is_away = False

    def callers(self, principal: Principal, person: str | None) -> list[Limited]:
        """The person first: one who asks too fast uses up nothing of the key's."""
        settings = self._settings
        rate = principal.rate_per_minute or settings.rate_per_minute
        key = Limited(principal.id, "this API key", rate, principal.max_concurrent or settings.max_concurrent)
        if person is None:
            return [key]
        id_ = f"{principal.id}:{person_digest(person)}"
        return [Limited(id_, "this person", settings.person_rate_per_minute, settings.person_concurrent), key]

    def concurrency(self, principal: Principal, person: str | None) -> dict[str, int]:
        """Who a message is counted for while it waits, and how many may."""
        return {caller.id: caller.max_concurrent for caller in self.callers(principal, person)}

    def follower(self, principal: Principal) -> Limited:
        return Limited(f"{principal.id}:streams", "this API key", 0, self._settings.max_streams)

    async def count(self, caller: Limited) -> Allowance:
        """Counts one turn, unless that is one too many."""
        item = RateLimitItemPerMinute(caller.rate_per_minute)
        is_exceeded = not await self._window.hit(item, caller.id)
        resets_at, remaining = await self._window.get_window_stats(item, caller.id)
        return Allowance(item.amount, max(0, remaining), max(1, math.ceil(resets_at - time.time())), is_exceeded)

    async def take(self, callers: list[Limited], place: str) -> Limited | None:
        """Takes a place with each, or with none: gives the caller that has no more."""
        sets = [f"{self._prefix}:places:{caller.id}" for caller in callers]
        # Before it is taken: a request that is cancelled meanwhile must give it back too.
        self._held[place] = sets
        limits = [caller.max_concurrent for caller in callers]
        full = await self._take(keys=sets, args=[place, self._lease_s, *limits])
        return callers[full - 1] if full else None

    async def leave(self, place: str) -> None:
        """Harmless for a place that was not taken."""
        sets = self._held.pop(place, [])
        try:
            for key in sets:
                await self._redis.zrem(key, place)
        except RedisError as error:
            log.warning("a place was not given back, it expires in %d s: %s", self._lease_s, error)

    async def keep_places(self) -> None:
        """Renews what is held, until it is cancelled."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            held = [(key, place) for place, sets in self._held.items() for key in sets]
            if held:
                arguments: list[Any] = [self._lease_s, *(place for _, place in held)]
                with suppress(RedisError):  # the next turn tells of it
                    await self._renew(keys=[key for key, _ in held], args=arguments)


class Gate:
    """One request's way through the limits; `allowance` is the tightest it met. Without a limiter all may pass."""

    def __init__(self, limiter: Limiter | None) -> None:
        self._limiter = limiter
        self._place = new_id()
        self.allowance: Allowance | None = None

    async def enter(self, principal: Principal, person: str | None) -> None:
        """Counts a turn and takes a place for it. Raises RateLimitedError or RedisUnavailableError."""
        if self._limiter is None:
            return
        callers = self._limiter.callers(principal, person)
        with self._limiter.bearing_outages():
            for caller in callers:
                await self._count(self._limiter, caller)
            full = await self._limiter.take(callers, self._place)
            if full is not None:
                raise RateLimitedError(
                    f"{full.max_concurrent} turns of {full.what} are under way, which is the most there may be; "
                    "wait until one has ended"
                )

    async def follow(self, principal: Principal) -> None:
        """Takes a place for an event stream, which is no turn. Raises RateLimitedError or RedisUnavailableError."""
        if self._limiter is None:
            return
        follower = self._limiter.follower(principal)
        with self._limiter.bearing_outages():
            if await self._limiter.take([follower], self._place) is not None:
                raise RateLimitedError(
                    f"{follower.max_concurrent} event streams of this API key are open, the most there may be; close one"
                )

    async def _count(self, limiter: Limiter, caller: Limited) -> None:
        allowance = await limiter.count(caller)
        self.allowance = min(self.allowance or allowance, allowance, key=lambda either: either.remaining)
        if allowance.is_exceeded:
            raise RateLimitedError(
                f"{caller.what} has asked for {allowance.limit} turns within a minute, which is the most it may; "
                f"try again in {allowance.reset_s} s",
                allowance.reset_s,
            )

    async def leave(self) -> None:
        if self._limiter is not None:
            await self._limiter.leave(self._place)


@asynccontextmanager
async def open_limiter(settings: Settings, redis_url: str, store_id: str, lease_s: int = _LEASE_S) -> AsyncIterator[Limiter]:
    pool = redis_pool(redis_url, settings.redis_timeout_s)
    limiter = Limiter(pool, store_id, settings, lease_s)
    keeping = asyncio.create_task(limiter.keep_places())
    try:
        yield limiter
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await pool.aclose()
