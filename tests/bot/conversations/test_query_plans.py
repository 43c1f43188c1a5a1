"""No listing reads all turns: the databases' own plans say so, with enough turns in the log for a plan to matter."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from sqlalchemy import ClauseElement, select, text

from bot.conversations.database import Database, open_database
from bot.conversations.reading import LogReader, _export_query
from bot.conversations.records import TurnFilter
from bot.conversations.schema import turns
from tests.benchmarks.filled_log import FIRST, RARE, conversation_id, fill

NUM_TURNS = 20_000
DAY = {"since": FIRST + timedelta(days=100), "until": FIRST + timedelta(days=101)}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    await asyncio.to_thread(asyncio.run, fill(database_url, NUM_TURNS))
    async with open_database(database_url) as opened:
        yield opened


async def scans(database: Database, query: ClauseElement) -> list[str]:
    """Lines of the plan that read a whole table."""
    async with database.reading() as connection:
        dialect = connection.dialect
        compiled = query.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
        explain = "EXPLAIN QUERY PLAN " if database.is_sqlite else "EXPLAIN "
        rows = (await connection.exec_driver_sql(explain + str(compiled))).all()
    plan = [str(row[-1]) for row in rows]
    if not database.is_sqlite:
        return [line for line in plan if "Seq Scan on turns" in line]
    whole = [line for line in plan if line.startswith("SCAN turns") and "VIRTUAL TABLE" not in line]
    return [*whole, *(line for line in plan if "TEMP B-TREE" in line)]


FILTERS = {
    "newest": TurnFilter(),
    "domain": TurnFilter(domains=frozenset({"rare"})),
    "version": TurnFilter(domains=frozenset({"banking"}), version=3),
    "vote": TurnFilter(vote="down"),
    "finish reason": TurnFilter(finish_reason="error"),
    "day": TurnFilter(**DAY),
    "conversation": TurnFilter(conversation_id=conversation_id(7)),
    "word": TurnFilter(text=RARE),
    "word and domain": TurnFilter(text=RARE, domains=frozenset({"rare"})),
}


async def test_listings_are_read_off_an_index(database: Database) -> None:
    reader = LogReader(database)
    found = {}
    for name, wanted in FILTERS.items():
        numbers = reader._numbers(wanted, 21, 15_000, True, is_rare=wanted.text is not None and not database.is_sqlite)
        found[name] = await scans(database, select(turns.c.number).where(turns.c.number.in_(numbers)))
    # SQLite reads the few turns of one conversation and sorts them; in the order of its rows it needs no index.
    found["conversation"] = [line for line in found["conversation"] if "TEMP B-TREE" not in line]
    assert found == {name: [] for name in FILTERS}
    export = await scans(database, _export_query([conversation_id(number) for number in range(5)]))
    assert [line for line in export if "TEMP B-TREE" not in line] == []


async def test_what_no_index_helps_is_seen(database: Database) -> None:
    assert await scans(database, text("SELECT number FROM turns WHERE total_ms < 5 ORDER BY total_ms")) != []
