"""Measures the conversation log with a million turns: listings, search, filters, export and writing, on both databases.

    python -m tests.benchmarks.bench_log [--quick] [--json FILE] [--turns N]

Each query runs often, with other values each time, and is given as milliseconds at p50 and p95. Times depend on the machine and
on what else it does: compare figures of one run. The filled databases take some 3 GB for the time of the run.

What helped, p50 in milliseconds before and after with a million turns in SQLite, on two cores that others used too: the latest
vote as a column of the turn with an index, and its reason read for the page alone (newest page 96 to 6, vote down 231 to a page
off the index); indexes that end in what the listing is ordered by (common domain 501 to 13, newest conversations 300 to 1.4);
the words' index first, by CROSS JOIN (common word 2,210 to 8; 600,000 turns have it); a range of time given to it as numbers.
In PostgreSQL the planner takes words it has no statistics of for too frequent and reads turn by turn: 14 s for a rare word; all
hits first where it expects few: 16 ms.

What did not help: counting a word's hits up to 5,000 instead of asking the planner, 700 ms for a common word, as each row's
text is parsed for it. Leaving SQLite the order of the join: without statistics it began with the filter's index.
"""

import argparse
import asyncio
import gc
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from sqlalchemy import make_url

from bot.conversations.database import Database, open_database, sqlite_url
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.conversations.records import LoggedTurn, TurnFilter, new_id
from tests.benchmarks.filled_log import (
    COMMON,
    FIRST,
    RARE,
    TURNS_A_CONVERSATION,
    YEAR,
    conversation_id,
    fill,
    message_id,
    postgresql,
)

_PAGE = 21  # what the API asks for: a page of 20, and whether there are more
_EXPORTED = 1000
console = Console()

Query = Callable[[], Awaitable[object]]


def listings(reader: LogReader, num_turns: int) -> dict[str, Query]:
    draw = random.Random(3)

    def page(after: Callable[[], int] | None = None, **wanted: Any) -> Query:
        async def read() -> None:
            given = {name: value() if callable(value) else value for name, value in wanted.items()}
            await reader.turns(TurnFilter(**given), _PAGE, after=after() if after else None)

        return read

    def deep() -> int:
        return draw.randrange(num_turns // 4, num_turns)

    def domain(name: str) -> dict[str, Any]:
        return {"domains": frozenset({name})}

    three = frozenset({"banking", "travel", "rare"})
    month = {"since": FIRST + YEAR / 2, "until": FIRST + YEAR / 2 + timedelta(days=30)}
    return {
        "newest page": page(),
        "page deep inside": page(deep),
        "by domain, common": page(**domain("banking")),
        "by domain, rare": page(**domain("rare")),
        "by domain, rare, deep": page(deep, **domain("rare")),
        "by three domains": page(domains=three),
        "by two rare domains": page(domains=frozenset({"travel", "rare"})),
        "by domain and version": page(**domain("banking"), version=lambda: draw.randint(1, 20)),
        "by domain and version, rare": page(**domain("rare"), version=lambda: draw.randint(1, 20)),
        "by rare word": page(text=RARE),
        "by common word": page(text=COMMON),
        "by common word, deep": page(deep, text=COMMON),
        "by some word": page(text=lambda: f"word{draw.randrange(50, 20_000)}"),
        "by two words": page(text=lambda: f"word{draw.randrange(1, 100)} word{draw.randrange(1, 100)}"),
        "by common word and rare domain": page(text=COMMON, **domain("rare")),
        "by common word and domain": page(text=COMMON, **domain("banking")),
        "by rare word and domain": page(text=RARE, **domain("banking")),
        "by common word in a month": page(text=COMMON, **month),
        "by vote up": page(vote="up"),
        "by vote down": page(vote="down"),
        "by vote down, deep": page(deep, vote="down"),
        "by vote down and rare domain": page(vote="down", **domain("rare")),
        "by month": page(**month),
        "until a day, half a year ago": page(until=FIRST + YEAR / 2),
        "by month and domain": page(**month, **domain("travel")),
        "by month, deep": page(lambda: num_turns // 2 + 100, **month),
        "by finish reason, rare": page(finish_reason="error"),
        "by finish reason, common, deep": page(deep, finish_reason="stop"),
        "by conversation": page(conversation_id=lambda: conversation_id(draw.randrange(num_turns // TURNS_A_CONVERSATION))),
    }


def others(database: Database, num_turns: int) -> dict[str, Query]:
    reader, log, draw = LogReader(database), ConversationLog(database), random.Random(4)
    num_conversations = num_turns // TURNS_A_CONVERSATION

    def some() -> str:
        return conversation_id(draw.randrange(num_conversations))

    async def export() -> None:
        count = 0
        async for _ in reader.export():
            count += 1
            if count == min(_EXPORTED, num_conversations // 2):
                return

    async def append() -> None:
        taken_up = await log.take_up(some(), new_id(), 200)
        assert isinstance(taken_up, tuple)
        await log.append(turn(taken_up[0].id), None, taken_up[0].fence)

    async def vote() -> None:
        number = draw.randrange(num_turns)
        answered = await reader.turn_of_message(message_id(number))
        assert answered is not None
        await log.add_feedback(answered.id, "down", None, None)

    return {
        "conversations, newest": lambda: reader.conversations(_PAGE),
        "conversations of a key": lambda: reader.conversations(_PAGE, scope="key-3"),
        "conversations of a key, deep": lambda: reader.conversations(_PAGE, scope="key-3", after=conversation_id(3)),
        "conversations of a person": lambda: reader.conversations(_PAGE, scope="key-3", person="person-3"),
        "conversations, deep": lambda: reader.conversations(_PAGE, after=some()),
        "turn of a message": lambda: reader.turn_of_message(message_id(draw.randrange(num_turns))),
        f"export, first {_EXPORTED:,} conversations": export,
        "take up a message and append its turn": append,
        "vote on a turn": vote,
    }


def turn(id_: str) -> LoggedTurn:
    return LoggedTurn(
        conversation_id=id_,
        question="Where is my card? I ordered it a week ago.",
        answer="It is on its way and should arrive on Monday.",
        fingerprint="f" * 64,
        routing_reason="routed",
        finish_reason="stop",
        total_ms=900.0,
        domain="banking",
        version=20,
        digest="d" * 64,
        token_ids=tuple(range(30)),
    )


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def timed(query: Query, seconds: float) -> list[float]:
    """Milliseconds of each repetition, after one that is not counted: 5 at least, 200 at most."""
    await query()
    gc.collect()
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < ends and len(times) < 200):
        started = time.perf_counter()
        await query()
        times.append(1000 * (time.perf_counter() - started))
    return times


async def measure(url: str, num_turns: int, seconds: float) -> dict[str, dict[str, float]]:
    figures = {}
    async with open_database(url) as database:
        queries = listings(LogReader(database), num_turns) | others(database, num_turns)
        for name, query in track(queries.items(), make_url(url).drivername, console=Console(stderr=True)):
            times = await timed(query, seconds)
            figures[name] = {"p50_ms": percentile(times, 0.5), "p95_ms": percentile(times, 0.95), "count": len(times)}
    return figures


async def run(num_turns: int, seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """By database and query. One database is filled at a time."""
    result = {}
    with tempfile.TemporaryDirectory() as name:
        url = sqlite_url(Path(name) / "log.db")
        await fill(url, num_turns)
        result["sqlite"] = await measure(url, num_turns, seconds)
    with tempfile.TemporaryDirectory() as name, postgresql(Path(name) / "postgresql") as url:
        await fill(url, num_turns)
        result["postgresql"] = await measure(url, num_turns, seconds)
    return result


def show(result: dict[str, dict[str, dict[str, float]]], num_turns: int) -> None:
    headings = [f"{database} {share}" for database in result for share in ("p50", "p95")]
    table = Table("milliseconds", *headings, title=f"The conversation log with {num_turns:,} turns")
    for name in next(iter(result.values())):
        table.add_row(name, *(f"{figures[name][share]:.1f}" for figures in result.values() for share in ("p50_ms", "p95_ms")))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few turns and repetitions: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--turns", type=int, default=1_000_000, help="turns in the log")
    given = parser.parse_args()
    num_turns, seconds = (5_000, 0.0) if given.quick else (given.turns, 1.0)
    result = asyncio.run(run(num_turns, seconds))
    show(result, num_turns)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
