"""Events of held conversations, on a real Valkey."""

import asyncio

import pytest
from redis.asyncio import Redis

from bot.conversations.events import Events, wait
from bot.conversations.inbox import Inbox
from tests.bot.conversations.conftest import PREFIX, message


async def told(inbox: Inbox, events: Events, *texts: str) -> str:
    """Claims conversation c1 and tells events in it; gives the claim's token."""
    await inbox.put(message("m1"))
    claim, _ = await inbox.claim()
    assert claim is not None
    for text in texts:
        assert await events.append("c1", claim.token, {"type": "turn.delta", "message_id": "m1", "text": text}) == "held"
    return claim.token


async def test_events_are_read_on_from_any_place(inbox: Inbox, events: Events) -> None:
    await told(inbox, events, "a", "b\u2028", "c")
    everything = await events.read("c1", "0")
    assert [event.data["text"] for event in everything] == ["a", "b\u2028", "c"]
    assert [event.data["text"] for event in await events.read("c1", everything[0].id)] == ["b\u2028", "c"]
    assert await events.read("c1", everything[-1].id) == []
    assert await events.last_id("c1") == everything[-1].id
    assert (await events.last_id("other"), await events.read("other", "0")) == ("0", [])


async def test_only_the_owner_of_a_conversation_tells_anything(inbox: Inbox, events: Events) -> None:
    token = await told(inbox, events)
    assert await events.append("c1", "another", {"type": "turn.delta"}) == "lost"
    assert await events.append("c2", token, {"type": "turn.delta"}) == "lost"
    assert await events.read("c1", "0") == []
    await inbox.stop("c1")
    assert await events.append("c1", token, {"type": "turn.delta"}) == "stopped"


async def test_whoever_waits_is_woken_and_nobody_else(inbox: Inbox, events: Events) -> None:
    async with (
        events.woken("c1") as wake,
        events.woken("c2") as other,
        events.woken("stop:c1") as stop,
        events.woken("ready") as r,
    ):
        for each in (wake, other, stop, r):
            await wait(each, 5)  # set once when the connection began to listen
        await told(inbox, events, "a")
        assert await wait(wake, 5)
        assert r.is_set()
        await inbox.stop("c1")
        assert await wait(stop, 5)
        assert not other.is_set()
    assert not events._waiting


async def test_a_lost_connection_wakes_everybody_once_it_is_back(events: Events, redis: "Redis") -> None:
    async with events.woken("c1") as wake:
        await wait(wake, 5)
        await asyncio.sleep(0.1)
        wake.clear()
        for client in await redis.client_list(_type="pubsub"):
            await redis.client_kill_filter(_id=client["id"])
        assert await wait(wake, 10)


async def test_whether_reading_on_misses_anything_is_known(inbox: Inbox, events: Events, redis: "Redis") -> None:
    await told(inbox, events, "a", "b")
    first, second = await events.read("c1", "0")
    assert await events.has("c1", "0")
    assert await events.has("c1", first.id)
    await redis.xdel(f"{PREFIX}events:c1", first.id)
    assert not await events.has("c1", first.id)
    assert await events.has("c1", second.id)
    assert not await events.has("c1", "no id")
    assert 0 < await redis.ttl(f"{PREFIX}events:c1") <= 300


@pytest.mark.parametrize("num_events", [250])
async def test_a_read_is_bounded(inbox: Inbox, events: Events, num_events: int) -> None:
    await told(inbox, events, *(str(number) for number in range(num_events)))
    seen, after = [], "0"
    while page := await events.read("c1", after):
        assert len(page) <= 100
        seen += [event.data["text"] for event in page]
        after = page[-1].id
    assert seen == [str(number) for number in range(num_events)]
