"""Reading the conversation log: histories, listings, search and export. Listings are pages by cursor, never by offset, so that
a page costs the same wherever it lies in a million turns.
"""

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, Integer, Row, Select, bindparam, func, literal, literal_column, select, text, tuple_
from sqlalchemy.ext.asyncio import AsyncConnection

from bot.conversations.database import Database
from bot.conversations.records import WHOLE, ConversationRecord, LoggedTurn, TurnFilter, TurnRecord
from bot.conversations.schema import conversations, feedback, shadow_answers, turns
from prompt_bank.conversation import AnswerRecord, Conversation, Message
from prompt_bank.errors import UnknownConversationError

_CONVERSATIONS_A_BATCH = 200
_RARE = 5000  # turns: to sort so many costs what it costs to come upon a page of them, among a million
_RECORD = tuple(conversations.c[field.name] for field in fields(ConversationRecord))
_TURN_FIELDS = tuple(field.name for field in fields(LoggedTurn))

_earlier = feedback.alias()
_latest = select(func.max(_earlier.c.id)).where(_earlier.c.turn_id == turns.c.id).correlate(turns).scalar_subquery()
_WITH_FEEDBACK = select(turns, feedback.c.reason, feedback.c.correction).select_from(
    turns.outerjoin(feedback, feedback.c.id == _latest)
)
_TURN_OF_MESSAGE = select(turns).where(turns.c.message_id == bindparam("message_id"))
_HISTORY = (
    select(turns.c.question, turns.c.answer)
    .where(turns.c.conversation_id == bindparam("conversation_id"), turns.c.answer != "", turns.c.finish_reason != "error")
    .order_by(turns.c.position.desc())
    .limit(bindparam("max_turns"))
)
_hit: ColumnElement[int] = literal_column("turns_text.rowid", Integer)


class LogReader:
    """Safe to use from many tasks of one event loop. Every method raises LogUnavailableError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def turn_of_message(self, message_id: str) -> LoggedTurn | None:
        """The turn that answered an inbox entry, if there is one."""
        async with self._database.reading() as connection:
            return await turn_of_message(connection, message_id)

    async def conversation(self, conversation_id: str, scope: str | None = None) -> ConversationRecord:
        """Of `scope`, if given. Raises UnknownConversationError."""
        query = select(*_RECORD).where(conversations.c.id == conversation_id)
        if scope is not None:
            query = query.where(conversations.c.scope == scope)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise UnknownConversationError(f"no conversation {conversation_id!r} is here; give the id of one of yours")
        return ConversationRecord(*row)

    async def conversations(
        self,
        limit: int,
        *,
        scope: str | None = None,
        person: str | None = None,
        after: str | None = None,
        descending: bool = True,
    ) -> list[ConversationRecord]:
        """Newest first unless not `descending`, beyond the one with id `after`, else UnknownConversationError."""
        created, order = (conversations.c.created_at, conversations.c.id), _order(descending)
        query = select(*_RECORD).order_by(*(order(column) for column in created)).limit(limit)
        if scope is not None:
            query = query.where(conversations.c.scope == scope)
        if person is not None:
            query = query.where(conversations.c.person == person)
        if after is not None:
            last = await self.conversation(after, scope)
            here, there = tuple_(*created), tuple_(last.created_at, last.id)
            query = query.where(here < there if descending else here > there)
        async with self._database.reading() as connection:
            return [ConversationRecord(*row) for row in await connection.execute(query)]

    async def turns(
        self, wanted: TurnFilter, limit: int, *, after: int | None = None, descending: bool = True
    ) -> list[TurnRecord]:
        """Those that pass the filter, newest first unless not `descending`, beyond the number `after`."""
        async with self._database.reading() as connection:
            is_rare = wanted.text is not None and not self._database.is_sqlite and await _is_rare(connection, wanted.text)
            numbers = self._numbers(wanted, limit, after, descending, is_rare)
            query = _WITH_FEEDBACK.where(turns.c.number.in_(numbers))
            query = query.order_by(*map(_order(descending), _ordered_by(wanted)))
            rows = (await connection.execute(query)).all()
            shadows = await _shadows_of(connection, [row.id for row in rows])
        return [
            TurnRecord(row.number, row.created_at, _turn(row), row.vote, row.reason, row.correction, shadows.get(row.id))
            for row in rows
        ]

    def _numbers(
        self, wanted: TurnFilter, limit: int, after: int | None, descending: bool, is_rare: bool = False
    ) -> Select[Any]:
        """The page's row numbers alone: few bytes a row until the page is known."""
        ordered_by = _ordered_by(wanted)
        query = select(turns.c.number).where(*_conditions(wanted))
        if wanted.text is not None and self._database.is_sqlite:
            query, ordered_by = _fts5_hits(query, wanted.text).where(*_in_numbers(wanted, _hit)), (_hit,)
        elif wanted.text is not None:
            query = query.where(_tsquery_match(wanted.text), *_in_numbers(wanted, turns.c.number))
        if is_rare:
            # All hits first, which are few: PostgreSQL would read turn by turn from the newest on until the page is full.
            hits = query.cte("hits").prefix_with("MATERIALIZED")
            query, ordered_by = select(hits.c.number), (hits.c.number,)
        if after is not None:
            here, there = tuple_(*ordered_by), tuple_(*_place_of(after, ordered_by))
            query = query.where(here < there if descending else here > there)
        return query.order_by(*map(_order(descending), ordered_by)).limit(limit)

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
            .order_by(turns.c.number)
        )
        if domain is not None:
            query = query.where(turns.c.domain == domain)
        async with self._database.reading() as connection:
            return [dict(row) for row in (await connection.execute(query)).mappings()]

    async def export(self, domains: frozenset[str] | None = None) -> AsyncIterator[Conversation]:
        """Logged conversations as records, oldest first, with each answer's latest feedback; of these domains' turns if given.

        Turns that were cancelled or failed are left out: their answer is not whole. So are blank answers, from which nobody
        learns. A batch of conversations is in memory at a time.
        """
        last: tuple[Any, str] | None = None
        while True:
            query = select(conversations.c.created_at, conversations.c.id).limit(_CONVERSATIONS_A_BATCH)
            query = query.order_by(conversations.c.created_at, conversations.c.id)
            if last is not None:
                query = query.where(tuple_(conversations.c.created_at, conversations.c.id) > tuple_(*last))
            async with self._database.reading() as connection:
                batch = (await connection.execute(query)).all()
                rows = (await connection.execute(_export_query([row.id for row in batch]))).all()
            for conversation_id, group in groupby(rows, key=lambda row: row.conversation_id):
                # Here and not in SQL, where an index of the whole log would be read for it.
                theirs = [row for row in group if domains is None or row.domain in domains]
                said = [row for row in theirs if row.finish_reason in WHOLE and row.answer.strip()]
                if said:
                    yield _record(conversation_id, said)
            if len(batch) < _CONVERSATIONS_A_BATCH:
                return
            last = tuple(batch[-1])


async def turn_of_message(connection: AsyncConnection, message_id: str) -> LoggedTurn | None:
    row = (await connection.execute(_TURN_OF_MESSAGE, {"message_id": message_id})).one_or_none()
    return _turn(row) if row is not None else None


async def history(connection: AsyncConnection, conversation_id: str, max_turns: int) -> list[Message]:
    """What was said in a conversation whose history the server holds; what was cancelled was said as far as it went."""
    rows = (await connection.execute(_HISTORY, {"conversation_id": conversation_id, "max_turns": max_turns})).all()
    said = (pair for row in reversed(rows) for pair in (("user", row.question), ("assistant", row.answer)))
    return [Message(role=role, content=content) for role, content in said]


def _order(descending: bool) -> Any:
    return (lambda column: column.desc()) if descending else (lambda column: column.asc())


def _ordered_by(wanted: TurnFilter) -> tuple[ColumnElement[Any], ...]:
    """Numbers are given in the order of time, but for clocks that differ. A range of time is found in an index of times, so
    that is then its order; but words are found in the order of numbers, whatever else is asked for.
    """
    is_by_time = (wanted.since is not None or wanted.until is not None) and wanted.text is None
    return (turns.c.created_at, turns.c.number) if is_by_time else (turns.c.number,)


def _place_of(number: int, ordered_by: tuple[ColumnElement[Any], ...]) -> Iterator[ColumnElement[Any]]:
    """Where a turn stands, also if it was erased since."""
    if ordered_by[0] is turns.c.created_at:
        nearest = select(turns.c.created_at).where(turns.c.number <= number).order_by(turns.c.number.desc()).limit(1)
        yield nearest.scalar_subquery()
    yield literal(number)


def _conditions(wanted: TurnFilter) -> Iterator[ColumnElement[bool]]:
    for column in (turns.c.conversation_id, turns.c.version, turns.c.finish_reason, turns.c.vote):
        if (value := getattr(wanted, column.name)) is not None:
            yield column == value
    if wanted.domains is not None:
        yield turns.c.domain.in_(wanted.domains)
    if wanted.since is not None:
        yield turns.c.created_at >= wanted.since
    if wanted.until is not None:
        yield turns.c.created_at < wanted.until


def _fts5_hits(query: Select[Any], words: str) -> Select[Any]:
    """The words first, whatever SQLite thinks of it: the index gives its hits in the order of numbers, a page at a time, where
    any other way looks at all of them. Words are quoted, so that nothing in them has a meaning of its own; none find nothing.
    """
    quoted = " ".join('"' + word.replace('"', '""') + '"' for word in words.split())
    query = query.select_from(text("turns_text CROSS JOIN turns")).where(_hit == turns.c.number)
    return query.where(text("turns_text MATCH :words").bindparams(words=quoted or '""'))


def _in_numbers(wanted: TurnFilter, number: ColumnElement[int]) -> Iterator[ColumnElement[bool]]:
    """A range of time as numbers, for what is found in their order."""
    times = list(_conditions(TurnFilter(since=wanted.since, until=wanted.until)))
    if times:
        # A sum, or the database would look for the least one from the first turn on.
        least, most = (select(end(turns.c.number + 0)).where(*times).scalar_subquery() for end in (func.min, func.max))
        yield number >= least
        yield number <= most


async def _is_rare(connection: AsyncConnection, words: str) -> bool:
    """Whether PostgreSQL takes these words for so rare that all turns with them can be looked at."""
    query = (
        "EXPLAIN (FORMAT JSON) SELECT FROM turns WHERE to_tsvector('simple', question || ' ' || answer) "
        "@@ plainto_tsquery('simple', CAST(:words AS text))"
    )
    plan = (await connection.execute(text(query), {"words": words})).scalar_one()
    num_expected: int = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]["Plan Rows"]
    return num_expected < _RARE


def _tsquery_match(words: str) -> ColumnElement[bool]:
    searched = func.to_tsvector(text("'simple'"), turns.c.question.op("||")(text("' '")).op("||")(turns.c.answer))
    return searched.op("@@")(func.plainto_tsquery(text("'simple'"), words))


async def _shadows_of(connection: AsyncConnection, turn_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    query = select(shadow_answers).where(shadow_answers.c.turn_id.in_(turn_ids))
    return {row["turn_id"]: dict(row) for row in (await connection.execute(query)).mappings()}


def _turn(row: Row[Any]) -> LoggedTurn:
    values = {name: getattr(row, name) for name in _TURN_FIELDS}
    return LoggedTurn(**{**values, "token_ids": tuple(row.token_ids), "alternatives": tuple(row.alternatives)})


def _export_query(conversation_ids: Sequence[str]) -> Select[Any]:
    return (
        _WITH_FEEDBACK.join(conversations, conversations.c.id == turns.c.conversation_id)
        .where(turns.c.conversation_id.in_(conversation_ids))
        .order_by(conversations.c.created_at, turns.c.conversation_id, turns.c.position)
    )


def _record(conversation_id: str, rows: Iterable[Row[Any]]) -> Conversation:
    messages: list[AnswerRecord] = []
    for row in rows:
        if row.system and not messages:
            messages.append(AnswerRecord(role="system", content=row.system))
        messages.append(AnswerRecord(role="user", content=row.question))
        known = {name: getattr(row, name) for name in ("domain", "version", "digest", "author", "vote", "reason", "correction")}
        messages.append(AnswerRecord(role="assistant", content=row.answer, turn_id=row.id, **known))
    return Conversation(id=conversation_id, messages=tuple(messages))
