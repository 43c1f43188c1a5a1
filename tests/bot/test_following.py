"""Following a message's turn when its events do not tell: they are gone, not there yet, or it died. Real Redis and log."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest
from redis.asyncio import Redis

from bot import turn_events
from bot.conversations.database import open_database
from bot.conversations.ending import end
from bot.conversations.events import Events
from bot.conversations.inbox import Inbox, InboxMessage
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.conversations.records import Caller, LoggedTurn
from bot.following import Follower
from bot.worker import Worker

LONG_S = 3600.0


@dataclass
class Followed:
    follower: Follower
    inbox: Inbox
    log: ConversationLog
    conversation_id: str
    events: Events
    redis: "Redis"

    async def put(self, id_: str) -> None:
        await self.inbox.put(InboxMessage(id_, self.conversation_id, "Hi", 0.0, {}))

    async def answer(self, id_: str, error: str | None = None) -> None:
        reason = "error" if error else "stop"
        turn = LoggedTurn(self.conversation_id, "Hi", "Hello", "f", "explicit", reason, 1.0, message_id=id_, error=error)  # type: ignore[arg-type]
        await self.log.append(turn, None, fence=1)

    async def next(self, id_: str, is_new: bool) -> dict[str, Any] | None:
        """The next event; None for a sign of life."""
        async with asyncio.timeout(60), aclosing(self.follower.message(self.conversation_id, id_, "0", is_new)) as events:
            event = await anext(events)
            return event.data if event is not None else None


@pytest.fixture(params=[LONG_S, 0.01], ids=["at once", "after a heartbeat"])
async def followed(request: pytest.FixtureRequest, redis_url: str, database_url: str) -> AsyncIterator[Followed]:
    async with open_database(database_url) as database, Redis.from_url(redis_url) as redis:
        log, reader, events = ConversationLog(database), LogReader(database), Events(redis, "test:")
        inbox = Inbox(redis, "test:", "test:pointers")
        state = await log.create(Caller("me"))
        assert state is not None
        worker = Worker(None, None, inbox, events, log, reader, num_slots=1, can_answer=bool)  # type: ignore[arg-type]  # it never claims
        async with events.listening():
            yield Followed(Follower(events, inbox, reader, worker, request.param), inbox, log, state.id, events, redis)


@pytest.fixture
def is_new(followed: Followed) -> bool:
    """What was just put in is looked for in the log only when nothing was heard for a while."""
    return followed.follower._heartbeat_s != LONG_S


async def test_what_was_answered_is_told_from_the_log(followed: Followed, is_new: bool) -> None:
    await followed.answer("m")
    told = await followed.next("m", is_new)
    assert told is not None
    assert (told["type"], told["message_id"], told["turn"]["answer"]) == ("turn.completed", "m", "Hello")


async def test_what_failed_is_told_in_the_words_of_its_error(followed: Followed, is_new: bool) -> None:
    await followed.answer("m", "MessageTooLongError")
    assert await followed.next("m", is_new) == {
        "type": "turn.failed",
        "message_id": "m",
        "error": {
            "code": "MessageTooLongError",
            "message": "Your message is too long for me. Please send a shorter one.",
        },
    }


async def test_what_waits_is_waited_for(followed: Followed, is_new: bool) -> None:
    await followed.put("m")
    assert await followed.next("m", is_new) is None


async def test_what_neither_waits_nor_was_answered_has_failed(followed: Followed, is_new: bool) -> None:
    """A dead letter, or a message that went with its Redis: nobody waits for it forever."""
    await followed.put("another")
    told = await followed.next("m", is_new)
    assert told is not None
    assert (told["type"], told["message_id"], told["error"]["code"]) == ("turn.failed", "m", "dead_letter")


async def test_while_others_are_answered_there_are_signs_of_life(followed: Followed) -> None:
    """Something is heard all the while, but nothing of this message."""
    followed.follower._heartbeat_s = 0.3
    await followed.put("another")
    await followed.put("m")
    claim, _ = await followed.inbox.claim()
    assert claim is not None

    async def answer() -> None:
        while True:
            await followed.events.append(claim.conversation_id, claim.token, turn_events.delta("another", "a"))
            await asyncio.sleep(0.02)

    answering = asyncio.create_task(answer())
    assert await followed.next("m", is_new=True) is None
    await end(answering)


async def test_what_is_told_is_not_read_again(followed: Followed) -> None:
    """An answer of a hundred tokens costs a follower a few reads."""
    followed.follower._heartbeat_s = LONG_S
    await followed.put("m")
    claim, _ = await followed.inbox.claim()
    assert claim is not None
    await followed.redis.config_resetstat()
    texts = []
    async with aclosing(followed.follower.message(followed.conversation_id, "m", "0", True)) as events:
        for number in range(100):
            await followed.events.append(claim.conversation_id, claim.token, turn_events.delta("m", f"{number} "))
            event = await anext(events)
            assert event is not None
            texts.append(event.data["text"])
    assert texts == [f"{number} " for number in range(100)]
    assert (await followed.redis.info("commandstats"))["cmdstat_xrange"]["calls"] < 20


@pytest.mark.parametrize("what", ["message", "conversation"])
async def test_who_is_far_behind_gets_everything_at_once(followed: Followed, what: str) -> None:
    """More than a page of events that were there before, and nothing new that would tell of them."""
    followed.follower._heartbeat_s = LONG_S
    await followed.put("m")
    claim, _ = await followed.inbox.claim()
    assert claim is not None
    for number in range(250):
        await followed.events.append(claim.conversation_id, claim.token, turn_events.delta("m", f"{number} "))
    follower, id_ = followed.follower, followed.conversation_id
    following = follower.message(id_, "m", "0", is_new=False) if what == "message" else follower.conversation(id_, "0")
    async with asyncio.timeout(60), aclosing(following) as events:
        got = [await anext(events) for _ in range(250)]
    texts = [event.data["text"] for event in got if event is not None]
    assert texts == [f"{number} " for number in range(250)]
