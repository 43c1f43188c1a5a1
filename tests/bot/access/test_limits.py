"""Limits over a real Valkey: rates, places at a time, processes that are killed, and a Redis that is away."""

import asyncio
import logging
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import pytest
from redis.asyncio import Redis

from bot.access.limits import Gate, Limiter, open_limiter
from bot.access.roles import Principal
from bot.settings import Settings
from prompt_bank.errors import RateLimitedError, RedisUnavailableError
from prompt_bank.valkey import embedded_valkey
from tests.prompt_bank.conftest import kill_server

CHAT = Principal("key-1", "shop", "chat")


@pytest.fixture
def store_id() -> str:
    return uuid4().hex  # keeps tests apart on one server


async def enter(limiter: Limiter, principal: Principal = CHAT, person: str | None = None) -> Gate:
    gate = Gate(limiter)
    await gate.enter(principal, person)
    return gate


async def test_a_rate_is_kept_to_and_tells_when_to_come_back(redis_url: str, store_id: str) -> None:
    async with open_limiter(Settings(rate_per_minute=3), redis_url, store_id) as limiter:
        left = [(await enter(limiter)).allowance for _ in range(3)]
        assert [(allowance.limit, allowance.remaining) for allowance in left if allowance] == [(3, 2), (3, 1), (3, 0)]
        gate = Gate(limiter)
        expected = r"this API key has asked for 3 turns within a minute.*try again in \d+ s"
        with pytest.raises(RateLimitedError, match=expected) as refused:
            await gate.enter(CHAT, None)
        assert 55 <= refused.value.retry_after_s <= 60
        assert gate.allowance is not None
        assert gate.allowance.remaining == 0
        # Another key has its own, and a key may have a limit of its own.
        assert (await enter(limiter, Principal("key-2", "other", "chat"))).allowance
        own = (await enter(limiter, Principal("key-3", "own", "chat", rate_per_minute=100))).allowance
        assert own is not None
        assert (own.limit, own.remaining) == (100, 99)


async def test_a_window_moves(redis_url: str, store_id: str) -> None:
    """Turns of a minute ago count no more; the library's own list of moments is made older, as a minute is long."""
    async with open_limiter(Settings(rate_per_minute=1), redis_url, store_id) as limiter, Redis.from_url(redis_url) as redis:
        await enter(limiter)
        with pytest.raises(RateLimitedError):
            await enter(limiter)
        (key,) = [key async for key in redis.scan_iter(f"frontdesk:{store_id}:limits:LIMITER/*")]
        moment = float(await redis.lpop(key))  # type: ignore[arg-type, misc]
        await redis.lpush(key, moment - 61)  # type: ignore[misc]
        assert (await enter(limiter)).allowance


async def test_a_person_who_asks_too_fast_uses_up_nothing_of_the_key(redis_url: str, store_id: str) -> None:
    async with open_limiter(Settings(rate_per_minute=10, person_rate_per_minute=2), redis_url, store_id) as limiter:
        for _ in range(2):
            await enter(limiter, person="ann")
        for _ in range(20):
            with pytest.raises(RateLimitedError, match="this person has asked for 2 turns"):
                await enter(limiter, person="ann")
        assert (await enter(limiter, person="bob")).allowance
        allowance = (await enter(limiter)).allowance
        assert allowance is not None
        assert allowance.remaining == 10 - 4


async def test_places_are_taken_and_given_back(redis_url: str, store_id: str) -> None:
    settings = Settings(max_concurrent=3, person_concurrent=2)
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(open_limiter(settings, redis_url, store_id)) for _ in range(2)]
        first, second = await enter(one, person="ann"), await enter(two, person="ann")
        refused = Gate(one)
        with pytest.raises(RateLimitedError, match="2 turns of this person are under way"):
            await refused.enter(CHAT, "ann")
        await refused.leave()
        third = await enter(one, person="bob")
        with pytest.raises(RateLimitedError, match="3 turns of this API key are under way"):
            await enter(two)
        await first.leave()
        await first.leave()  # a second time gives back nothing
        fourth = await enter(two, person="ann")
        with pytest.raises(RateLimitedError, match="3 turns of this API key"):
            await enter(one, person="eve")
        for gate in (second, third, fourth):
            await gate.leave()
        async with Redis.from_url(redis_url) as redis:
            assert [key async for key in redis.scan_iter(f"frontdesk:{store_id}:limits:places:*")] == []


async def test_nobody_reads_names_of_persons_in_redis_and_every_key_expires(redis_url: str, store_id: str) -> None:
    async with open_limiter(Settings(), redis_url, store_id) as limiter, Redis.from_url(redis_url) as redis:
        await enter(limiter, person="ann@example.com")
        keys = [key async for key in redis.scan_iter(f"frontdesk:{store_id}:*")]
        assert len(keys) == 4
        assert not any(b"ann" in key for key in keys)
        assert all([0 < await redis.ttl(key) <= 61 for key in keys])


async def test_many_at_once_get_exactly_the_places_there_are(redis_url: str, store_id: str) -> None:
    async with open_limiter(Settings(max_concurrent=7), redis_url, store_id) as limiter:
        results = await asyncio.gather(*(enter(limiter) for _ in range(40)), return_exceptions=True)
        assert sum(isinstance(result, Gate) for result in results) == 7
        assert sum(isinstance(result, RateLimitedError) for result in results) == 33


async def test_a_cancelled_request_gives_its_place_back(redis_url: str, store_id: str) -> None:
    async with open_limiter(Settings(max_concurrent=1), redis_url, store_id) as limiter:
        for num_steps in range(1, 30):
            gate = Gate(limiter)
            entering = asyncio.ensure_future(gate.enter(CHAT, None))
            for _ in range(num_steps):
                await asyncio.sleep(0)
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)
            await gate.leave()
        gate = await enter(limiter)
        await gate.leave()


async def test_a_long_turn_keeps_its_place(redis_url: str, store_id: str) -> None:
    async with open_limiter(Settings(max_concurrent=1), redis_url, store_id, lease_s=1) as limiter:
        gate = await enter(limiter)
        await asyncio.sleep(2.5)
        with pytest.raises(RateLimitedError):
            await enter(limiter)
        await gate.leave()
        assert await enter(limiter)


_HOLDER = """
import asyncio, sys
from bot.access.limits import Gate, open_limiter
from bot.access.roles import Principal
from bot.settings import Settings

async def hold():
    async with open_limiter(Settings(max_concurrent=1), sys.argv[1], sys.argv[2], lease_s=2) as limiter:
        await Gate(limiter).enter(Principal("key-1", "shop", "chat"), None)
        print("holding", flush=True)
        await asyncio.sleep(60)

asyncio.run(hold())
"""


async def test_the_places_of_a_killed_process_come_free(redis_url: str, store_id: str) -> None:
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", _HOLDER, redis_url, store_id, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"holding\n"
    async with open_limiter(Settings(max_concurrent=1), redis_url, store_id) as limiter:
        await asyncio.sleep(2.5)  # longer than its lease: it renews it
        with pytest.raises(RateLimitedError):
            await enter(limiter)
        holder.kill()
        await holder.wait()
        deadline = asyncio.get_running_loop().time() + 10
        while True:
            try:
                await enter(limiter)
                break
            except RateLimitedError:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("url", ["unix:///nowhere/redis.sock", "redis://127.0.0.1:1"])
async def test_with_redis_away_turns_are_refused_or_let_pass_as_configured(
    url: str, store_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_limiter(Settings(), url, store_id) as limiter:
        with pytest.raises(RedisUnavailableError, match="limits cannot be counted"):
            await enter(limiter)
    async with open_limiter(Settings(when_redis_is_down="serve_last_known"), url, store_id) as limiter:
        for _ in range(3):
            gate = await enter(limiter)
            assert gate.allowance is None
            await gate.leave()
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage().split(",")[0] for record in told] == ["redis is away"]


async def test_a_redis_that_goes_and_comes_back_is_told_once(
    tmp_path: Path, store_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(when_redis_is_down="serve_last_known")
    with embedded_valkey(tmp_path / "valkey") as url:
        async with open_limiter(settings, url, store_id) as limiter:
            await enter(limiter)
            await kill_server(url)
            for _ in range(5):
                assert (await enter(limiter)).allowance is None
            with embedded_valkey(tmp_path / "valkey") as again:
                assert again == url
                assert (await enter(limiter)).allowance
    told = [record.getMessage().split(",")[0] for record in caplog.records if record.name == "bot.access.limits"]
    assert told == ["redis is away", "redis is back"]
