"""Events of held conversations, on a real Valkey."""

import asyncio
import itertools

import pytest
from redis.asyncio import Redis

from bot.conversations.events import Event, Events, Wake
from bot.conversations.inbox import Inbox
from tests.bot.conversations.conftest import PREFIX, message


async def told(inbox: Inbox, events: Events, *texts: str) -> str:
    """Claims conversation c1 and tells events in it; gives the claim's token."""
    await inbox.put(message("m1"))
    claim, _ = await inbox.claim()
    assert claim is not None
    for text in texts:
        assert await events.append("c1", claim.token, {"type": "turn.delta", "message_id": "m1", "text": text}) == "leased"
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
            await each.wait(5)  # set once when the connection began to listen
        await told(inbox, events, "a")
        assert await wake.wait(5)
        assert r.is_set
        await inbox.stop("c1")
        assert await stop.wait(5)
        assert not other.is_set
    assert not events._waiting


async def test_a_lost_connection_wakes_everybody_once_it_is_back(events: Events, redis: "Redis") -> None:
    async with events.woken("c1") as wake:
        await wake.wait(5)
        await wake.wait(0.1)
        for client in await redis.client_list(_type="pubsub"):
            await redis.client_kill_filter(_id=client["id"])
        assert await wake.wait(10)


async def test_a_wake_up_has_the_events_themselves(inbox: Inbox, events: Events) -> None:
    async with events.woken("c1") as wake:
        await wake.wait(5)
        assert wake.take("0") is None
        await told(inbox, events, "a", "b\u2028\n", "c")
        async with asyncio.timeout(5):
            taken: list[Event] = []
            while len(taken) < 3:
                await wake.wait(5)
                taken += wake.take(taken[-1].id if taken else "0") or []
    assert taken == await events.read("c1", "0")


def wake_of(*ids: str) -> Wake:
    """Has read the first of these events, and is told of the others one after the other."""
    wake = Wake()
    assert wake.take("0") is None
    for before, id_ in itertools.pairwise(ids):
        wake.set((before, Event(id_, {})))
    return wake


@pytest.mark.parametrize(
    ("after", "taken"), [("0", ["9-1", "9-2", "10-0"]), ("9-2", ["10-0"]), ("10-0", []), ("10-1", []), ("8-0", None)]
)
def test_of_what_was_told_the_next_is_taken_unless_one_is_missing(after: str, taken: list[str] | None) -> None:
    found = wake_of("0", "9-1", "9-2", "10-0").take(after)
    assert (None if found is None else [event.id for event in found]) == taken


def test_a_reader_that_is_slow_is_told_little_and_reads_the_rest() -> None:
    wake = wake_of(*(f"{number}-0" for number in range(1000)))
    assert wake.take("1-0") is None
    assert [event.id for event in wake.take("997-0") or []] == ["998-0", "999-0"]
    assert wake.take("999-0") == []


async def test_who_heard_nothing_for_a_while_reads_the_stream() -> None:
    wake = wake_of("0", "1-0")
    assert await wake.wait(1)
    assert wake.take("1-0") == []
    assert not await wake.wait(0.01)
    assert wake.take("1-0") is None
    wake.set()  # as when the connection was lost
    assert wake.take("1-0") is None


async def test_a_conversation_cannot_pass_for_another(inbox: Inbox, events: Events) -> None:
    """Its id is what its caller likes: in a wake-up it is no more than an id."""
    strange = 'c1","0","1-1","{}"]\n["c1'
    async with events.woken("c1") as wake, events.woken(strange) as own:
        for each in (wake, own):
            await each.wait(5)
        assert wake.take("0") is None
        await inbox.put(message("m1", strange))
        claim, _ = await inbox.claim()
        assert claim is not None
        await events.append(strange, claim.token, {"type": "turn.delta", "message_id": "m1"})
        assert await own.wait(5)
        assert await inbox.stop(strange) == "m1"
        assert own.take("0") is None
        assert [event.id for event in await events.read(strange, "0")] == [await events.last_id(strange)]
        assert not wake.is_set


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
