"""The commands of the service: serve, chat, ask, logs. Heavy imports wait until a command runs."""

import asyncio
import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bot.inspection.commands import inspection_app
from prompt_bank.commands.bank import bank_app

if TYPE_CHECKING:
    from bot.settings import Settings

logs_app = typer.Typer(no_args_is_help=True, help="Read the conversation log.")

Domain = Annotated[str | None, typer.Option("--domain", "-d", help="Domain to ask; the router chooses when left out.")]
Url = Annotated[str | None, typer.Option(help="Service to use; the one at the settings' address when left out.")]


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(chat)
    app.command()(ask)
    app.add_typer(logs_app, name="logs")
    bank_app.add_typer(inspection_app)


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (FRONTDESK_HOST).")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on (FRONTDESK_PORT).")] = None,
) -> None:
    """Run the service: HTTP API, health and metrics, until Ctrl-C."""
    started = time.monotonic()
    from bot.channels.http.server import serve as serve_http

    settings = _settings(host=host, port=port)
    _configure_logging(settings.log_level)
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def report(text: str) -> None:
        console.print(f"[bold cyan]frontdesk[/] {text}")
        if text.startswith("ready"):
            url = text.split()[-1]
            console.print(
                f"  chat here      [bold]make chat[/]   or   frontdesk ask 'I lost my card'\n"
                f"  OpenAI client  base_url={url}/v1   (docs: {url}/docs)\n"
                f"  a new domain   frontdesk bank add card.toml; frontdesk train NAME --data FILE.jsonl\n"
                f"  operations     {url}/readyz  {url}/metrics   stop with Ctrl-C"
            )

    asyncio.run(serve_http(settings, report, started))


def chat(domain: Domain = None, url: Url = None) -> None:
    """Chat in the terminal, streaming, with who answered: domain, version, digest."""
    from bot.channels.client import connect
    from bot.channels.terminal import TerminalChat

    settings = _settings()
    _configure_logging("error")
    console = Console(highlight=False)

    async def run() -> None:
        async with connect(settings, url, _status) as client:
            await TerminalChat(client, console, domain).run()

    asyncio.run(run())


def ask(
    text: Annotated[str, typer.Argument(help="A question.", show_default=False)],
    domain: Domain = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with everything known of the answer.")] = False,
    url: Url = None,
) -> None:
    """Ask one question and print the answer."""
    from bot.channels.client import connect
    from prompt_bank.conversation import Message

    settings = _settings()
    _configure_logging("error")

    async def run() -> None:
        async with connect(settings, url, _status) as client:
            # Before a service of our own is closed, which waits for shadows.
            _print_answer(await client.complete([Message(role="user", content=text)], domain), as_json)

    asyncio.run(run())


def _print_answer(completion: dict[str, Any], as_json: bool) -> None:
    answer, who = completion["choices"][0]["message"]["content"], completion["frontdesk"]
    if as_json:
        Console().print_json(data=_ask_record(answer, who, completion["usage"]))
        return
    typer.echo(answer)
    answered_by = f"{who['domain']} v{who['version']}" if who["domain"] else "router"
    _status(f"{answered_by}, {who['total_ms']:.0f} ms")
    if who["disclaimer"]:
        _status(escape(who["disclaimer"]))


def _ask_record(answer: str, who: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
    return {
        "domain": who["domain"],
        "version": who["version"],
        "digest": who["digest"],
        "text": answer,
        "disclaimer": who["disclaimer"],
        "routing": who["routing"],
        "first_token_ms": round(who["first_token_ms"], 1),
        "total_ms": round(who["total_ms"], 1),
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "conversation_id": who["conversation_id"],
        "turn_id": who["turn_id"],
    }


@logs_app.command("export")
def logs_export(
    domain: Annotated[str | None, typer.Option("--domain", "-d", help="Only turns that this domain answered.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; stdout when left out.")] = None,
) -> None:
    """Write logged conversations as the JSONL that `frontdesk train --data` reads."""
    from bot.conversations.log import open_log
    from prompt_bank.conversation import record_lines

    settings = _settings()

    async def read() -> list[str]:
        async with open_log(settings.data_dir / "conversations.db") as log:
            return list(record_lines([conversation async for conversation in log.export(domain)]))

    _write_lines(asyncio.run(read()), output, "conversations")


@logs_app.command("shadows")
def logs_shadows(
    domain: Annotated[str | None, typer.Option("--domain", "-d", help="Only turns of this domain.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; stdout when left out.")] = None,
) -> None:
    """Write the turns that a shadow version answered too, as JSONL: the question and both answers."""
    from bot.conversations.log import open_log

    settings = _settings()

    async def read() -> list[str]:
        async with open_log(settings.data_dir / "conversations.db") as log:
            return [json.dumps(turn, ensure_ascii=False) for turn in await log.shadows(domain)]

    _write_lines(asyncio.run(read()), output, "turns")


def _write_lines(lines: list[str], output: Path | None, what: str) -> None:
    text = "".join(f"{line}\n" for line in lines)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")
    Console(stderr=True).print(f"{len(lines)} {what}")


def _settings(**given: Any) -> "Settings":
    from bot.settings import Settings

    return Settings.load().model_copy(update={name: value for name, value in given.items() if value is not None})


def _configure_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel("WARNING")


def _status(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"[dim]{text}[/]")
