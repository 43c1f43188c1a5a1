"""Follows what happens in a conversation that the server holds, from any process and from any place in it."""

from collections.abc import AsyncGenerator

from bot import turn_events
from bot.conversations.events import MAX_PAGE, Event, Events, wait
from bot.conversations.reading import LogReader
from bot.worker import Worker

_HEARTBEAT_S = 15.0


class Follower:
    """Used from one event loop. Memory does not grow with a slow reader: events wait in Redis until they are asked for."""

    def __init__(self, events: Events, reader: LogReader, worker: Worker) -> None:
        self._events = events
        self._reader = reader
        self._worker = worker

    async def message(self, conversation_id: str, message_id: str, after: str) -> AsyncGenerator[Event | None, None]:
        """The events of one message's turn after the event `after`, to its end; None is a sign of life.

        Raises RedisUnavailableError, LogUnavailableError.
        """
        async with self._events.woken(conversation_id) as wake:
            while True:
                page = await self._events.read(conversation_id, after)
                for event in page:
                    after = event.id
                    if event.data["message_id"] == message_id:
                        yield event
                        if event.data["type"] in turn_events.ENDS:
                            return
                # What comes after the page was read wakes; only a full page has more behind it.
                if len(page) == MAX_PAGE or await wait(wake, _HEARTBEAT_S):
                    continue
                # Its last event may be lost: Redis was away, or full. The log is not.
                logged = await self._reader.turn_of_message(message_id)
                if logged is not None:
                    yield Event(after, turn_events.ended(logged))
                    return
                yield None

    async def conversation(self, conversation_id: str, after: str) -> AsyncGenerator[Event | None, None]:
        """All events after the event `after`, until this process is to stop; None is a sign of life.

        The first one is of type `events.lost` when some between are not kept any more. Raises RedisUnavailableError.
        """
        if not await self._events.has(conversation_id, after):
            yield Event(after, {"type": "events.lost", "message_id": None})
            after = "0"
        async with self._events.woken(conversation_id) as wake:
            while not self._worker.is_draining:
                page = await self._events.read(conversation_id, after)
                for event in page:
                    after = event.id
                    yield event
                if len(page) < MAX_PAGE and not await wait(wake, _HEARTBEAT_S):
                    yield None
