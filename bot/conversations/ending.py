"""Ends tasks that may be waiting for Redis."""

import asyncio
from typing import Any

_AGAIN_S = 0.1


async def end(*tasks: "asyncio.Task[Any]") -> None:
    """Cancels tasks until they have ended, however they do.

    Once is not enough: redis-py (seen with 8.1) loses a cancellation that meets it while it connects.
    """
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=_AGAIN_S)
    await asyncio.gather(*tasks, return_exceptions=True)  # their errors are seen
