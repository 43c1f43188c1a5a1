"""`frontdesk keys add|list|revoke`: API keys. Works on the database, so it needs no running service."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from bot.access.roles import Role
from prompt_bank.actor import actor
from prompt_bank.card import DOMAIN_PATTERN

if TYPE_CHECKING:
    from datetime import datetime

    from bot.access.keys import ApiKey, ApiKeys

keys_app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")

_MAX_NAME_CHARS = 64


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Name of the key, unique among live ones.", show_default=False)],
    role: Annotated[Role, typer.Option(help="What it may do.")] = "chat",
    domain: Annotated[list[str] | None, typer.Option("--domain", "-d", help="Only this domain; may be repeated.")] = None,
    expires_days: Annotated[int | None, typer.Option(min=1, help="Days until it expires; never when left out.")] = None,
    rate: Annotated[int | None, typer.Option(min=1, help="Turns a minute (FRONTDESK_RATE_PER_MINUTE).")] = None,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Turns at a time (FRONTDESK_MAX_CONCURRENT).")] = None,
) -> None:
    """Make an API key. Its secret is printed on stdout, once: only its hash is kept."""
    from bot.access.keys import NewKey, domains_of, expiry

    domains = domains_of(domain or ())
    _check_names(name, domains or frozenset())
    new = NewKey(name, role, domains, rate, concurrent, expiry(expires_days))

    async def add() -> str:
        async with _open_keys() as keys:
            return await keys.add(new, actor())

    secret = asyncio.run(add())
    typer.echo(secret)
    Console(stderr=True, highlight=False).print(
        f"[dim]the key {escape(name)}, role {role}; it is shown only now. Clients send it as `Authorization: Bearer ...`[/]"
    )


@keys_app.command("list")
def keys_list() -> None:
    """Every key there ever was, newest first."""

    async def read() -> "list[ApiKey]":
        async with _open_keys() as keys:
            return await keys.list()

    # What one types is never cut short.
    typed = [Column(name, no_wrap=True) for name in ("name", "id")]
    table = Table(*typed, "role", "domains", "a minute", "at a time", "made", "by", "expires", Column("state", no_wrap=True))
    for key in asyncio.run(read()):
        who = key.principal
        cells = [who.name, who.id, who.role, ", ".join(sorted(who.domains)) if who.domains else "all"]
        cells += ["default" if limit is None else str(limit) for limit in (who.rate_per_minute, who.max_concurrent)]
        cells += [_day(key.created_at), key.created_by, _day(key.expires_at), key.state]
        table.add_row(*(escape(cell) for cell in cells))
    Console(highlight=False).print(table)


@keys_app.command("revoke")
def keys_revoke(key: Annotated[str, typer.Argument(metavar="NAME_OR_ID", show_default=False)]) -> None:
    """Revoke a key: running services refuse it within five seconds."""

    async def revoke() -> "ApiKey":
        async with _open_keys() as keys:
            return await keys.revoke(key, actor())

    typer.echo(f"the key {asyncio.run(revoke()).principal.name} is revoked")


@asynccontextmanager
async def _open_keys() -> "AsyncIterator[ApiKeys]":
    from bot.access.keys import ApiKeys
    from bot.conversations.database import open_database
    from bot.settings import Settings

    async with open_database(Settings.load().log_url) as database:
        yield ApiKeys(database)


def _check_names(name: str, domains: frozenset[str]) -> None:
    if not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise typer.BadParameter(f"a name has 1 to {_MAX_NAME_CHARS} printable characters, this one is {name!r}")
    for domain in sorted(domains):
        if not re.fullmatch(DOMAIN_PATTERN, domain):
            raise typer.BadParameter(f"{domain!r} cannot be the name of a domain; see frontdesk bank list")


def _day(moment: "datetime | None") -> str:
    return "never" if moment is None else f"{moment:%Y-%m-%d}"
