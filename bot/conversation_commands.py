"""`frontdesk logs` and `frontdesk inbox`: what was said, and what waits to be answered. They need no running service."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bot.conversations.records import FinishReason, TurnFilter, Vote
from prompt_bank.actor import actor

if TYPE_CHECKING:
    from bot.conversations.database import Database
    from bot.conversations.inbox import Inbox, InboxState
    from bot.conversations.reading import LogReader
    from bot.settings import Settings

logs_app = typer.Typer(no_args_is_help=True, help="Read the conversation log.")
inbox_app = typer.Typer(no_args_is_help=True, help="See messages that wait for their answers, and replay dead letters.")

DomainOption = Annotated[str | None, typer.Option("--domain", "-d", help="Only turns that this domain answered.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File to write; stdout when left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines.")]

_SHOWN_CHARS = 60


@logs_app.command("export")
def logs_export(domain: DomainOption = None, output: Output = None) -> None:
    """Write logged conversations as the JSONL that `frontdesk train --data` reads."""
    from prompt_bank.conversation import record_lines

    async def read() -> list[str]:
        async with _open_database() as database:
            await _record(database, "export", "log:turns", {"domains": [domain] if domain else []})
            reader = _reader(database)
            return list(record_lines([conversation async for conversation in reader.export(_only(domain))]))

    _write_lines(asyncio.run(read()), output, "conversations")


@logs_app.command("shadows")
def logs_shadows(domain: DomainOption = None, output: Output = None) -> None:
    """Write the turns that a shadow version answered too, as JSONL: the question and both answers."""

    async def read() -> list[str]:
        async with _open_reader() as reader:
            return [json.dumps(turn, ensure_ascii=False) for turn in await reader.shadows(domain)]

    _write_lines(asyncio.run(read()), output, "turns")


@logs_app.command("search")
def logs_search(
    words: Annotated[list[str] | None, typer.Argument(help="Words that all occur in question or answer.")] = None,
    domain: DomainOption = None,
    version: Annotated[int | None, typer.Option(min=1, help="Only turns that this version answered.")] = None,
    vote: Annotated[Vote | None, typer.Option(help="Only turns whose latest vote is this.")] = None,
    finish: Annotated[FinishReason | None, typer.Option(help="Only turns that ended so.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Not before this moment (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Before this moment (UTC).")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="The most turns shown, newest first.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Find turns by what was said, by who answered, by vote and by time."""
    wanted = TurnFilter(
        text=" ".join(words) if words else None,
        domains=_only(domain),
        version=version,
        vote=vote,
        finish_reason=finish,
        since=since and since.replace(tzinfo=UTC),
        until=until and until.replace(tzinfo=UTC),
    )

    async def read() -> list[Any]:
        async with _open_reader() as reader:
            return await reader.turns(wanted, limit)

    found = asyncio.run(read())
    if as_json:
        from bot.turn_events import described

        for record in found:
            known = {"created_at": record.created_at.isoformat(), "vote": record.vote, "correction": record.correction}
            typer.echo(json.dumps({**described(record.turn), **known}, ensure_ascii=False))
        return
    table = Table("when (UTC)", "who", "question", "answer", "vote", "ended", box=None)
    for record in found:
        turn = record.turn
        who = f"{turn.domain} v{turn.version}" if turn.domain else "router"
        cells = [f"{record.created_at:%Y-%m-%d %H:%M:%S}", who, _shown(turn.question), _shown(turn.answer)]
        table.add_row(*cells, record.vote or "", turn.finish_reason)
    Console().print(table)


@inbox_app.command("list")
def inbox_list(as_json: AsJson = False) -> None:
    """Show the conversations that wait or are being answered, and the dead letters."""

    async def read() -> tuple["InboxState", list[Any]]:
        async with _open_inbox() as inbox:
            return await inbox.state(), await inbox.dead_letters()

    state, letters = asyncio.run(read())
    if as_json:
        dead = [{"conversation_id": letter.message.conversation_id, "message_id": letter.message.id} for letter in letters]
        typer.echo(json.dumps({"queued": state.num_queued, "waiting": state.waiting, "leased": state.leased, "dead": dead}))
        return
    typer.echo(f"{state.num_queued} messages wait in {len(state.waiting)} conversations, {state.num_dead} dead letters")
    waiting = Table("conversation", "messages", "lease ends in", box=None)
    for conversation, num_messages in state.waiting.items():
        lease_s = state.leased.get(conversation)
        waiting.add_row(escape(conversation), str(num_messages), "" if lease_s is None else f"{lease_s:.0f} s")
    dead_letters = Table("died (UTC)", "conversation", "message", "deliveries", "text", box=None)
    for letter in letters:
        died = f"{datetime.fromtimestamp(letter.died_at, UTC):%Y-%m-%d %H:%M:%S}"
        message = letter.message
        cells = [died, escape(message.conversation_id), message.id, str(letter.num_deliveries), _shown(message.text)]
        dead_letters.add_row(*cells)
    for table in (waiting, dead_letters):
        if table.row_count:
            Console().print(table)


@inbox_app.command("replay")
def inbox_replay(
    limit: Annotated[int, typer.Option(min=1, help="How many dead letters, oldest first.")] = 100,
) -> None:
    """Put dead letters back into their conversations, to be answered after what waits there."""

    async def replay() -> int:
        async with _open_inbox() as inbox, _open_database() as database:
            num_replayed = await inbox.replay(limit)
            await _record(database, "replay", "inbox:dead letters", {"count": num_replayed})
            return num_replayed

    typer.echo(f"{asyncio.run(replay())} dead letters replayed")


@asynccontextmanager
async def _open_database() -> AsyncIterator["Database"]:
    from bot.conversations.database import open_database

    async with open_database(_settings().log_url) as database:
        yield database


@asynccontextmanager
async def _open_reader() -> AsyncIterator["LogReader"]:
    async with _open_database() as database:
        yield _reader(database)


def _reader(database: "Database") -> "LogReader":
    from bot.conversations.reading import LogReader

    return LogReader(database)


async def _record(database: "Database", action: str, object_: str, detail: dict[str, Any]) -> None:
    from bot.conversations import audit

    async with database.writing() as connection:
        await audit.record(connection, actor(), action, object_, detail)


@asynccontextmanager
async def _open_inbox() -> AsyncIterator["Inbox"]:
    from bot.conversations.inbox import Inbox
    from prompt_bank.opening import open_bank

    async with open_bank(_settings()) as bank:
        yield Inbox(bank.cache.redis, bank.cache.prefix, bank.cache.table_key)


def _settings() -> "Settings":
    from bot.settings import Settings

    return Settings.load()


def _only(domain: str | None) -> frozenset[str] | None:
    return None if domain is None else frozenset({domain})


def _shown(text: str) -> str:
    """In one line: a terminal must obey nothing of what people wrote."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return escape(line if len(line) <= _SHOWN_CHARS else f"{line[: _SHOWN_CHARS - 1]}…")


def _write_lines(lines: list[str], output: Path | None, what: str) -> None:
    text = "".join(f"{line}\n" for line in lines)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
    Console(stderr=True).print(f"{len(lines)} {what}")
