"""The conversation log: every turn with the version that answered it, in SQL. Knows nothing of channels, engine or routing.

A turn is written once, when it has ended, however it ended. Feedback joins to exactly one turn.
"""

import hashlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from sqlalchemy import Row, event, func, insert, literal, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from bot.conversations.schema import conversations, feedback, metadata, shadow_answers, turns
from prompt_bank.conversation import AnswerRecord, Conversation, Message
from prompt_bank.errors import LogUnavailableError, ServiceError, UnknownTurnError

Vote = Literal["up", "down"]
FinishReason = Literal["stop", "length", "cancelled", "error"]

_WHOLE = ("stop", "length")
_READ_ONLY = "frontdesk_read_only"


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
    alternatives: tuple[str, ...] = ()  # the caller's other choices, where it asked for several


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

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that holds the write lock from its start. Raises LogUnavailableError."""
        with _translated_errors():
            async with self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that keeps nobody from writing. Raises LogUnavailableError."""
        with _translated_errors():
            async with self._engine.connect() as connection:
                yield await connection.execution_options(**{_READ_ONLY: True})

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

    async def add_feedback(self, turn_id: str, vote: Vote, reason: str | None, correction: str | None) -> None:
        """Raises UnknownTurnError."""
        values = {"turn_id": turn_id, "vote": vote, "reason": reason, "correction": correction}
        try:
            async with self._writing() as connection:
                await connection.execute(insert(feedback).values(**values, created_at=datetime.now(UTC)))
        except IntegrityError as error:
            raise UnknownTurnError(f"no turn {turn_id!r} is logged; give the turn_id of an answer") from error

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


async def _by_transcript(connection: AsyncConnection, scope: str, transcript: str) -> ConversationState | None:
    query = (
        select(conversations.c.id, conversations.c.domain)
        .where(conversations.c.transcript == transcript, conversations.c.key.startswith(f"{scope}/", autoescape=True))
        .order_by(conversations.c.created_at.desc())
        .limit(1)
    )
    row = (await connection.execute(query)).one_or_none()
    return ConversationState(row.id, row.domain) if row is not None else None


@asynccontextmanager
async def open_log(path: Path) -> AsyncIterator[ConversationLog]:
    """The log in the SQLite file at `path`, made when it is not there. Raises ServiceError when it cannot be opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without parameters in its errors: they are what people wrote, and errors go to the operator's log.
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", hide_parameters=True)
    event.listen(engine.sync_engine, "connect", _set_pragmas)
    event.listen(engine.sync_engine, "begin", _begin)
    try:
        try:
            async with engine.begin() as connection:
                await connection.run_sync(metadata.create_all)
        except SQLAlchemyError as error:
            reason = getattr(error, "orig", None) or error  # the driver's own words, without SQLAlchemy's link
            raise ServiceError(f"the conversation log {path} cannot be opened: {reason}; mend or move the file") from error
        yield ConversationLog(engine)
    finally:
        await engine.dispose()


def _set_pragmas(connection: Any, _: object) -> None:
    # The driver must leave BEGIN to us, or a transaction would start only at its first write.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Any) -> None:
    # A transaction that reads and then writes would fail with "database is locked" if another wrote in between.
    is_read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if is_read_only else "BEGIN IMMEDIATE")


@contextmanager
def _translated_errors() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise  # the caller's own mistake: it knows which
    except SQLAlchemyError as error:
        raise LogUnavailableError(f"the conversation log does not answer: {getattr(error, 'orig', None) or error}") from error
