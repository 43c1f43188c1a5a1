"""One turn, end to end: route, fetch the version, render, generate, stream, log. The only orchestration there is.

Channels call `Chat.answer` and show its events; they know nothing of what happens in between.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace

from bot.access.roles import forbidden_domain
from bot.answering import Answer, Answerer
from bot.conversations.ending import Endings
from bot.conversations.inbox import Claim, Inbox
from bot.conversations.log import ConversationLog
from bot.conversations.records import Caller, ConversationState, LoggedTurn, new_id
from bot.routing.live import LiveRouter
from bot.routing.router import RoutingDecision
from bot.shadow import Shadows
from bot.telemetry import Telemetry
from bot.turn import ChatEvent, ChatRequest, HeldMessage, TextDelta, Turn, TurnFinished, TurnStarted
from prompt_bank.bank import Bank
from prompt_bank.card import Card
from prompt_bank.conversation import Message
from prompt_bank.errors import (
    BadRequestError,
    BankError,
    ConversationBusyError,
    EmptyMessageError,
    EngineBusyError,
    FencedError,
    LogUnavailableError,
    MessageTooLongError,
    RedisUnavailableError,
    UnknownDomainError,
)
from prompt_bank.pointers import PointerTable
from prompt_bank.version import ServedModel, Version

log = logging.getLogger(__name__)


class Chat:
    """Used from one event loop. Model work runs on the engine's thread, encoding on worker threads."""

    def __init__(
        self,
        bank: Bank,
        answerer: Answerer,
        router: LiveRouter,
        conversations: ConversationLog,
        inbox: Inbox,
        telemetry: Telemetry,
        shadows: Shadows,
        model: ServedModel,
        *,
        default_domain: str | None = None,
        max_message_chars: int = 20_000,
        max_turns: int = 80,
    ) -> None:
        self._bank = bank
        self._answerer = answerer
        self._router = router
        self._log = conversations
        self._inbox = inbox
        self._telemetry = telemetry
        self._model = model
        self._shadows = shadows
        self._default_domain = default_domain
        self._max_message_chars = max_message_chars
        self._max_turns = max_turns
        self._num_turns = 0
        self._endings = Endings()

    async def cards(self, domains: frozenset[str] | None = None) -> dict[str, Card]:
        """The live domains' cards by name; of `domains` alone if given."""
        live = (await self._bank.claim_table()).live_versions(self._model.fingerprint)
        return await self._bank.cards(_among(live, domains))

    async def answer(self, request: ChatRequest, caller: Caller) -> AsyncGenerator[ChatEvent, None]:
        """The events of one turn of a conversation that its caller keeps: TurnStarted, TextDelta ..., TurnFinished.

        Closing the generator cancels the generation; what was said so far is logged. Raises BadRequestError or EngineBusyError
        for a turn that was refused, which is not logged, and BankError or UnavailableError when no answer can be had.
        """
        started = time.monotonic()
        self._check(request.messages)
        # Before anything is done for it: routing and the log have queues of their own, which must not grow without bound.
        if self._num_turns >= self._max_turns:
            raise EngineBusyError(f"{self._num_turns} turns are under way, at most {self._max_turns} may be; try later")
        self._num_turns += 1
        try:
            table = await self._bank.claim_table()
            self._check_domain(request, table)
            conversation, claim, table = await self._claimed(request, caller, table)
            async with self._inbox.keeping(claim):
                answers = [Answer(started) for _ in range(request.num_answers)]
                turn = Turn(request, conversation, answers, claim, creator=None if conversation.fence else caller)
                async with aclosing(self._answer(turn, table)) as events:
                    async for event in events:
                        yield event
        finally:
            self._num_turns -= 1

    async def _claimed(
        self, request: ChatRequest, caller: Caller, table: PointerTable
    ) -> tuple[ConversationState, Claim | None, PointerTable]:
        """The conversation of a request, claimed: one turn of it at a time, over all processes; and the table as of then."""
        given_id, earlier = request.conversation_id, request.messages[:-1]
        found = await self._log.find(caller, given_id, earlier)
        if found is None and given_id is None:
            return ConversationState(new_id()), None, table  # logged with its first turn: one commit, and no empty ones
        if found is None:
            created = await self._log.create(caller, given_id)
            if created is not None:
                return created, None, table  # nobody else knows it yet
            found = await self._log.find(caller, given_id, earlier)
            assert found is not None
        try:
            claim = await self._inbox.claim_conversation(found.id)
        except RedisUnavailableError as error:
            self._bank.last_known(error)  # raises, unless we serve without Redis: then the fence alone keeps turns apart
            return await self._log.claim(found.id), None, table
        if claim is not None:
            return await self._fenced(claim)
        if given_id is not None:
            raise ConversationBusyError(f"a turn of conversation {given_id} is under way; wait for it, or cancel it")
        # The same words to the same answer, twice at once: one of them is another conversation from here on.
        return ConversationState(new_id()), None, table

    async def _fenced(self, claim: Claim) -> tuple[ConversationState, Claim, PointerTable]:
        try:
            return await self._log.claim(claim.conversation_id), claim, await self._bank.table_of(claim.table)
        except BaseException:  # without it nobody could go on in the conversation until the lease ends
            await self._inbox.give_back(claim)
            raise

    def answer_message(
        self, request: ChatRequest, conversation: ConversationState, table: PointerTable, held: HeldMessage
    ) -> AsyncGenerator[ChatEvent, None]:
        """The events of one turn of a conversation that we hold and have claimed; `request` has its history and the message.

        Closing the generator logs nothing unless the message was stopped: another is to answer it. Raises as `answer` does;
        what is not TRANSIENT has been logged.
        """
        return self._answer(Turn(request, conversation, [Answer()], held=held), table)

    async def log_stopped(self, request: ChatRequest, conversation: ConversationState, held: HeldMessage) -> None:
        """Logs a message that was stopped before its answer began. Raises LogUnavailableError or FencedError."""
        await self._record(Turn(request, conversation, [Answer()], held=held, error=asyncio.CancelledError()))

    def _check_domain(self, request: ChatRequest, table: PointerTable) -> None:
        live = table.live_versions(self._model.fingerprint)
        if request.domain is not None and request.domains is not None and request.domain not in request.domains:
            raise forbidden_domain(request.domain, request.domains)
        if request.domain is not None and request.domain not in live:
            raise UnknownDomainError.not_live(request.domain, _among(live, request.domains))

    async def _answer(self, turn: Turn, table: PointerTable) -> AsyncGenerator[ChatEvent, None]:
        try:
            pieces = await self._begun(turn, table)
            async with aclosing(pieces):
                first = await anext(pieces)  # refusals come before the answer is announced
                yield TurnStarted(turn.conversation.id, turn.id, turn.decision, turn.version)
                yield first
                async for piece in pieces:
                    yield piece
        except BaseException as error:
            turn.error = error
            raise
        finally:
            # A client that goes away must not take the record with it.
            logged = await self._endings.finish(self._end(turn))
        assert logged is not None
        yield TurnFinished(logged, turn.answers)

    async def _begun(self, turn: Turn, table: PointerTable) -> AsyncGenerator[TextDelta, None]:
        """Routes the turn and chooses its version; gives the pieces of its answer."""
        self._check(turn.request.messages)
        self._check_domain(turn.request, table)
        live = table.live_versions(self._model.fingerprint)
        turn.decision = await self._decide(turn.request, live, turn.conversation)
        if turn.decision.domain is None:
            return self._clarify(turn, live)
        turn.version = await self._bank.answering(table, turn.decision.domain, turn.conversation.id, self._model)
        turn.shadow = await self._bank.shadow(table, turn.decision.domain, self._model)
        return self._generate(turn)

    async def _live_instead(self, turn: Turn, error: BankError) -> Version:
        """The version that is live now, for a turn whose own cannot be loaded: a broken canary, or one that was deleted since.

        Raises `error` when that is the same one.
        """
        failed = turn.version
        assert failed is not None
        live = await self._bank.live(failed.manifest.domain, self._model)
        if live.manifest.version == failed.manifest.version:
            raise error
        log.error("turn %s: %s answers instead of %s: %s", turn.id, live.name, failed.name, error)
        return live

    async def _end(self, turn: Turn) -> LoggedTurn | None:
        """Logs the turn if it is to be, and only then gives its conversation back."""
        try:
            return await self._record(turn) if turn.is_logged else None
        finally:
            if turn.claim is not None:
                await self._inbox.give_back(turn.claim)

    async def close(self) -> None:
        """Waits for the records of turns whose clients went away, and for shadows; called before the log is closed."""
        await self._endings.wait()
        await self._shadows.close()

    def _check(self, messages: Sequence[Message]) -> None:
        if not messages or messages[-1].role != "user":
            raise BadRequestError("the last message must be the user's; put the question last")
        # Not the answers: a model can end one at once, or go on for long, and its caller sends it back with the next message.
        for message in messages:
            if message.role == "user":
                self.check_text(message.content)

    def check_text(self, text: str) -> None:
        """Of one message of a person. Raises EmptyMessageError or MessageTooLongError."""
        if not text.strip():
            raise EmptyMessageError("a message of the user has no text; send one with text")
        if len(text) > self._max_message_chars:
            raise MessageTooLongError(
                f"a message has {len(text)} characters, at most {self._max_message_chars} are taken; send a shorter one"
            )

    async def _decide(self, request: ChatRequest, live: Mapping[str, int], conversation: ConversationState) -> RoutingDecision:
        if request.domain is not None:
            return RoutingDecision(domain=request.domain, score=1.0, scores={}, reason="explicit")
        allowed = _among(live, request.domains)
        current = conversation.domain if conversation.domain in allowed else None
        questions = [message.content for message in request.messages if message.role == "user"]
        decision = await self._router.decide(live, questions[-1], questions[:-1], current, request.domains)
        if decision.domain is None and self._default_domain in allowed:
            return replace(decision, domain=self._default_domain, reason="default")
        return decision

    async def _clarify(self, turn: Turn, live: Mapping[str, int]) -> AsyncGenerator[TextDelta, None]:
        titles = [card.title for card in (await self._bank.cards(_among(live, turn.request.domains))).values()]
        for index, answer in enumerate(turn.answers):
            answer.text = clarifying_question(titles)
            answer.first_token_ms = answer.elapsed_ms()
            answer.finish_reason = "stop"
            yield TextDelta(answer.text, index)

    async def _generate(self, turn: Turn) -> AsyncGenerator[TextDelta, None]:
        """The first piece is given even when it has no text yet, so that the caller learns who answers."""
        pieces = self._pieces(turn)
        try:
            first = await anext(pieces)
        except BankError as error:
            turn.version = await self._live_instead(turn, error)
            pieces = self._pieces(turn)
            first = await anext(pieces)
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    def _pieces(self, turn: Turn) -> AsyncGenerator[TextDelta, None]:
        assert turn.version is not None
        request = turn.request
        return self._answerer.generate(turn.version, request.messages, request.overrides, turn.answers, request.top_logprobs)

    async def _record(self, turn: Turn) -> LoggedTurn:
        messages = turn.request.messages
        version, held = turn.version, turn.held
        logged = LoggedTurn(
            id=turn.id,
            message_id=held.id if held else None,
            conversation_id=turn.conversation.id,
            system=messages[0].content if messages[0].role == "system" else None,
            question=messages[-1].content,
            answer=turn.answer.text,
            alternatives=tuple(answer.text for answer in turn.answers[1:]),
            fingerprint=self._model.fingerprint,
            domain=version.manifest.domain if version else None,
            version=version.manifest.version if version else None,
            digest=version.digest if version else None,
            routing_reason=turn.decision.reason,
            routing_score=turn.decision.score,
            routing_scores=dict(turn.decision.scores),
            num_prompt_tokens=turn.answer.num_prompt_tokens,
            token_ids=tuple(turn.answer.token_ids),
            finish_reason=turn.finish_reason,
            error=type(turn.error).__name__ if turn.finish_reason == "error" else None,
            queue_ms=held.queue_ms if held else None,
            first_token_ms=turn.answer.first_token_ms,
            total_ms=turn.answer.elapsed_ms(),
        )
        try:
            transcript = None if held else [*messages, Message(role="assistant", content=turn.answer.text)]
            await self._log.append(logged, transcript, turn.conversation.fence, creator=turn.creator)
        except (LogUnavailableError, FencedError) as error:
            if held is None:  # else the message is answered again
                log.critical("turn not logged (%s): %s", error, json.dumps(asdict(logged)))  # all that is left of it
            raise
        self._telemetry.record(logged, sum(len(answer.token_ids) for answer in turn.answers[1:]))
        if turn.shadow not in (None, turn.version) and logged.is_whole:
            self._shadows.start(turn.id, turn.shadow, messages, turn.request.overrides)
        return logged


def _among(live: Mapping[str, int], domains: frozenset[str] | None) -> Mapping[str, int]:
    return live if domains is None else {domain: number for domain, number in live.items() if domain in domains}


def clarifying_question(titles: Sequence[str]) -> str:
    """What a person is asked when the router cannot tell the domain."""
    if not titles:
        return "I cannot help with anything yet. Please come back later."
    listed = titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} or {titles[-1]}"
    return f"I am not sure what your question is about. Is it {listed}? Please tell me a little more."
