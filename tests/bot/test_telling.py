"""Telling a turn as events: in order, together where Redis is slow, and no further once the conversation is another's."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from bot.conversations.events import Events
from bot.conversations.inbox import Inbox, InboxMessage, MessageClaim
from bot.routing.router import RoutingDecision
from bot.telling import Telling
from bot.turn import HeldMessage, TextDelta, TurnStarted
from prompt_bank.errors import FencedError
from tests.own_redis import OwnRedis


class Told:
    """A claimed message, and what was told of it."""

    def __init__(self, redis: "Redis", inbox: Inbox, claim: MessageClaim) -> None:
        self.redis = redis
        self.inbox = inbox
        self.events = Events(redis, "test:")
        self.claim = claim
        self.held = HeldMessage("m1", 0.0)

    def telling(self) -> Telling:
        return Telling(self.events, self.claim, self.held)

    async def texts(self) -> list[str]:
        return [event.data["text"] for event in await self.events.read("c1", "0")]

    async def until_told(self, count: int) -> None:
        async with asyncio.timeout(30):
            while len(await self.events.read("c1", "0")) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest.fixture
async def told(redis_url: str) -> AsyncIterator[Told]:
    async with Redis.from_url(redis_url) as redis:
        yield await _told(redis)


async def _told(redis: "Redis", **given: Any) -> Told:
    inbox = Inbox(redis, "test:", "test:pointers", **given)
    await inbox.put(InboxMessage("m1", "c1", "Hi", 0.0, {}))
    claim, _ = await inbox.claim()
    assert claim is not None
    return Told(redis, inbox, claim)


async def test_each_text_is_told_at_once(told: Told) -> None:
    async with told.telling() as telling:
        for number, text in enumerate(("a", "b", "c"), 1):
            telling.tell(TextDelta(text))
            await told.until_told(number)
    assert await told.texts() == ["a", "b", "c"]


async def test_what_comes_while_redis_is_slow_is_told_together(told: Told) -> None:
    async with told.telling() as telling:
        telling.tell(TextDelta("a"))
        await told.until_told(1)
        await asyncio.sleep(0.1)  # longer than it waits by itself
        await told.redis.client_pause(1000, all=False)  # what writes
        for text in ("", "b", "c", "d"):
            telling.tell(TextDelta(text))
            await asyncio.sleep(0.1)
    assert await told.texts() == ["a", "b", "cd"]


async def test_what_comes_very_fast_is_told_together_but_for_the_first_text(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it waits between two texts: nothing waits after the start, nor when the answer is whole."""
    monkeypatch.setattr("bot.telling._BETWEEN_S", 3600.0)
    async with told.telling() as telling:
        telling.tell(TurnStarted("c1", "t1", RoutingDecision(None, 0.0, {}, "undecided"), None))
        telling.tell(TextDelta("a"))
        await told.until_told(2)
        for text in ("b", "c", "d"):
            telling.tell(TextDelta(text))
            await asyncio.sleep(0.01)
    first, *texts = await told.events.read("c1", "0")
    assert first.data["type"] == "turn.started"
    assert [event.data["text"] for event in texts] == ["a", "bcd"]


async def test_who_lost_the_conversation_tells_nothing_more(told: Told) -> None:
    async def tell() -> None:
        async with told.telling() as telling:
            telling.tell(TextDelta("a"))
            await told.until_told(1)
            await told.inbox.release(told.claim)
            while True:
                telling.tell(TextDelta("b"))
                await asyncio.sleep(0.01)

    with pytest.raises(FencedError, match="the lease of c1 ended while message m1 was answered"):
        await tell()
    assert await told.texts() == ["a"]


async def test_a_loss_that_is_learnt_of_last_is_told_too(told: Told) -> None:
    await told.inbox.release(told.claim)
    telling = told.telling()
    telling.tell(TextDelta("a"))
    with pytest.raises(FencedError):
        await telling.__aexit__(None, None, None)


async def test_a_stop_is_heard_of(told: Told) -> None:
    await told.inbox.stop("c1")
    async with told.telling() as telling:
        telling.tell(TextDelta("a"))
    assert told.held.is_stopped


async def test_an_error_drops_what_is_untold(told: Told) -> None:
    await told.redis.client_pause(300, all=False)

    async def fail() -> None:
        async with told.telling() as telling:
            telling.tell(TextDelta("a"))
            await asyncio.sleep(0.01)
            telling.tell(TextDelta("b"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    await asyncio.sleep(0.5)
    assert "b" not in "".join(await told.texts())


async def test_without_redis_the_answer_goes_on(tmp_path: Path) -> None:
    own = OwnRedis(tmp_path)
    own.start()
    try:
        async with Redis.from_url(own.url, retry=Retry(NoBackoff(), 0)) as redis:
            told = await _told(redis)
            async with told.telling() as telling:
                own.kill()
                for text in ("a", "b"):
                    telling.tell(TextDelta(text))
                    await asyncio.sleep(0.05)
                await asyncio.to_thread(own.start)
                telling.tell(TextDelta("c"))
            assert await told.texts() == ["c"]
    finally:
        own.kill()
