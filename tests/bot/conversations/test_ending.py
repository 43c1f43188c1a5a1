"""Tasks that lose a cancellation, as redis-py's connecting ones do, are ended all the same."""

import asyncio

import pytest

from bot.conversations.ending import end


async def deaf(num_lost: int) -> None:
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if num_lost == 0:
                raise
            num_lost -= 1


@pytest.mark.parametrize("num_lost", [0, 1, 3])
async def test_a_task_that_loses_cancellations_ends(num_lost: int) -> None:
    task = asyncio.create_task(deaf(num_lost))
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await end(task)
    assert task.cancelled()


async def test_a_task_that_failed_or_never_began_ends() -> None:
    async def fail() -> None:
        raise ValueError

    failed, unbegun = asyncio.create_task(fail()), asyncio.create_task(deaf(0))
    await asyncio.gather(failed, return_exceptions=True)
    await end(failed, unbegun)
    assert unbegun.cancelled()
