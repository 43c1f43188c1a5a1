"""What the conversation routes take and give: conversations whose history the server holds, their messages and turns."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, Field, model_validator

from bot.channels.http.schema import MAX_ID_CHARS, OwnBody, PersonName, Routing, Seed, StopString, Text, Usage
from bot.conversations.records import ConversationRecord, FinishReason, TurnRecord, Vote
from bot.turn_events import described

Metadata = Annotated[dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]], Field(max_length=16)]
DomainName = Annotated[Text, Field(min_length=1, max_length=48)]
T = TypeVar("T")


class NewConversation(OwnBody):
    """With a `domain`, that one answers all of its turns; else the router chooses for each."""

    domain: DomainName | None = None
    user: PersonName | None = Field(default=None, description="whom it is with, for the limits of one person")
    metadata: Metadata = Field(default_factory=dict)


class ConversationObject(BaseModel):
    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int = Field(description="seconds since 1970")
    updated_at: int
    domain: str | None
    user: str | None
    channel: str
    metadata: dict[str, str]

    @classmethod
    def of(cls, record: ConversationRecord) -> "ConversationObject":
        return cls(
            id=record.id,
            created_at=int(record.created_at.timestamp()),
            updated_at=int(record.updated_at.timestamp()),
            domain=record.domain,
            user=record.person,
            channel=record.channel,
            metadata=record.metadata,
        )


class NewMessage(OwnBody):
    """A person's next message. The history is the server's."""

    text: Text = Field(min_length=1)
    stream: bool = Field(default=False, description="the turn as server-sent events, as it happens")
    background: bool = Field(default=False, description="answer 202 at once; read the turn's events, or its turns later")
    domain: DomainName | None = Field(default=None, description="answers this message, whatever the router says")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    seed: Seed | None = None
    stop: list[StopString] = Field(default_factory=list, max_length=4)

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> Self:
        if self.stream and self.background:
            raise ValueError(
                "stream and background exclude each other; follow a background message by the conversation's events"
            )
        return self

    def settings(self, domains: frozenset[str] | None) -> dict[str, Any]:
        """What the inbox keeps beside the text."""
        overrides = self.model_dump(include={"temperature", "top_p", "max_tokens", "seed", "stop"}, exclude_defaults=True)
        allowed = {"domains": sorted(domains)} if domains is not None else {}
        return {**({"domain": self.domain} if self.domain else {}), **allowed, "overrides": overrides}


class QueuedMessage(BaseModel):
    """`after` is where the conversation's events stood: reading on from it misses nothing of this message's turn."""

    object: Literal["conversation.message"] = "conversation.message"
    id: str
    conversation_id: str
    status: Literal["queued"] = "queued"
    after: str


class CancelRequest(OwnBody):
    message_id: Annotated[Text, Field(min_length=1, max_length=MAX_ID_CHARS)] | None = Field(
        default=None, description="the message that is not to be answered, or no further; the first that waits when left out"
    )


class CancelResult(BaseModel):
    """`message_id` is null when no such message waited or was being answered."""

    message_id: str | None


class TurnObject(BaseModel):
    """One exchange, as the person it was with sees it."""

    id: str
    object: Literal["conversation.turn"] = "conversation.turn"
    message_id: str | None
    conversation_id: str
    question: str
    answer: str
    author: Literal["bot", "human"]
    domain: str | None
    version: int | None
    digest: str | None
    finish_reason: FinishReason
    error: str | None
    routing: Routing
    usage: Usage
    queue_ms: float | None
    first_token_ms: float | None
    total_ms: float


class LoggedTurnObject(TurnObject):
    """With when it was, what was thought of it, and what a shadow would have said."""

    number: int
    created_at: datetime
    alternatives: list[str]
    vote: Vote | None
    reason: str | None
    correction: str | None
    shadow_version: int | None
    shadow_answer: str | None

    @classmethod
    def of(cls, record: TurnRecord) -> "LoggedTurnObject":
        shadow = record.shadow or {}
        return cls(
            **described(record.turn),
            number=record.number,
            created_at=record.created_at,
            alternatives=list(record.turn.alternatives),
            vote=record.vote,
            reason=record.reason,
            correction=record.correction,
            shadow_version=shadow.get("version"),
            shadow_answer=shadow.get("answer"),
        )


class Page(BaseModel, Generic[T]):
    """A page of a listing, in OpenAI's shape. `last_id` is what `after` takes for the next one."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, items: Sequence[T], ids: Sequence[str], limit: int) -> "Page[T]":
        """From one item more than was asked for, if there are so many."""
        shown = ids[:limit]
        return cls(
            data=list(items[:limit]),
            first_id=shown[0] if shown else None,
            last_id=shown[-1] if shown else None,
            has_more=len(items) > limit,
        )
