"""The ends of tasks: of those that are to stop, though they may be waiting for Redis, and of what must not be stopped."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_AGAIN_S = 0.1
T = TypeVar("T")


class Endings:
    """Last work that is done also when its caller is being cancelled, as for a client that went away."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def wait(self) -> None:
        """For all that is under way; called before what it needs is closed."""
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def end(*tasks: "asyncio.Task[Any]") -> None:
    """Cancels tasks until they have ended, however they do.

    Once is not enough: redis-py (seen with 8.1) loses a cancellation that meets it while it connects.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)  # their errors are seen
