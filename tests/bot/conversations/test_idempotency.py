"""Idempotency keys on both databases: done once, whatever is sent again, at the same time, after a failure or a crash."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, update

from bot.conversations.database import Database, open_database
from bot.conversations.idempotency import IdempotentRequests, RequestKey
from bot.conversations.schema import idempotent_requests as requests
from prompt_bank.errors import IdempotencyMismatchError, RequestUnderWayError

KEY = RequestKey.of("me", "k", "route", {"a": 1})


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with open_database(database_url) as opened:
        yield opened


class Work:
    """Counts how often it is done; waits until it may end, or fails."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.num_done = 0
        self.error = error
        self.has_begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> dict[str, Any]:
        self.num_done += 1
        self.has_begun.set()
        await self.may_end.wait()
        if self.error is not None:
            raise self.error
        return {"n": self.num_done}


def prompt_work(error: BaseException | None = None) -> Work:
    work = Work(error)
    work.may_end.set()
    return work


async def test_the_same_request_is_done_once_and_answered_alike(database: Database) -> None:
    kept, work = IdempotentRequests(database), prompt_work()
    assert [await kept.once(KEY, work) for _ in range(3)] == [{"n": 1}] * 3
    assert await IdempotentRequests(database).once(KEY, work) == {"n": 1}  # as another process would
    assert [await kept.once(None, work) for _ in range(2)] == [{"n": 2}, {"n": 3}]  # negative control: without a key


async def test_order_of_fields_does_not_matter_and_everything_else_does(database: Database) -> None:
    kept, work = IdempotentRequests(database), prompt_work()
    await kept.once(RequestKey.of("me", "k", "route", {"a": 1, "b": 2}), work)
    assert await kept.once(RequestKey.of("me", "k", "route", {"b": 2, "a": 1}), work) == {"n": 1}
    for route, body in (("route", {"a": 1, "b": 3}), ("other route", {"a": 1, "b": 2})):
        with pytest.raises(IdempotencyMismatchError, match="'k' came with another request before; take a new key"):
            await kept.once(RequestKey.of("me", "k", route, body), work)
    assert await kept.once(RequestKey.of("you", "k", "route", {"a": 1, "b": 3}), work) == {"n": 2}  # of somebody else
    assert await kept.once(RequestKey.of("me", "K", "route", {"a": 1, "b": 3}), work) == {"n": 3}


async def test_of_many_at_the_same_time_one_is_done(database: Database) -> None:
    kept, work = IdempotentRequests(database), Work()
    many = [asyncio.ensure_future(kept.once(KEY, work)) for _ in range(8)]
    await work.has_begun.wait()
    while sum(one.done() for one in many) < 7:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    work.may_end.set()
    outcomes = await asyncio.gather(*many, return_exceptions=True)
    assert outcomes.count({"n": 1}) == 1
    assert [type(outcome) for outcome in outcomes if outcome != {"n": 1}] == [RequestUnderWayError] * 7
    assert (work.num_done, await kept.once(KEY, work)) == (1, {"n": 1})


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError()], ids=["failed", "cancelled"])
async def test_after_a_failure_the_key_is_free_again(database: Database, error: BaseException) -> None:
    kept = IdempotentRequests(database)
    with pytest.raises(type(error)):
        await kept.once(KEY, prompt_work(error))
    other = RequestKey.of("me", "k", "route", {"a": 2})
    assert await kept.once(other, prompt_work()) == {"n": 1}


async def test_who_died_is_succeeded_and_does_not_come_back(database: Database) -> None:
    kept = IdempotentRequests(database)
    dead, _ = await kept.begin(KEY)
    with pytest.raises(RequestUnderWayError):
        await kept.begin(KEY)
    await age(database, timedelta(minutes=11))
    successor, stored = await kept.begin(KEY)
    assert (successor != dead, stored) == (True, None)
    # What the first one does now, if it was only slow, changes nothing.
    await kept.forget(KEY, dead)
    await kept.finish(KEY, dead, {"from": "the dead"})
    with pytest.raises(RequestUnderWayError):
        await kept.begin(KEY)
    await kept.finish(KEY, successor, {"from": "the successor"})
    assert await kept.begin(KEY) == (successor, {"from": "the successor"})


async def test_keys_are_kept_for_a_day(database: Database) -> None:
    kept, work = IdempotentRequests(database), prompt_work()
    await kept.once(KEY, work)
    await age(database, timedelta(hours=23))
    assert await kept.once(KEY, work) == {"n": 1}
    await age(database, timedelta(hours=2))
    assert await kept.once(RequestKey.of("me", "k", "route", "another"), work) == {"n": 2}
    async with database.reading() as connection:
        assert (await connection.execute(select(func.count()).select_from(requests))).scalar_one() == 1


async def test_what_a_request_makes_has_the_same_id_each_time(database: Database) -> None:
    kept = IdempotentRequests(database)
    ids = await asyncio.gather(*(kept.id_for(KEY) for _ in range(8)))
    assert len(set(ids)) == 1
    await age(database, timedelta(hours=1))
    assert await kept.id_for(KEY) == ids[0]
    assert await kept.id_for(RequestKey.of("you", "k", "route", {"a": 1})) != ids[0]
    with pytest.raises(IdempotencyMismatchError):
        await kept.id_for(RequestKey.of("me", "k", "route", {"a": 2}))
    await kept.forget(KEY, ids[0])
    assert await kept.id_for(RequestKey.of("me", "k", "route", {"a": 2})) != ids[0]


async def age(database: Database, by: timedelta) -> None:
    """Makes all there is older."""
    async with database.writing() as connection:
        created_at = (await connection.execute(select(requests.c.created_at))).scalars().one()
        assert created_at <= datetime.now(UTC)
        await connection.execute(update(requests).values(created_at=created_at - by))
