"""Answers the messages of the inbox: claims conversations, has the chat answer their first message, tells it as events.

As many turns at a time as the engine has rows: when they are full nothing more is claimed, and what waits can go to another
process. A message is taken off the inbox once its turn is in the log. One that was logged already (its worker died in between)
is not answered again.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress

from bot import turn_events
from bot.answering import Overrides
from bot.chat import Chat
from bot.conversations.events import Events, wait
from bot.conversations.inbox import Inbox, InboxMessage, MessageClaim
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.conversations.records import ConversationState
from bot.turn import TRANSIENT, ChatEvent, ChatRequest, HeldMessage, TextDelta, TurnStarted
from prompt_bank.bank import Bank
from prompt_bank.conversation import Message
from prompt_bank.errors import FencedError, FrontdeskError, RedisUnavailableError

log = logging.getLogger(__name__)

_MAX_IDLE_S = 5.0  # until it looks by itself, should a wake-up have been lost
_RETRY_S = 1.0
_MAX_HISTORY_TURNS = 200


class Worker:
    """One for each process. Used from one event loop, inside `running`."""

    def __init__(
        self, bank: Bank, chat: Chat, inbox: Inbox, events: Events, log_: ConversationLog, reader: LogReader, *, num_slots: int
    ) -> None:
        self._bank = bank
        self._chat = chat
        self._inbox = inbox
        self._events = events
        self._log = log_
        self._reader = reader
        self._num_slots = num_slots
        self._turns: set[asyncio.Task[None]] = set()
        self.is_draining = False

    @property
    def num_turns(self) -> int:
        return len(self._turns)

    def drain(self) -> None:
        """From now on nothing is claimed, and who follows a conversation is sent to another process."""
        self.is_draining = True
        self._events.wake_all()

    @asynccontextmanager
    async def running(self, drain_s: float) -> AsyncIterator[None]:
        """Works meanwhile. On leaving, turns under way may end within `drain_s`; what is left goes back to the inbox."""
        claiming = asyncio.create_task(self._claim_all())
        try:
            yield
        finally:
            self.drain()
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
            await self._drained(drain_s)

    async def _drained(self, drain_s: float) -> None:
        if self._turns:
            await asyncio.wait(self._turns, timeout=drain_s)
        left = set(self._turns)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        num_waiting = -1
        with suppress(RedisUnavailableError):
            num_waiting = (await self._inbox.state()).num_queued
        if left or num_waiting:
            log.warning(
                "stopped with %d answers cut short, which go back to the inbox; %s messages wait in it for another process",
                len(left),
                num_waiting if num_waiting >= 0 else "an unknown number of",
            )

    async def _claim_all(self) -> None:
        async with self._events.woken("ready") as wake:
            while True:
                try:
                    idle_s = await self._claim_some()
                except RedisUnavailableError as error:
                    log.warning("nothing is claimed from the inbox: %s", error)
                    idle_s = _RETRY_S
                await wait(wake, idle_s)

    async def _claim_some(self) -> float:
        """Claims while there are free slots and ready conversations; gives the seconds to sleep unless woken."""
        if self.is_draining:
            return _MAX_IDLE_S
        while len(self._turns) < self._num_slots and not self.is_draining:
            claim, next_s = await self._inbox.claim()
            if claim is None:
                return min(_MAX_IDLE_S, next_s + 0.01 if next_s is not None else _MAX_IDLE_S)
            self._start(claim)
        await asyncio.wait(self._turns, return_when=asyncio.FIRST_COMPLETED)
        return 0.0

    def _start(self, claim: MessageClaim) -> None:
        task = asyncio.create_task(self._work(claim))
        self._turns.add(task)
        task.add_done_callback(self._turns.discard)

    async def _work(self, claim: MessageClaim) -> None:
        """Answers one message. Cancelled, it gives the message back for another process."""
        held = HeldMessage(claim.message.id, (time.time() - claim.message.received_at) * 1000, claim.is_stopped)
        answering = asyncio.create_task(self._answer(claim, held))
        keeping = asyncio.create_task(self._keep(claim, held, answering))
        try:
            await asyncio.wait({answering})
        finally:
            answering.cancel()
            keeping.cancel()
            await asyncio.gather(answering, keeping, return_exceptions=True)
            await asyncio.shield(self._end(claim, held, answering))

    async def _keep(self, claim: MessageClaim, held: HeldMessage, answering: "asyncio.Task[None]") -> None:
        """Renews the lease, and ends the answer when it is lost or the message is stopped."""
        async with self._events.woken(f"stop:{claim.conversation_id}") as wake:
            while True:
                await wait(wake, self._inbox.lease_s / 3)
                try:
                    state = await self._inbox.renew(claim)
                except RedisUnavailableError as error:
                    log.warning("lease of %s not renewed: %s", claim.conversation_id, error)
                    continue
                if state != "held":
                    held.is_stopped = state == "stopped"
                    answering.cancel()
                    return

    async def _end(self, claim: MessageClaim, held: HeldMessage, answering: "asyncio.Task[None]") -> None:
        """Tells how it ended and takes the message away, or gives it back."""
        try:
            error = asyncio.CancelledError() if answering.cancelled() else answering.exception()
            if isinstance(error, FencedError):
                log.warning("conversation %s: %s", claim.conversation_id, error)
            elif isinstance(error, asyncio.CancelledError) and not held.is_stopped:
                await self._inbox.release(claim, is_undelivered=True)
            elif isinstance(error, TRANSIENT):
                log.warning("message %s is tried again: %s", claim.message.id, error)
                await self._inbox.release(claim, after_s=_RETRY_S, is_undelivered=True)
            elif error is not None and not isinstance(error, FrontdeskError):
                log.error("message %s failed at delivery %d", claim.message.id, claim.num_deliveries, exc_info=error)
                await self._inbox.release(claim, after_s=_RETRY_S * claim.num_deliveries)
            else:
                await self._tell_end(claim, error)
                await self._inbox.finish(claim)
        except FrontdeskError as failure:  # the lease ends by itself, and the log knows what was answered
            log.warning("message %s stays in the inbox for now: %s", claim.message.id, failure)

    async def _answer(self, claim: MessageClaim, held: HeldMessage) -> None:
        """Has the message answered and its turn logged. Raises what the chat raises, FencedError for a lost claim."""
        if await self._reader.turn_of_message(held.id) is not None:
            return  # whoever logged it died before the message was taken away
        table = await self._bank.table_of(claim.table)
        conversation = await self._log.claim(claim.conversation_id)
        request = await self._request(claim.message, conversation)
        if held.is_stopped:  # before it began
            await self._chat.log_stopped(request, conversation, held)
            return
        events = self._chat.answer_message(request, conversation, table, held)
        async with aclosing(events):
            async for event in events:
                await self._tell(claim, held, event)
                if held.is_stopped:
                    return

    async def _request(self, message: InboxMessage, conversation: ConversationState) -> ChatRequest:
        history = await self._reader.history(conversation.id, _MAX_HISTORY_TURNS)
        fixed = conversation.domain if conversation.is_domain_fixed else None
        overrides, domains = message.settings.get("overrides", {}), message.settings.get("domains")
        return ChatRequest(
            messages=[*history, Message(role="user", content=message.text)],
            domain=message.settings.get("domain") or fixed,
            domains=frozenset(domains) if domains is not None else None,
            overrides=Overrides(**{**overrides, "stop": tuple(overrides.get("stop", ()))}),
        )

    async def _tell(self, claim: MessageClaim, held: HeldMessage, event: ChatEvent) -> None:
        """Without Redis nobody hears it, but the answer goes on: the log is what counts. Raises FencedError."""
        if isinstance(event, TurnStarted):
            record = turn_events.started(held.id, event)
        elif isinstance(event, TextDelta) and event.text:
            record = turn_events.delta(held.id, event.text)
        else:
            return
        try:
            state = await self._events.append(claim.conversation_id, claim.token, record)
        except RedisUnavailableError:
            return
        if state == "lost":
            raise FencedError(f"the lease of {claim.conversation_id} ended while message {held.id} was answered")
        held.is_stopped = held.is_stopped or state == "stopped"

    async def _tell_end(self, claim: MessageClaim, error: BaseException | None) -> None:
        logged = await self._reader.turn_of_message(claim.message.id)
        if isinstance(error, FrontdeskError):
            record = turn_events.failed(claim.message.id, type(error).__name__, error.sentence)
        else:
            assert logged is not None, f"message {claim.message.id} was answered and is not in the log"
            record = turn_events.ended(logged)
        await self._events.append(claim.conversation_id, claim.token, record)
