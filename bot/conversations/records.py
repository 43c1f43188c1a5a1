"""What the conversation log takes and gives, as plain values."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import uuid4

Vote = Literal["up", "down"]
FinishReason = Literal["stop", "length", "cancelled", "error"]
Channel = Literal["api"]

WHOLE: tuple[FinishReason, ...] = ("stop", "length")


def new_id() -> str:
    return uuid4().hex


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose a conversation is: `scope` is an API key's id (or a channel's own name), `person` who speaks through it."""

    scope: str
    person: str | None = None


@dataclass(frozen=True, slots=True)
class ConversationState:
    """What the next turn of a conversation needs to know. `fence` is the number of its last claim, 0 before it is logged."""

    id: str
    domain: str | None = None
    is_domain_fixed: bool = False
    fence: int = 0


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """A conversation as it is listed."""

    id: str
    scope: str
    person: str | None
    channel: str
    domain: str | None
    metadata: dict[str, str]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class LoggedTurn:
    """One exchange. `domain`, `version` and `digest` are None where no version answered (a clarifying question).

    `message_id` is the inbox entry that was answered, None for a turn that came with its whole conversation; `error` the name
    of what failed; `queue_ms` how long the message waited in the inbox.
    """

    conversation_id: str
    question: str
    answer: str
    fingerprint: str
    routing_reason: str
    finish_reason: FinishReason
    total_ms: float
    id: str = field(default_factory=new_id)
    message_id: str | None = None
    system: str | None = None
    alternatives: tuple[str, ...] = ()
    author: Literal["bot", "human"] = "bot"
    domain: str | None = None
    version: int | None = None
    digest: str | None = None
    routing_score: float | None = None
    routing_scores: dict[str, float] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    error: str | None = None
    queue_ms: float | None = None
    first_token_ms: float | None = None

    @property
    def is_whole(self) -> bool:
        return self.finish_reason in WHOLE


@dataclass(frozen=True, slots=True)
class ShadowAnswer:
    """What the shadow version would have answered in a turn."""

    turn_id: str
    version: int
    digest: str | None
    answer: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    total_ms: float


@dataclass(frozen=True, slots=True)
class TurnFilter:
    """Which turns are listed; what is None does not count. `text` are words that all must occur in question or answer."""

    conversation_id: str | None = None
    text: str | None = None
    domains: frozenset[str] | None = None
    version: int | None = None
    vote: Vote | None = None
    finish_reason: FinishReason | None = None
    since: datetime | None = None
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A logged turn as it is listed, with its latest feedback and its shadow answer. `number` is the cursor of listings."""

    number: int
    created_at: datetime
    turn: LoggedTurn
    vote: Vote | None
    reason: str | None
    correction: str | None
    shadow: dict[str, Any] | None = None
