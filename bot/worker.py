"""Answers the messages of the inbox: claims conversations, has the chat answer their first message, tells it as events.

As many turns at a time as the engine has rows: when they are full nothing more is claimed, and what waits can go to another
process. A message is taken off the inbox once its turn is in the log. One that was logged already (its worker died in between)
is not answered again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

from bot import turn_events
from bot.answering import Overrides
from bot.chat import Chat
from bot.conversations.ending import end
from bot.conversations.events import Events
from bot.conversations.inbox import Inbox, InboxMessage, MessageClaim
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.conversations.records import ConversationState, LoggedTurn
from bot.telling import Telling
from bot.turn import TRANSIENT, ChatRequest, HeldMessage, TurnFinished
from prompt_bank.bank import Bank
from prompt_bank.conversation import Message
from prompt_bank.errors import (
    EngineStoppedError,
    FencedError,
    FrontdeskError,
    LogUnavailableError,
    RedisUnavailableError,
    UnknownConversationError,
)

log = logging.getLogger(__name__)

_MAX_IDLE_S = 5.0  # until it looks by itself, should a wake-up have been lost
_RETRY_S = 1.0
_CUT_AGAIN_S = 0.5  # redis-py may lose a cancellation: see `ending`
_MAX_HISTORY_TURNS = 200


_Answering = asyncio.Task[LoggedTurn | None]


class Worker:
    """One for each process. Used from one event loop, inside `running`."""

    def __init__(
        self,
        bank: Bank,
        chat: Chat,
        inbox: Inbox,
        events: Events,
        log_: ConversationLog,
        reader: LogReader,
        *,
        num_slots: int,
        can_answer: Callable[[], bool],
    ) -> None:
        """`can_answer` says whether there is an engine that works: without one, all is left to other processes."""
        self._bank = bank
        self._chat = chat
        self._inbox = inbox
        self._events = events
        self._log = log_
        self._reader = reader
        self._num_slots = num_slots
        self._can_answer = can_answer
        self._answers: dict[asyncio.Task[None], _Answering] = {}  # of each turn's task, the one that answers in it
        self._message_ids: set[str] = set()  # of what is being answered
        self._num_cut = 0
        self.is_draining = False
        self.claim_error: str | None = None  # the name of the unexpected error that nothing is claimed for

    def is_answering(self, message_id: str) -> bool:
        """In this process."""
        return message_id in self._message_ids

    def drain(self, within_s: float) -> None:
        """From now on nothing is claimed, and who follows a conversation is sent to another process.

        Answers under way may end `within_s`; what is left then goes back to the inbox. A later call can only shorten that.
        """
        self.is_draining = True
        self._events.wake_all()
        asyncio.get_running_loop().call_later(within_s, self._cut_short)

    def _cut_short(self) -> None:
        left = [answering for answering in self._answers.values() if not answering.done()]
        self._num_cut = max(self._num_cut, len(left))
        for answering in left:
            answering.cancel()
        if left:
            asyncio.get_running_loop().call_later(_CUT_AGAIN_S, self._cut_short)

    @asynccontextmanager
    async def running(self, drain_s: float) -> AsyncIterator[None]:
        """Works meanwhile, and drains on leaving."""
        claiming = asyncio.create_task(self._claim_all())
        try:
            yield
        finally:
            self.drain(drain_s)
            # Not cancelled: a claim on its way back would keep its conversation from others until its lease ends.
            await asyncio.gather(claiming, return_exceptions=True)
            await asyncio.gather(*self._answers, return_exceptions=True)
            await self._say_what_is_left()

    async def _say_what_is_left(self) -> None:
        num_waiting = -1
        with suppress(RedisUnavailableError):
            num_waiting = (await self._inbox.state()).num_queued
        if self._num_cut:
            log.warning("stopped with %d answers cut short, which go back to the inbox", self._num_cut)
        if num_waiting:
            number = num_waiting if num_waiting > 0 else "an unknown number"
            log.warning("messages that wait in the inbox for another process, or for the next start: %s", number)

    async def _claim_all(self) -> None:
        async with self._events.woken("ready") as wake:
            while not self.is_draining:
                idle_s = _RETRY_S
                try:
                    idle_s = await self._claim_some()
                    self.claim_error = None
                except FrontdeskError as error:
                    log.warning("nothing is claimed from the inbox: %s", error)
                except Exception as error:  # boundary: whatever it is, the messages must not wait for ever
                    log.error("nothing is claimed from the inbox, trying again", exc_info=error)
                    self.claim_error = type(error).__name__
                await wake.wait(idle_s)

    async def _claim_some(self) -> float:
        """Claims while there are free slots and ready conversations; gives the seconds to sleep unless woken."""
        while len(self._answers) < self._num_slots:
            if self.is_draining or not self._can_answer():
                return _MAX_IDLE_S
            claim, next_s = await self._inbox.claim()
            if claim is None:
                return min(_MAX_IDLE_S, next_s + 0.01 if next_s is not None else _MAX_IDLE_S)
            if self.is_draining:  # since this claim was sent
                await self._inbox.release(claim, is_undelivered=True)
            else:
                self._start(claim)
        await asyncio.wait(list(self._answers), return_when=asyncio.FIRST_COMPLETED)
        return 0.0

    def _start(self, claim: MessageClaim) -> None:
        held = HeldMessage(claim.message.id, (time.time() - claim.message.received_at) * 1000, claim.is_stopped)
        answering = asyncio.create_task(self._answer(claim, held))
        turn = asyncio.create_task(self._work(claim, held, answering))
        self._answers[turn] = answering
        self._message_ids.add(held.id)
        turn.add_done_callback(partial(self._forget, held.id))

    def _forget(self, message_id: str, turn: "asyncio.Task[None]") -> None:
        del self._answers[turn]
        self._message_ids.discard(message_id)
        if self.is_draining:
            self._events.wake_all()  # whoever waits for it here goes on elsewhere
        if not turn.cancelled() and (error := turn.exception()) is not None:
            log.error("a message stays in the inbox until its lease ends", exc_info=error)

    async def _work(self, claim: MessageClaim, held: HeldMessage, answering: _Answering) -> None:
        """One message from its claim to its end. It is never cancelled, only its answer is, so that it always ends in order."""
        keeping = asyncio.create_task(self._keep(claim, held, answering))
        await asyncio.wait({answering})
        await end(keeping)
        await self._end(claim, answering)

    async def _keep(self, claim: MessageClaim, held: HeldMessage, answering: _Answering) -> None:
        """Renews the lease, and ends the answer when it is lost or the message is stopped.

        One that is known to be stopped ends by itself: what logs it must not be cut short.
        """
        async with self._events.woken(f"stop:{claim.conversation_id}") as wake:
            while True:
                await wake.wait(self._inbox.lease_s / 3)
                try:
                    state = await self._inbox.renew(claim)
                except RedisUnavailableError as error:
                    log.warning("lease of %s not renewed: %s", claim.conversation_id, error)
                    continue
                if state == "lost":
                    log.warning("the lease of %s ended while message %s was answered", claim.conversation_id, held.id)
                if state == "lost" or (state == "stopped" and not held.is_stopped):
                    held.is_stopped = state == "stopped"
                    answering.cancel()
                    return

    async def _end(self, claim: MessageClaim, answering: _Answering) -> None:
        """Tells how it ended and takes the message away if the log has its turn, whoever wrote it; else gives it back."""
        error = asyncio.CancelledError() if answering.cancelled() else answering.exception()
        if not isinstance(error, FrontdeskError | asyncio.CancelledError | None):
            log.error("message %s failed at delivery %d", claim.message.id, claim.num_deliveries, exc_info=error)
        try:
            logged = answering.result() if error is None else None
            logged = logged or await self._logged(claim.message.id)
            if logged is not None:
                await self._finish(claim, turn_events.ended(logged))
            elif isinstance(error, UnknownConversationError):
                await self._finish(claim, turn_events.failed(claim.message.id, type(error).__name__, error.sentence))
            else:
                await self._give_back(claim, error)
        except FrontdeskError as failure:  # the lease ends by itself, and the log knows what was answered
            log.warning("message %s stays in the inbox for now: %s", claim.message.id, failure)

    async def _logged(self, message_id: str) -> LoggedTurn | None:
        with suppress(LogUnavailableError):  # the next delivery reads it again
            return await self._reader.turn_of_message(message_id)
        return None

    async def _finish(self, claim: MessageClaim, event: dict[str, Any]) -> None:
        with suppress(RedisUnavailableError):  # full, it takes no event but lets messages go; who follows reads the log
            await self._events.append(claim.conversation_id, claim.token, event)
        await self._inbox.finish(claim)

    async def _give_back(self, claim: MessageClaim, error: BaseException | None) -> None:
        """At once where another process may do better, else after a while; it counts as a delivery if it may happen again."""
        if error is not None and not isinstance(error, asyncio.CancelledError):
            log.warning("message %s of %s is tried again: %s", claim.message.id, claim.conversation_id, error)
        if isinstance(error, asyncio.CancelledError | EngineStoppedError):
            await self._inbox.release(claim, is_undelivered=True)
        elif error is None or (isinstance(error, TRANSIENT) and not isinstance(error, FencedError)):
            await self._inbox.release(claim, after_s=_RETRY_S, is_undelivered=True)
        else:
            await self._inbox.release(claim, after_s=_RETRY_S * claim.num_deliveries)

    async def _answer(self, claim: MessageClaim, held: HeldMessage) -> LoggedTurn | None:
        """Has the message answered and its turn logged, which it gives unless it was stopped.

        Raises what the chat raises, FencedError for a lost claim.
        """
        table = await self._bank.table_of(claim.table)
        taken_up = await self._log.take_up(claim.conversation_id, held.id, _MAX_HISTORY_TURNS)
        if isinstance(taken_up, LoggedTurn):
            return taken_up  # whoever logged it died before the message was taken away
        conversation, history = taken_up
        request = self._request(claim.message, conversation, history)
        if held.is_stopped:  # before it began
            await self._chat.log_stopped(request, conversation, held)
            return None
        events = self._chat.answer_message(request, conversation, table, held)
        async with aclosing(events), Telling(self._events, claim, held) as telling:
            async for event in events:
                if isinstance(event, TurnFinished):
                    return event.turn
                telling.tell(event)
                if held.is_stopped:
                    break
        return None

    def _request(self, message: InboxMessage, conversation: ConversationState, history: list[Message]) -> ChatRequest:
        fixed = conversation.domain if conversation.is_domain_fixed else None
        overrides, domains = message.settings.get("overrides", {}), message.settings.get("domains")
        return ChatRequest(
            messages=[*history, Message(role="user", content=message.text)],
            domain=message.settings.get("domain") or fixed,
            domains=frozenset(domains) if domains is not None else None,
            overrides=Overrides(**{**overrides, "stop": tuple(overrides.get("stop", ()))}),
        )
