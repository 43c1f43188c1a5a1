"""The sandbox's time, which a test may stop and move on: five minutes pass without five minutes of waiting."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

# Times of today have a resolution of some 0.2 microseconds as floats: what is due by less than this is due.
_GRAIN_S = 1e-4


class Clock:
    """Seconds since the epoch, `speed` times as fast as they pass; with speed 0 only `advance` moves them."""

    def __init__(self, speed: float = 1.0) -> None:
        self._speed = speed
        self._origin = time.time()
        self._started = time.monotonic()
        self._advanced_s = 0.0
        self._moved = asyncio.Event()

    def now(self) -> float:
        return self._origin + self._advanced_s + (time.monotonic() - self._started) * self._speed

    def advance(self, seconds: float) -> None:
        self._advanced_s += seconds
        self._moved.set()
        self._moved = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        await self._sleep_until(self.now() + seconds)

    async def _sleep_until(self, due: float) -> None:
        while (left := due - self.now()) > _GRAIN_S:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), left / self._speed if self._speed else None)

    async def within(self, seconds: float, awaitable: Awaitable[T]) -> T:
        """Raises TimeoutError when so many seconds have passed on this clock."""
        waiting = asyncio.ensure_future(awaitable)
        timer = asyncio.ensure_future(self._sleep_until(self.now() + seconds))
        try:
            await asyncio.wait({waiting, timer}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise TimeoutError(f"nothing within {seconds} s")
            return waiting.result()
        finally:
            waiting.cancel()
            timer.cancel()
            await asyncio.gather(waiting, timer, return_exceptions=True)


class Changes:
    """Tells who waits that something has happened, so that nobody looks again and again."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], T], timeout_s: float | None = 20.0) -> T:
        """The first value of `condition` that counts as true; seconds are real ones. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not (value := condition()):
                await self._changed.wait()
            return value
