"""A turn: what is asked for, what is told of it, and what is known of it while it is under way."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from bot.answering import Answer, Overrides, Piece
from bot.conversations.inbox import Claim
from bot.conversations.records import Caller, ConversationState, FinishReason, LoggedTurn, new_id
from bot.routing.router import RoutingDecision
from prompt_bank.conversation import Message
from prompt_bank.errors import (
    BadRequestError,
    EngineBusyError,
    EngineStoppedError,
    FencedError,
    LogUnavailableError,
    RedisUnavailableError,
)
from prompt_bank.version import Version


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """`messages` are the whole conversation as the caller knows it, ending with the message to answer.

    `domains` are those the caller may use, None for all.
    """

    messages: Sequence[Message]
    domain: str | None = None
    domains: frozenset[str] | None = None
    conversation_id: str | None = None
    overrides: Overrides = field(default_factory=Overrides)
    num_answers: int = 1
    top_logprobs: int | None = None  # of each token, this many alternatives with their log probabilities; None is none at all


@dataclass(slots=True)
class HeldMessage:
    """A message of the inbox that is being answered. Its answer is cut short, and logged so, once `is_stopped` is set."""

    id: str
    queue_ms: float
    is_stopped: bool = False


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """Who answers. Domain and version are None for a clarifying question."""

    conversation_id: str
    turn_id: str
    decision: RoutingDecision
    version: Version | None


TextDelta = Piece  # of one of the answers


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """`answers` are all that were asked for; the first is the turn's."""

    turn: LoggedTurn
    answers: Sequence[Answer]


ChatEvent = TurnStarted | TextDelta | TurnFinished

# What another try, here or in another process, may not meet again.
TRANSIENT = (EngineBusyError, EngineStoppedError, RedisUnavailableError, LogUnavailableError, FencedError)

_UNDECIDED = RoutingDecision(domain=None, score=0.0, scores={}, reason="undecided")


@dataclass(slots=True)
class Turn:
    """What is known of a turn under way; logged however it ends."""

    request: ChatRequest
    conversation: ConversationState
    answers: Sequence[Answer]
    claim: Claim | None = None  # ours to give back
    held: HeldMessage | None = None
    creator: Caller | None = None  # of a conversation that is not logged yet
    decision: RoutingDecision = _UNDECIDED
    version: Version | None = None
    shadow: Version | None = None
    error: BaseException | None = None
    id: str = field(default_factory=new_id)

    @property
    def answer(self) -> Answer:
        """The one that is the turn's; the others are alternatives, kept beside it."""
        return self.answers[0]

    @property
    def is_cancelled(self) -> bool:
        return isinstance(self.error, asyncio.CancelledError | GeneratorExit)

    @property
    def is_logged(self) -> bool:
        """A refusal is its caller's affair, unless we hold the message; one that we hold is tried again after what may pass."""
        if self.held is None:
            return not isinstance(self.error, BadRequestError | EngineBusyError)
        return self.held.is_stopped if self.is_cancelled else not isinstance(self.error, TRANSIENT)

    @property
    def finish_reason(self) -> FinishReason:
        """The answer's, if all are whole: nobody has been given this one alone."""
        unfinished: FinishReason = "cancelled" if self.is_cancelled else "error"
        is_whole = all(answer.finish_reason for answer in self.answers)
        return (self.answer.finish_reason if is_whole else None) or unfinished
