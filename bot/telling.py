"""Tells the turn of a held message as events while it is answered."""

import asyncio
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from bot import turn_events
from bot.conversations.ending import end
from bot.conversations.events import Events
from bot.conversations.inbox import MessageClaim
from bot.turn import HeldMessage, TextDelta, TurnStarted
from prompt_bank.errors import FencedError, RedisUnavailableError

_BETWEEN_S = 0.04  # shorter than a reader notices; an engine that is faster costs Redis and its followers no more for it


class Telling:
    """An answer never waits for Redis: text that comes while an event is on its way, or very soon after it, goes together with
    the next one.

    Leaving waits until all is told; on an error what is left is dropped. Without Redis nobody hears it, but the answer goes on:
    the log is what counts.
    """

    def __init__(self, events: Events, claim: MessageClaim, held: HeldMessage) -> None:
        self._events = events
        self._claim = claim
        self._held = held
        self._untold: deque[dict[str, Any]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_lost = False
        self._is_leaving = asyncio.Event()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._task is None:
            return
        if error is None:
            self._is_leaving.set()
            await self._task
            self._check()
        else:
            await end(self._task)

    def tell(self, event: TurnStarted | TextDelta) -> None:
        """Raises FencedError once the conversation's lease is known to have ended."""
        self._check()
        if isinstance(event, TurnStarted):
            self._untold.append(turn_events.started(self._held.id, event))
        elif self._untold and self._untold[-1]["type"] == turn_events.DELTA:
            self._untold[-1]["text"] += event.text
        elif event.text:
            self._untold.append(turn_events.delta(self._held.id, event.text))
        if self._untold and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._tell_all())

    def _check(self) -> None:
        if self._task is not None and self._task.done():
            self._task.result()  # raises what nobody expected
        if self._is_lost:
            raise FencedError(f"the lease of {self._claim.conversation_id} ended while message {self._held.id} was answered")

    async def _tell_all(self) -> None:
        while self._untold and not self._is_lost:
            event = self._untold.popleft()
            try:
                state = await self._events.append(self._claim.conversation_id, self._claim.token, event)
            except RedisUnavailableError:
                continue
            self._is_lost = state == "lost"
            self._held.is_stopped = self._held.is_stopped or state == "stopped"
            if event["type"] != turn_events.DELTA:
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_BETWEEN_S):
                    await self._is_leaving.wait()
