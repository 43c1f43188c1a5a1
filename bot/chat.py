"""One turn, end to end: route, fetch the version, render, generate, stream, log. The only orchestration there is.

Channels call `Chat.answer` and show its events; they know nothing of what happens in between.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field, replace

from bot.answering import Answer, Answerer, Overrides
from bot.conversations.log import ConversationLog, ConversationState, LoggedTurn, new_id
from bot.routing.live import LiveRouter
from bot.routing.router import RoutingDecision
from bot.shadow import Shadows
from bot.telemetry import Telemetry
from prompt_bank.bank import Bank
from prompt_bank.card import Card
from prompt_bank.conversation import Message
from prompt_bank.errors import (
    BadRequestError,
    BankError,
    EmptyMessageError,
    EngineBusyError,
    LogUnavailableError,
    MessageTooLongError,
    UnknownDomainError,
)
from prompt_bank.version import ServedModel, Version

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """`messages` are the whole conversation as the caller knows it, ending with the message to answer."""

    messages: Sequence[Message]
    domain: str | None = None
    conversation_id: str | None = None
    overrides: Overrides = field(default_factory=Overrides)


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """Who answers. Domain and version are None for a clarifying question."""

    conversation_id: str
    turn_id: str
    decision: RoutingDecision
    version: Version | None


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class TurnFinished:
    turn: LoggedTurn


ChatEvent = TurnStarted | TextDelta | TurnFinished


@dataclass(slots=True)
class _Turn:
    """What is known of a turn under way; logged however it ends."""

    request: ChatRequest
    conversation: ConversationState
    decision: RoutingDecision
    version: Version | None
    shadow: Version | None
    answer: Answer
    id: str = field(default_factory=new_id)


class Chat:
    """Used from one event loop. Model work runs on the engine's thread, encoding on worker threads."""

    def __init__(
        self,
        bank: Bank,
        answerer: Answerer,
        router: LiveRouter,
        conversations: ConversationLog,
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
        self._telemetry = telemetry
        self._model = model
        self._shadows = shadows
        self._default_domain = default_domain
        self._max_message_chars = max_message_chars
        self._max_turns = max_turns
        self._num_turns = 0
        self._recordings: set[asyncio.Future[LoggedTurn]] = set()

    async def cards(self) -> dict[str, Card]:
        """The live domains' cards by name."""
        live = (await self._bank.claim_table()).live_versions(self._model.fingerprint)
        return await self._bank.cards(live)

    async def answer(self, request: ChatRequest, scope: str) -> AsyncGenerator[ChatEvent, None]:
        """The events of one turn: TurnStarted, TextDelta ..., TurnFinished.

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
            async with aclosing(self._answer(request, scope, started)) as events:
                async for event in events:
                    yield event
        finally:
            self._num_turns -= 1

    async def _answer(self, request: ChatRequest, scope: str, started: float) -> AsyncGenerator[ChatEvent, None]:
        table = await self._bank.claim_table()
        live = table.live_versions(self._model.fingerprint)
        if request.domain is not None and request.domain not in live:
            raise UnknownDomainError(f"no domain {request.domain!r} is live; there are: {', '.join(sorted(live)) or 'none'}")
        conversation = await self._log.find_or_create(scope, request.conversation_id, request.messages[:-1])
        decision = await self._decide(request, live, conversation)
        version = shadow = None
        if decision.domain is not None:
            version = await self._bank.answering(table, decision.domain, conversation.id, self._model)
            shadow = await self._bank.shadow(table, decision.domain, self._model)
        turn = _Turn(request, conversation, decision, version, shadow, Answer(started))
        events = self._clarify(turn, live) if version is None else self._generate(turn, version)
        is_refused = False
        try:
            try:
                first = await anext(events)  # refusals come before the answer is announced
            except BankError as error:
                turn.version = await self._live_instead(turn, error)
                events = self._generate(turn, turn.version)
                first = await anext(events)
            yield TurnStarted(conversation.id, turn.id, decision, turn.version)
            yield first
            async for piece in events:
                yield piece
        except (BadRequestError, EngineBusyError):
            is_refused = True
            raise
        except (asyncio.CancelledError, GeneratorExit):
            turn.answer.finish_reason = turn.answer.finish_reason or "cancelled"
            raise
        finally:
            await events.aclose()
            if not is_refused:
                logged = await self._record_shielded(turn)
        yield TurnFinished(logged)

    async def _live_instead(self, turn: _Turn, error: BankError) -> Version:
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

    async def _record_shielded(self, turn: _Turn) -> LoggedTurn:
        """A client that goes away must not take the record with it."""
        recording = asyncio.ensure_future(self._record(turn))
        self._recordings.add(recording)
        recording.add_done_callback(self._recordings.discard)
        return await asyncio.shield(recording)

    async def close(self) -> None:
        """Waits for the records of turns whose clients went away, and for shadows; called before the log is closed."""
        await asyncio.gather(*self._recordings, return_exceptions=True)
        await self._shadows.close()

    def _check(self, messages: Sequence[Message]) -> None:
        if not messages or messages[-1].role != "user":
            raise BadRequestError("the last message must be the user's; put the question last")
        # An answer may be blank: a model can end one at once, and its caller sends it back with the next message.
        if any(message.role == "user" and not message.content.strip() for message in messages):
            raise EmptyMessageError("a message of the user has no text; send one with text")
        longest = max(len(message.content) for message in messages)
        if longest > self._max_message_chars:
            raise MessageTooLongError(
                f"a message has {longest} characters, at most {self._max_message_chars} are taken; send a shorter one"
            )

    async def _decide(self, request: ChatRequest, live: Mapping[str, int], conversation: ConversationState) -> RoutingDecision:
        if request.domain is not None:
            return RoutingDecision(domain=request.domain, score=1.0, scores={}, reason="explicit")
        current = conversation.domain if conversation.domain in live else None
        questions = [message.content for message in request.messages if message.role == "user"]
        decision = await self._router.decide(live, questions[-1], questions[:-1], current)
        if decision.domain is None and self._default_domain in live:
            return replace(decision, domain=self._default_domain, reason="default")
        return decision

    async def _clarify(self, turn: _Turn, live: Mapping[str, int]) -> AsyncGenerator[TextDelta, None]:
        titles = [card.title for card in (await self._bank.cards(live)).values()]
        turn.answer.text = clarifying_question(titles)
        turn.answer.first_token_ms = turn.answer.elapsed_ms()
        turn.answer.finish_reason = "stop"
        yield TextDelta(turn.answer.text)

    async def _generate(self, turn: _Turn, version: Version) -> AsyncGenerator[TextDelta, None]:
        request = turn.request
        pieces = self._answerer.generate(version, request.messages, request.overrides, turn.answer)
        async with aclosing(pieces):
            async for piece in pieces:
                # The first event is given even when it has no text yet, so that the caller learns who answers.
                yield TextDelta(piece)

    async def _record(self, turn: _Turn) -> LoggedTurn:
        messages = turn.request.messages
        version = turn.version
        logged = LoggedTurn(
            id=turn.id,
            conversation_id=turn.conversation.id,
            system=messages[0].content if messages[0].role == "system" else None,
            question=messages[-1].content,
            answer=turn.answer.text,
            fingerprint=self._model.fingerprint,
            domain=version.manifest.domain if version else None,
            version=version.manifest.version if version else None,
            digest=version.digest if version else None,
            routing_reason=turn.decision.reason,
            routing_score=turn.decision.score,
            routing_scores=dict(turn.decision.scores),
            num_prompt_tokens=turn.answer.num_prompt_tokens,
            token_ids=tuple(turn.answer.token_ids),
            finish_reason=turn.answer.finish_reason or "error",
            first_token_ms=turn.answer.first_token_ms,
            total_ms=turn.answer.elapsed_ms(),
        )
        try:
            await self._log.append(logged, [*messages, Message(role="assistant", content=turn.answer.text)])
        except LogUnavailableError as error:
            log.critical("turn not logged (%s): %s", error, json.dumps(asdict(logged)))  # all that is left of it
            raise
        self._telemetry.record(logged)
        if turn.shadow not in (None, turn.version) and logged.finish_reason in ("stop", "length"):
            self._shadows.start(turn.id, turn.shadow, messages, turn.request.overrides)
        return logged


def clarifying_question(titles: Sequence[str]) -> str:
    """What a person is asked when the router cannot tell the domain."""
    if not titles:
        return "I cannot help with anything yet. Please come back later."
    listed = titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} or {titles[-1]}"
    return f"I am not sure what your question is about. Is it {listed}? Please tell me a little more."
