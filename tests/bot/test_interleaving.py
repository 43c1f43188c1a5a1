"""Several streams as one: nothing lost, nothing read far ahead, and whatever ends it ends all of them."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from bot.interleaving import interleaved
from prompt_bank.errors import EngineBusyError


class Counting:
    """Streams of numbers that tell how far each was read and which were closed."""

    def __init__(self) -> None:
        self.read: dict[str, int] = {}
        self.closed: set[str] = set()

    async def stream(self, name: str, length: int, waits: asyncio.Event | None = None) -> AsyncGenerator[str, None]:
        try:
            for number in range(length):
                if waits is not None:
                    await waits.wait()
                self.read[name] = number + 1
                yield f"{name}{number}"
        finally:
            self.closed.add(name)


async def refused() -> AsyncGenerator[str, None]:
    raise EngineBusyError("3 requests are waiting, at most 3 may; try later")
    yield ""


async def test_every_item_of_every_stream_comes_in_its_own_order() -> None:
    counting = Counting()
    items = [item async for item in interleaved([counting.stream("a", 3), counting.stream("b", 1), counting.stream("c", 4)])]
    assert sorted(items) == ["a0", "a1", "a2", "b0", "c0", "c1", "c2", "c3"]
    assert [item for item in items if item[0] == "c"] == ["c0", "c1", "c2", "c3"]
    assert items.index("c0") < items.index("a1")  # they take turns
    assert [item async for item in interleaved([])] == []


async def test_a_stream_that_waits_keeps_no_other_from_going_on() -> None:
    counting, never = Counting(), asyncio.Event()
    merged = interleaved([counting.stream("a", 9, never), counting.stream("b", 9)])
    assert [await anext(merged) for _ in range(9)] == [f"b{n}" for n in range(9)]
    await merged.aclose()
    assert counting.closed == {"a", "b"}


async def test_closing_closes_all_and_none_was_read_far_ahead() -> None:
    counting = Counting()
    merged = interleaved([counting.stream("a", 50), counting.stream("b", 50)])
    for _ in range(4):
        await anext(merged)
    await merged.aclose()
    assert counting.closed == {"a", "b"}
    assert max(counting.read.values()) <= 4


async def test_a_refusal_is_the_only_answer_and_closes_the_others() -> None:
    counting = Counting()
    merged = interleaved([counting.stream("a", 5), refused(), counting.stream("b", 5)])
    with pytest.raises(EngineBusyError):
        await anext(merged)
    assert counting.closed == {"a", "b"}


async def test_a_consumer_that_is_cancelled_closes_all() -> None:
    counting, never = Counting(), asyncio.Event()

    async def consume() -> None:
        async for _ in interleaved([counting.stream("a", 5, never), counting.stream("b", 5, never)]):
            pass

    consuming = asyncio.ensure_future(consume())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    consuming.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consuming
    assert counting.closed == {"a", "b"}
