"""Several streams as one, in the order in which their items come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def interleaved(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """The items of all `streams`. Closing this closes them all, and so does the error of one, which is raised here.

    No stream is read further ahead than one item. A task group cannot own the tasks: the consumer of this generator may be one
    task after another, and a group belongs to the task that opened it.
    """
    coming = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            _raise_first_error(done)  # before any item: a refusal comes with the first ones and is to be the only answer
            for task in [task for task in coming if task in done]:
                stream = coming.pop(task)
                if task.exception() is None:
                    coming[asyncio.ensure_future(anext(stream))] = stream
                    yield task.result()
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def _raise_first_error(done: "set[asyncio.Task[T]]") -> None:
    for error in [task.exception() for task in done]:
        if error is not None and not isinstance(error, StopAsyncIteration):
            raise error
