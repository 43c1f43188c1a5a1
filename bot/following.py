"""Follows what happens in a conversation that the server holds, from any process and from any place in it."""

import time
from collections.abc import AsyncGenerator
from typing import Any

from bot import turn_events
from bot.conversations.events import MAX_PAGE, Event, Events, Wake
from bot.conversations.inbox import Inbox
from bot.conversations.reading import LogReader
from bot.worker import Worker
from prompt_bank.errors import EngineStoppedError, FrontdeskError, LogUnavailableError, RedisUnavailableError

_HEARTBEAT_S = 15.0
_SLOW_S = 30.0  # of a reader: what it has not read yet may not be kept any more


class Follower:
    """Used from one event loop. Memory does not grow with a slow reader: events wait in Redis until they are asked for."""

    def __init__(
        self, events: Events, inbox: Inbox, reader: LogReader, worker: Worker, heartbeat_s: float = _HEARTBEAT_S
    ) -> None:
        self._events = events
        self._inbox = inbox
        self._reader = reader
        self._worker = worker
        self._heartbeat_s = heartbeat_s

    async def message(
        self, conversation_id: str, message_id: str, after: str, is_new: bool
    ) -> AsyncGenerator[Event | None, None]:
        """The events of one message's turn after the event `after`, to its end; None is a sign of life.

        The message is acknowledged, so this waits for it however long Redis or the log are away; but not in a process that
        stops and does not answer it itself: EngineStoppedError. Unless it `is_new` it may have ended long ago.
        """
        may_be_over = not is_new
        async with self._events.woken(conversation_id) as wake:
            told_at = time.monotonic()
            while True:
                page = await self._page(conversation_id, after, wake)
                for event in page:
                    after = event.id
                    if event.data["message_id"] == message_id:
                        yield event
                        if event.data["type"] in turn_events.ENDS:
                            return
                        told_at = time.monotonic()
                if time.monotonic() - told_at > self._heartbeat_s:  # other messages come before it
                    yield None
                    told_at = time.monotonic()
                # What comes after the page was read wakes; only a full page has more behind it.
                if len(page) == MAX_PAGE:
                    continue
                is_left_to_others = self._worker.is_draining and not self._worker.is_answering(message_id)
                if not is_left_to_others and not may_be_over and await wake.wait(self._heartbeat_s):
                    continue
                # Its last event may be lost: Redis was away, or full, or it was long ago. The log is not.
                end = await self._end(conversation_id, message_id)
                if end is not None:
                    yield Event(after, end)
                    return
                if is_left_to_others:
                    raise EngineStoppedError(f"this process is stopping; another answers message {message_id}")
                may_be_over = False
                yield None
                told_at = time.monotonic()

    async def _end(self, conversation_id: str, message_id: str) -> dict[str, Any] | None:
        """How a message's turn ended, if it has; one that neither waits nor was answered has failed."""
        try:
            is_waiting = await self._inbox.has(conversation_id, message_id)  # first: it is logged before it is taken away
            logged = await self._reader.turn_of_message(message_id)
        except (LogUnavailableError, RedisUnavailableError):
            return None  # nobody can tell for now
        if logged is not None:
            return turn_events.ended(logged)
        return None if is_waiting else turn_events.failed(message_id, "dead_letter", FrontdeskError.sentence)

    async def _page(self, conversation_id: str, after: str, wake: Wake) -> list[Event]:
        """Empty while Redis is away: its return wakes all."""
        try:
            return await self._events.next(conversation_id, after, wake)
        except RedisUnavailableError:
            return []

    async def conversation(self, conversation_id: str, after: str) -> AsyncGenerator[Event | None, None]:
        """All events after the event `after`, until this process is to stop; None is a sign of life.

        One of type `events.lost` stands where some are not kept any more. Raises RedisUnavailableError.
        """
        if not await self._events.has(conversation_id, after):
            after = "0"  # never what was sent: an id is a line of its own in the stream
            yield Event(after, {"type": "events.lost", "message_id": None})
        async with self._events.woken(conversation_id) as wake:
            while not self._worker.is_draining:
                page = await self._events.next(conversation_id, after, wake)
                began = time.monotonic()
                for event in page:
                    after = event.id
                    yield event
                if time.monotonic() - began > _SLOW_S and not await self._events.has(conversation_id, after):
                    yield Event(after, {"type": "events.lost", "message_id": None})
                if len(page) < MAX_PAGE and not await wake.wait(self._heartbeat_s):
                    yield None
