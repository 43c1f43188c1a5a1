"""The commands of the service: serve, chat, ask. Heavy imports wait until a command runs."""

import asyncio
import logging
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.markup import escape

from bot.access.commands import keys_app
from bot.conversation_commands import inbox_app, logs_app
from bot.inspection.commands import inspection_app
from bot.log_format import LineFormatter
from prompt_bank.commands.bank import bank_app

if TYPE_CHECKING:
    from bot.settings import Settings

Domain = Annotated[str | None, typer.Option("--domain", "-d", help="Domain to ask; the router chooses when left out.")]
Url = Annotated[str | None, typer.Option(help="Service to use; the one at the settings' address when left out.")]


def register(app: typer.Typer) -> None:
    app.command()(serve)
    app.command()(chat)
    app.command()(ask)
    app.add_typer(logs_app, name="logs")
    app.add_typer(inbox_app, name="inbox")
    app.add_typer(keys_app, name="keys")
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

    uvloop.run(serve_http(settings, report, started))


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


def _settings(**given: Any) -> "Settings":
    from bot.settings import Settings

    return Settings.load().model_copy(update={name: value for name, value in given.items() if value is not None})


def _configure_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("httpx").setLevel("WARNING")
    logging.getLogger("uvicorn.error").setLevel("ERROR")  # it warns of broken requests, as we do, with advice to install more


def _status(text: str) -> None:
    Console(stderr=True, highlight=False).print(f"[dim]{text}[/]")
