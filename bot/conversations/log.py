"""The conversation log: every turn with the version that answered it, in SQL. Knows nothing of channels, engine or routing.

A turn is written once, when it has ended, however it ended. Feedback joins to exactly one turn.
"""

import hashlib
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from sqlalchemy import ColumnElement, Row, func, insert, literal, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from bot.conversations.database import Database, open_database
from bot.conversations.schema import conversations, feedback, shadow_answers, turns
from prompt_bank.conversation import AnswerRecord, Conversation, Message
from prompt_bank.errors import UnknownTurnError

Vote = Literal["up", "down"]
FinishReason = Literal["stop", "length", "cancelled", "error"]

# Between a caller's scope and the person it speaks for. No "/", or a caller without persons would continue theirs.
PERSON_MARK = ":"

_WHOLE = ("stop", "length")


def new_id() -> str:
    return uuid4().hex


def transcript_digest(messages: Sequence[Message]) -> str:
    """Identifies a conversation by what was said; system messages do not count, since clients change them between turns."""
    digest = hashlib.sha256()
    for message in messages:
        if message.role != "system":
            digest.update(f"{message.role}\x1f{message.content}\x1e".encode())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ConversationState:
    """What the next turn of a conversation needs to know."""

    id: str
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class LoggedTurn:
    """One exchange. `domain`, `version` and `digest` are None where no version answered (a clarifying question)."""

    conversation_id: str
    question: str
    answer: str
    fingerprint: str
    routing_reason: str
    finish_reason: FinishReason
    total_ms: float
    id: str = field(default_factory=new_id)
    system: str | None = None
    author: Literal["bot", "human"] = "bot"
    domain: str | None = None
    version: int | None = None
    digest: str | None = None
    routing_score: float | None = None
    routing_scores: dict[str, float] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    first_token_ms: float | None = None


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


class ConversationLog:
    """Safe to use from many tasks of one event loop."""

    def __init__(self, database: Database) -> None:
        self._writing, self._reading = database.writing, database.reading

    async def check(self) -> None:
        """Raises LogUnavailableError when the database does not answer."""
        async with self._reading() as connection:
            await connection.execute(select(literal(1)))

    async def find_or_create(self, scope: str, given_id: str | None, earlier: Sequence[Message]) -> ConversationState:
        """The conversation a message belongs to: the one with the given id; else one whose messages so far equal `earlier`;
        else a new one. `scope` separates callers: nobody continues another's conversation."""
        async with self._writing() as connection:
            if given_id is not None:
                return await _by_key(connection, f"{scope}/{given_id}", given_id)
            if any(message.role != "system" for message in earlier):
                found = await _by_transcript(connection, scope, transcript_digest(earlier))
                if found is not None:
                    return found
            id_ = new_id()
            return await _by_key(connection, f"{scope}/{id_}", id_)

    async def append(self, turn: LoggedTurn, messages: Sequence[Message]) -> None:
        """Writes a turn and moves its conversation on; `messages` are the conversation's, with this answer as the last.

        A turn that was cancelled or failed moves nothing: its caller asks again with the messages that were there before.
        """
        async with self._writing() as connection:
            position = select(func.coalesce(func.max(turns.c.position) + 1, 0)).where(
                turns.c.conversation_id == turn.conversation_id
            )
            values = {**asdict(turn), "created_at": datetime.now(UTC), "position": position.scalar_subquery()}
            await connection.execute(insert(turns).values(values))
            if turn.finish_reason not in _WHOLE:
                return
            moved: dict[str, Any] = {"transcript": transcript_digest(messages)}
            if turn.domain is not None:
                moved["domain"] = turn.domain
            await connection.execute(update(conversations).where(conversations.c.id == turn.conversation_id).values(moved))

    async def add_feedback(
        self, turn_id: str, vote: Vote, reason: str | None, correction: str | None, scope: str | None = None
    ) -> None:
        """Raises UnknownTurnError, also for a turn outside `scope` if one is given, persons' scopes within it counted."""
        values = {"turn_id": turn_id, "vote": vote, "reason": reason, "correction": correction}
        unknown = UnknownTurnError(f"no turn {turn_id!r} is logged; give the turn_id of an answer")
        try:
            async with self._writing() as connection:
                if scope is not None and not await _is_in_scope(connection, turn_id, scope):
                    raise unknown
                await connection.execute(insert(feedback).values(**values, created_at=datetime.now(UTC)))
        except IntegrityError as error:
            raise unknown from error

    async def add_shadow(self, shadow: ShadowAnswer) -> None:
        """Of a logged turn; a second one of the same turn is refused by the database."""
        async with self._writing() as connection:
            await connection.execute(insert(shadow_answers).values(**asdict(shadow), created_at=datetime.now(UTC)))

    async def shadows(self, domain: str | None = None) -> list[dict[str, Any]]:
        """Turns that a shadow answered too, oldest first: the question, both answers and who gave them."""
        query = (
            select(
                turns.c.id.label("turn_id"),
                turns.c.conversation_id,
                turns.c.domain,
                turns.c.question,
                turns.c.version,
                turns.c.answer,
                turns.c.total_ms,
                shadow_answers.c.version.label("shadow_version"),
                shadow_answers.c.answer.label("shadow_answer"),
                shadow_answers.c.total_ms.label("shadow_total_ms"),
            )
            .join(shadow_answers, shadow_answers.c.turn_id == turns.c.id)
            .order_by(turns.c.created_at, turns.c.id)
        )
        if domain is not None:
            query = query.where(turns.c.domain == domain)
        async with self._reading() as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]

    async def export(self, domain: str | None = None) -> AsyncIterator[Conversation]:
        """Logged conversations as records, oldest first, with each answer's latest feedback; of one domain's turns if given.

        Turns that were cancelled or failed are left out: their answer is not whole.
        """
        latest = select(func.max(feedback.c.id).label("id")).group_by(feedback.c.turn_id).subquery()
        votes = select(feedback).join(latest, feedback.c.id == latest.c.id).subquery()
        query = (
            select(turns, votes.c.vote, votes.c.reason, votes.c.correction)
            .join(conversations, conversations.c.id == turns.c.conversation_id)
            .outerjoin(votes, votes.c.turn_id == turns.c.id)
            .where(turns.c.finish_reason.in_(_WHOLE))
            .order_by(conversations.c.created_at, turns.c.conversation_id, turns.c.position)
        )
        if domain is not None:
            query = query.where(turns.c.domain == domain)
        async with self._reading() as connection:
            # A model can answer with nothing or with blanks alone, from which nobody learns.
            rows = [row for row in await connection.execute(query) if row.answer.strip()]
        for conversation_id, group in groupby(rows, key=lambda row: row.conversation_id):
            yield _record(conversation_id, group)


def _record(conversation_id: str, rows: Iterable[Row[Any]]) -> Conversation:
    messages: list[AnswerRecord] = []
    for row in rows:
        if row.system and not messages:
            messages.append(AnswerRecord(role="system", content=row.system))
        messages.append(AnswerRecord(role="user", content=row.question))
        known = {name: getattr(row, name) for name in ("domain", "version", "digest", "author", "vote", "reason", "correction")}
        messages.append(AnswerRecord(role="assistant", content=row.answer, turn_id=row.id, **known))
    return Conversation(id=conversation_id, messages=tuple(messages))


async def _by_key(connection: AsyncConnection, key: str, id_: str) -> ConversationState:
    query = select(conversations.c.id, conversations.c.domain).where(conversations.c.key == key)
    row = (await connection.execute(query)).one_or_none()
    if row is not None:
        return ConversationState(row.id, row.domain)
    new = new_id() if await _is_taken(connection, id_) else id_
    await connection.execute(insert(conversations).values(id=new, key=key, created_at=datetime.now(UTC)))
    return ConversationState(new)


async def _is_taken(connection: AsyncConnection, id_: str) -> bool:
    return (await connection.execute(select(conversations.c.id).where(conversations.c.id == id_))).one_or_none() is not None


async def _is_in_scope(connection: AsyncConnection, turn_id: str, scope: str) -> bool:
    query = (
        select(turns.c.id)
        .join(conversations, conversations.c.id == turns.c.conversation_id)
        .where(turns.c.id == turn_id, or_(_is_keyed(scope), _is_keyed(scope, PERSON_MARK)))
    )
    return (await connection.execute(query)).one_or_none() is not None


def _is_keyed(scope: str, mark: str = "/") -> ColumnElement[bool]:
    return conversations.c.key.startswith(f"{scope}{mark}", autoescape=True)


async def _by_transcript(connection: AsyncConnection, scope: str, transcript: str) -> ConversationState | None:
    query = (
        select(conversations.c.id, conversations.c.domain)
        .where(conversations.c.transcript == transcript, _is_keyed(scope))
        .order_by(conversations.c.created_at.desc())
        .limit(1)
    )
    row = (await connection.execute(query)).one_or_none()
    return ConversationState(row.id, row.domain) if row is not None else None


@asynccontextmanager
async def open_log(path: Path) -> AsyncIterator[ConversationLog]:
    """The log in the SQLite file at `path`, made when it is not there. Raises ServiceError when it cannot be opened."""
    async with open_database(path) as database:
        yield ConversationLog(database)
