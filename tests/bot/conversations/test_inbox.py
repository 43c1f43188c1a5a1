"""The inbox on a real Valkey: nothing is lost, order is kept, one works on a conversation at a time."""

import asyncio
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from bot.conversations.events import Events
from bot.conversations.inbox import MAX_DELIVERIES, Claim, Inbox, InboxMessage, MessageClaim
from bot.conversations.inbox_scripts import MAX_SEEN
from prompt_bank.cache import TableStamp
from prompt_bank.errors import InboxFullError, RateLimitedError, RedisUnavailableError
from prompt_bank.valkey import embedded_valkey
from tests.bot.conversations.conftest import PREFIX, TABLE_KEY, MakeInbox, message
from tests.own_redis import OwnRedis


async def claimed(inbox: Inbox) -> MessageClaim:
    claim, _ = await inbox.claim()
    assert claim is not None
    return claim


async def is_empty(inbox: Inbox) -> bool:
    return (await inbox.claim())[0] is None


async def claimed_in_time(inbox: Inbox, seconds: float = 10) -> MessageClaim:
    """Waits as a worker does: for as long as the inbox says."""
    async with asyncio.timeout(seconds):
        while True:
            claim, next_s = await inbox.claim()
            if claim is not None:
                return claim
            await asyncio.sleep(max(0.0, next_s or 0.0) + 0.01)


async def test_a_message_comes_back_as_it_was_put(inbox: Inbox) -> None:
    put = InboxMessage(
        "m1", "c1", 'Zeile 1\nZeile 2 "\u2028" \\ \x01 🙂', 12.25, {"domain": "banking", "overrides": {"seed": 7}}
    )
    assert await inbox.put(put)
    claim = await claimed(inbox)
    assert (claim.message, claim.num_deliveries, claim.is_stopped) == (put, 1, False)
    assert await inbox.finish(claim)
    assert await is_empty(inbox)
    assert (await inbox.state()).num_queued == 0


async def test_a_message_that_comes_again_is_taken_once(inbox: Inbox) -> None:
    assert await inbox.put(message("m1"))
    assert not await inbox.put(message("m1"))
    assert not await inbox.put(message("m1", "another conversation"))
    await inbox.finish(await claimed(inbox))
    assert not await inbox.put(message("m1"))  # a redelivery may come after the answer
    assert await is_empty(inbox)


async def test_how_many_messages_are_remembered_is_bounded(inbox: Inbox, redis: "Redis") -> None:
    fill = "for i = 1, ARGV[1] do redis.call('ZADD', KEYS[1], redis.call('TIME')[1] * 1000, i) end"
    await redis.eval(fill, 1, f"{PREFIX}seen", MAX_SEEN)  # type: ignore[misc]
    await inbox.put(message("m1"))
    assert await redis.zcard(f"{PREFIX}seen") == MAX_SEEN
    assert not await inbox.put(message("m1"))


async def test_messages_of_a_conversation_are_worked_in_order_one_at_a_time(inbox: Inbox) -> None:
    for number in range(3):
        await inbox.put(message(f"m{number}"))
    for number in range(3):
        claim = await claimed(inbox)
        assert claim.message.id == f"m{number}"
        assert await is_empty(inbox)  # nobody else gets the next one meanwhile
        await inbox.finish(claim)
    assert await is_empty(inbox)


async def test_conversations_take_turns(inbox: Inbox) -> None:
    for number in range(4):
        await inbox.put(message(f"long{number}", "talkative"))
    await inbox.put(message("short", "brief"))
    order = []
    for _ in range(5):
        claim = await claimed(inbox)
        order.append(claim.message.id)
        await inbox.finish(claim)
    assert order == ["long0", "short", "long1", "long2", "long3"]


async def test_a_message_that_comes_while_its_conversation_is_worked_waits_for_it(inbox: Inbox) -> None:
    await inbox.put(message("m1"))
    claim = await claimed(inbox)
    await inbox.put(message("m2"))
    assert await is_empty(inbox)
    await inbox.finish(claim)
    assert (await claimed(inbox)).message.id == "m2"


async def test_a_lease_that_ends_makes_the_conversation_ready_again(make_inbox: MakeInbox) -> None:
    inbox = make_inbox(lease_s=0.2)
    await inbox.put(message("m1"))
    await inbox.put(message("m2"))
    lost = await claimed(inbox)
    again = await claimed_in_time(inbox)
    assert (again.message.id, again.num_deliveries) == ("m1", 2)
    # Whoever lost it can do nothing with it any more.
    assert await inbox.renew(lost) == "lost"
    assert not await inbox.finish(lost)
    await inbox.release(lost)
    assert await is_empty(inbox)
    assert await inbox.finish(again)
    assert (await claimed(inbox)).message.id == "m2"


async def test_a_renewed_lease_is_kept(make_inbox: MakeInbox) -> None:
    inbox = make_inbox(lease_s=0.3)
    await inbox.put(message("m1"))
    claim = await claimed(inbox)
    async with inbox.keeping(claim):
        await asyncio.sleep(0.9)
        assert await is_empty(inbox)
        assert await inbox.renew(claim) == "leased"
    assert (await claimed_in_time(inbox)).message.id == "m1"


async def test_what_is_given_back_is_ready_at_once_or_later(inbox: Inbox) -> None:
    await inbox.put(message("m1"))
    await inbox.release(await claimed(inbox))
    claim = await claimed(inbox)
    assert claim.num_deliveries == 2
    await inbox.release(claim, is_undelivered=True)
    claim = await claimed(inbox)
    assert claim.num_deliveries == 2  # the last one did not count
    await inbox.release(claim, after_s=0.2)
    assert await is_empty(inbox)
    assert (await claimed_in_time(inbox)).num_deliveries == 3


async def test_what_is_delivered_too_often_goes_to_the_dead_letters_and_can_be_replayed(inbox: Inbox, events: Events) -> None:
    await inbox.put(message("poison", text="it kills"))
    await inbox.put(message("m2"))
    for delivery in range(1, MAX_DELIVERIES + 1):
        claim = await claimed(inbox)
        assert (claim.message.id, claim.num_deliveries) == ("poison", delivery)
        await inbox.release(claim)
    claim = await claimed(inbox)
    assert (claim.message.id, claim.num_deliveries) == ("m2", 1)
    (letter,) = await inbox.dead_letters()
    assert (letter.message, letter.num_deliveries) == (message("poison", text="it kills"), MAX_DELIVERIES)
    (event,) = await events.read("c1", "0")  # whoever waits for its answer learns it
    assert (event.data["type"], event.data["message_id"], event.data["error"]["code"]) == (
        "turn.failed",
        "poison",
        "dead_letter",
    )
    assert await inbox.replay(10) == 1
    assert await inbox.dead_letters() == []
    await inbox.finish(claim)
    claim = await claimed(inbox)
    assert (claim.message.id, claim.num_deliveries) == ("poison", 1)
    await inbox.finish(claim)
    assert (await inbox.state()).num_queued == 0


async def test_the_oldest_dead_letters_are_replayed_first(inbox: Inbox) -> None:
    for number in range(3):
        await inbox.put(message(f"m{number}", f"c{number}"))
        for _ in range(MAX_DELIVERIES):
            await inbox.release(await claimed(inbox))
        assert await is_empty(inbox)
    assert [letter.message.id for letter in await inbox.dead_letters()] == ["m2", "m1", "m0"]
    assert await inbox.replay(1) == 1
    assert (await claimed(inbox)).message.id == "m0"


async def test_past_its_bounds_nothing_is_taken_and_nothing_changes(make_inbox: MakeInbox) -> None:
    inbox = make_inbox(max_messages=3, max_conversation_messages=2)
    await inbox.put(message("m1"))
    await inbox.put(message("m2"))
    with pytest.raises(InboxFullError, match="2 messages of this conversation wait"):
        await inbox.put(message("m3"))
    await inbox.put(message("m4", "c2"))
    with pytest.raises(InboxFullError, match="3 messages wait"):
        await inbox.put(message("m5", "c3"))
    assert (await inbox.state()).num_queued == 3
    await inbox.finish(await claimed(inbox))
    await inbox.put(message("m5", "c3"))  # it was not taken for a duplicate of the refused one


async def test_messages_count_for_their_owners_as_long_as_they_are_there(inbox: Inbox) -> None:
    def owned(id_: str, conversation_id: str, *owners: str) -> InboxMessage:
        return InboxMessage(id_, conversation_id, "Hi", 1.5, {}, owners)

    limits = {"key": 2, "key:ann": 1}
    await inbox.put(owned("m1", "c1", "key", "key:ann"), limits)
    with pytest.raises(RateLimitedError):
        await inbox.put(owned("m2", "c2", "key", "key:ann"), limits)
    await inbox.put(owned("m3", "c2", "key", "key:bob"), limits | {"key:bob": 1})
    with pytest.raises(RateLimitedError):
        await inbox.put(owned("m4", "c3", "key"), limits)
    await inbox.put(owned("m5", "c4", "other"), {"other": 1})
    claim = await claimed(inbox)
    assert claim.message.owners == ("key", "key:ann")
    with pytest.raises(RateLimitedError):  # it is being answered: it counts
        await inbox.put(owned("m2", "c2", "key:ann"), limits)
    await inbox.finish(claim)
    await inbox.put(owned("m2", "c2", "key", "key:ann"), limits)
    while (claim := (await inbox.claim())[0]) is not None:
        await inbox.finish(claim)
    await inbox.put(owned("m6", "c1", "key", "key:ann"), limits)
    for _ in range(MAX_DELIVERIES):
        await inbox.release(await claimed(inbox))
    assert await is_empty(inbox)  # a dead letter does not count, until it is replayed
    await inbox.put(owned("m7", "c2", "key:ann"), limits)
    assert await inbox.replay(1) == 1
    with pytest.raises(RateLimitedError):
        await inbox.put(owned("m8", "c3", "key:ann"), limits)


async def test_a_stop_is_for_the_message_that_waits_or_is_answered(inbox: Inbox, redis: "Redis") -> None:
    assert await inbox.stop("c1") is None
    await inbox.put(message("m1"))
    await inbox.put(message("m2"))
    await inbox.put(message("m3"))
    assert await inbox.stop("c1", "m4") is None
    assert await inbox.stop("c1") == "m1"
    assert await inbox.stop("c1", "m3") == "m3"  # its turn has not come
    claim = await claimed(inbox)
    assert claim.is_stopped
    assert await inbox.renew(claim) == "stopped"
    await inbox.finish(claim)
    claim = await claimed(inbox)
    assert not claim.is_stopped
    assert await inbox.renew(claim) == "leased"
    assert await inbox.stop("c1", "m2") == "m2"
    assert await inbox.renew(claim) == "stopped"
    await inbox.finish(claim)
    claim = await claimed(inbox)
    assert claim.is_stopped
    await inbox.finish(claim)
    assert await redis.hlen(f"{PREFIX}stopped") == 0  # type: ignore[misc]


async def test_a_conversation_of_a_caller_with_a_message_of_their_own_is_claimed_too(make_inbox: MakeInbox) -> None:
    inbox = make_inbox(lease_s=0.3)
    claim = await inbox.claim_conversation("c1")
    assert claim is not None
    assert await inbox.claim_conversation("c1") is None
    await inbox.put(message("m1"))
    assert await is_empty(inbox)
    await inbox.release(claim)
    assert await inbox.claim_conversation("c1") is None  # a message waits, and it came first
    await inbox.finish(await claimed(inbox))
    assert await inbox.claim_conversation("c1") is not None
    await asyncio.sleep(0.35)
    assert await inbox.claim_conversation("c1") is not None  # its holder died


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    redis = OwnRedis(tmp_path)
    redis.start()
    yield redis
    redis.kill()


@asynccontextmanager
async def impatient_inbox(url: str) -> AsyncIterator[Inbox]:
    """Its lease is longer than the test."""
    async with Redis.from_url(url, socket_timeout=2, retry=Retry(NoBackoff(), 0)) as client:
        inbox = Inbox(client, PREFIX, TABLE_KEY, lease_s=120)
        yield inbox
        await inbox.close()


async def claimed_again(inbox: Inbox) -> Claim:
    async with asyncio.timeout(30):
        while True:
            with suppress(RedisUnavailableError):
                if (claim := await inbox.claim_conversation("c1")) is not None:
                    return claim
            await asyncio.sleep(0.05)


async def test_what_redis_could_not_be_told_is_given_back_when_it_answers_again(own_redis: OwnRedis) -> None:
    async with impatient_inbox(own_redis.url) as inbox, impatient_inbox(own_redis.url) as other:
        claim = await inbox.claim_conversation("c1")
        assert claim is not None
        assert await inbox.claim_conversation("c2") is not None
        own_redis.kill()
        await inbox.give_back(claim)
        await asyncio.to_thread(own_redis.start)
        assert (await claimed_again(other)).token != claim.token
        assert await other.claim_conversation("c2") is None  # it keeps the leases that it was told nothing of


@contextmanager
def frozen(own_redis: OwnRedis) -> Iterator[None]:
    """What is sent meanwhile is done when it goes on."""
    process_id = own_redis.client.info("server")["process_id"]
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


async def until_leased(own_redis: OwnRedis, conversation_id: str) -> None:
    async with asyncio.timeout(20):
        while not own_redis.client.hexists(f"{PREFIX}owners", conversation_id):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_claim_whose_answer_was_lost_is_given_back(own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bot.conversations.inbox._RELEASE_AGAIN_S", 5.0)
    async with impatient_inbox(own_redis.url) as inbox, impatient_inbox(own_redis.url) as other:
        await inbox.claim_conversation("c2")  # connected, and Redis knows the script
        with frozen(own_redis), pytest.raises(RedisUnavailableError):
            await inbox.claim_conversation("c1")
        await until_leased(own_redis, "c1")  # Redis did what nobody was told of
        await claimed_again(other)


async def test_a_claim_whose_caller_went_away_is_given_back(own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bot.conversations.inbox._RELEASE_AGAIN_S", 5.0)
    async with impatient_inbox(own_redis.url) as inbox, impatient_inbox(own_redis.url) as other:
        await inbox.claim_conversation("c2")
        with frozen(own_redis):
            claiming = asyncio.create_task(inbox.claim_conversation("c1"))
            await asyncio.sleep(0.2)  # it is on its way
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
        await until_leased(own_redis, "c1")
        await claimed_again(other)


async def test_a_message_whose_claim_nobody_was_told_of_is_there_again(
    own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that was no delivery."""
    monkeypatch.setattr("bot.conversations.inbox._RELEASE_AGAIN_S", 5.0)
    async with impatient_inbox(own_redis.url) as inbox:
        await is_empty(inbox)
        await inbox.put(message("m1"))
        with frozen(own_redis), pytest.raises(RedisUnavailableError):
            await inbox.claim()
        await until_leased(own_redis, "c1")
        async with asyncio.timeout(30):
            while (claim := (await inbox.claim())[0]) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (claim.message.id, claim.num_deliveries) == ("m1", 1)


async def test_a_claim_reads_the_pointer_tables_stamp_in_its_own_round_trip(inbox: Inbox, redis: "Redis") -> None:
    await inbox.put(message("m1"))
    assert (await claimed(inbox)).table.stamp is None
    await redis.hset(TABLE_KEY, mapping={"id": "abc", "epoch": 42, "pending": "t1,"})  # type: ignore[misc]
    await inbox.put(message("m2", "c2"))
    claim = await claimed(inbox)
    assert claim.table.stamp == TableStamp("abc", 42)
    assert claim.table.pending
    one = await inbox.claim_conversation("c3")
    assert one is not None
    assert one.table == claim.table


async def test_many_workers_on_many_conversations_lose_nothing_and_keep_order(make_inbox: MakeInbox) -> None:
    """Workers that give up, die and go on; in the end every message was finished once, in its conversation's order."""
    inbox = make_inbox(lease_s=0.3, max_conversation_messages=100)
    random.seed(4)
    expected = {f"c{n}": [f"c{n}-m{k}" for k in range(8)] for n in range(12)}
    finished: dict[str, list[str]] = {name: [] for name in expected}
    working: set[str] = set()

    async def work() -> None:
        while sum(map(len, finished.values())) < 96:
            claim, next_s = await inbox.claim()
            if claim is None:
                await asyncio.sleep(min(next_s or 0.05, 0.05))
                continue
            assert claim.conversation_id not in working
            working.add(claim.conversation_id)
            await asyncio.sleep(random.random() / 100)
            working.discard(claim.conversation_id)
            fate = random.random() if claim.num_deliveries < MAX_DELIVERIES else 1.0
            if fate < 0.1:
                await inbox.release(claim, is_undelivered=fate < 0.05)
            elif fate > 0.2 and await inbox.finish(claim):
                finished[claim.conversation_id].append(claim.message.id)

    async with asyncio.TaskGroup() as group:
        for messages in zip(*expected.values(), strict=True):
            for id_ in messages:
                await inbox.put(message(id_, id_.split("-")[0]))
        for _ in range(10):
            group.create_task(work())
    assert finished == expected


async def fill(inbox: Inbox) -> int:
    """Puts messages of a hundred kilobytes into fifty conversations until Redis has no memory left; gives how many it took."""
    for number in itertools.count():
        try:
            await inbox.put(message(f"m{number}", f"c{number % 50}", "x" * 100_000))
        except InboxFullError:
            return number
    raise AssertionError("it never ends")


async def test_a_full_redis_takes_no_message_loses_none_and_can_be_worked_off(tmp_path: Path) -> None:
    """With nothing left that may be evicted, `put` is refused whole; claiming, renewing and finishing go on."""
    with embedded_valkey(tmp_path / "valkey", memory_mb=16) as url:
        async with Redis.from_url(url) as redis:
            inbox = Inbox(redis, PREFIX, TABLE_KEY, max_messages=10**6, max_conversation_messages=10**6)
            await redis.hset(TABLE_KEY, mapping={"id": "abc", "epoch": 1})  # type: ignore[misc]
            await redis.set("frontdesk:blob:x", "b" * 1_000_000, ex=1000)
            num_taken = await fill(inbox)
            assert num_taken > 30
            with pytest.raises(InboxFullError, match="no memory"):
                await inbox.put(message("one more", text="x" * 100_000))
            assert await redis.hget(TABLE_KEY, "epoch") == b"1"  # type: ignore[misc]
            assert (await inbox.state()).num_queued == num_taken
            seen: dict[str, list[int]] = {}
            for _ in range(num_taken):
                claim = await claimed(inbox)
                assert await inbox.renew(claim) == "leased"
                seen.setdefault(claim.conversation_id, []).append(int(claim.message.id[1:]))
                assert await inbox.finish(claim)
            assert await is_empty(inbox)
            assert all(numbers == sorted(numbers) for numbers in seen.values())
            assert sorted(number for numbers in seen.values() for number in numbers) == list(range(num_taken))
            assert await inbox.put(message("after"))


async def test_redis_away_is_one_error(tmp_path: Path) -> None:
    async with Redis(unix_socket_path=str(tmp_path / "nowhere.sock"), retry=Retry(NoBackoff(), 0)) as redis:
        inbox = Inbox(redis, PREFIX, TABLE_KEY)
        for call in (inbox.put(message("m1")), inbox.claim(), inbox.stop("c1"), inbox.state(), inbox.dead_letters()):
            with pytest.raises(RedisUnavailableError):
                await call
