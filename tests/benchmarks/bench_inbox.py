"""Claims a second of the inbox: processes that claim and finish messages from one Valkey, on its Unix socket.

The server is the embedded one, with its append-only file and `appendfsync always`: what several processes do in one round of
its event loop shares an fsync. A message is claimed and finished, which are two scripts and two writes to disk.
"""

import asyncio
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from redis.asyncio import Redis

from bot.conversations.inbox import Inbox, InboxMessage
from prompt_bank.valkey import embedded_valkey

_PREFIX = "frontdesk:bench:"
_TASKS = 8  # of each process: it waits for Redis most of the time


def _inbox(redis: "Redis") -> Inbox:
    return Inbox(redis, _PREFIX, f"{_PREFIX}pointers", max_messages=1_000_000)


async def _fill(url: str, count: int) -> None:
    async with Redis.from_url(url) as redis:
        await redis.flushall()
        inbox = _inbox(redis)
        for first in range(0, count, 100):
            messages = (
                InboxMessage(f"m{n}", f"c{n}", "Where is my card?", 1.0, {}) for n in range(first, min(first + 100, count))
            )
            await asyncio.gather(*(inbox.put(message) for message in messages))


async def _work(url: str, seconds: float) -> tuple[int, float]:
    """How many this process worked off, in how many seconds."""
    count, started = 0, time.perf_counter()

    async def claim_and_finish(inbox: Inbox) -> None:
        nonlocal count
        while time.perf_counter() - started < seconds:
            claim, _ = await inbox.claim()
            if claim is None:
                return
            assert await inbox.finish(claim)
            count += 1

    async with Redis.from_url(url) as redis, asyncio.TaskGroup() as group:
        for _ in range(_TASKS):
            group.create_task(claim_and_finish(_inbox(redis)))
    return count, time.perf_counter() - started


def _in_process(url: str, seconds: float) -> tuple[int, float]:
    return asyncio.run(_work(url, seconds))


async def claims(folder: Path, num_processes: int, seconds: float) -> float:
    """Conversations claimed and finished a second, of all processes together."""
    with embedded_valkey(folder) as url, ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(pool, _in_process, url, 0.0) for _ in range(num_processes)))  # started
        await _fill(url, int(2000 * seconds))
        worked = await asyncio.gather(*(loop.run_in_executor(pool, _in_process, url, seconds) for _ in range(num_processes)))
    return sum(count / elapsed_s for count, elapsed_s in worked)
