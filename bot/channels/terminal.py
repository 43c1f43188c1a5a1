"""The terminal chat: streams answers and shows who gave them."""

import asyncio
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from rich.console import Console
from rich.markup import escape

from bot.channels.client import Client
from prompt_bank.conversation import Message
from prompt_bank.errors import ServiceError

HELP = """\
[bold]/domain NAME[/]  talk to one domain     [bold]/auto[/]  let the router choose again
[bold]/up[/] [bold]/down[/]      vote on the last answer   [bold]/new[/]   start a new conversation
[bold]/domains[/]      list the domains        [bold]/quit[/]  leave (or Ctrl-D)"""


class TerminalChat:
    """One person's conversation. Ctrl-C stops an answer, and leaves when there is none."""

    def __init__(self, client: Client, console: Console, domain: str | None) -> None:
        self._client = client
        self._console = console
        self._domain = domain
        self._working: asyncio.Task[None] | None = None
        self._is_interrupted = False
        self._start_over()

    def _start_over(self) -> None:
        self._messages: list[Message] = []
        self._conversation_id: str | None = None
        self._turn_id: str | None = None
        self._shown_disclaimers: set[str] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        # Once for the whole chat: between two handlers a Ctrl-C could reach a loop that is just going to sleep.
        loop.add_signal_handler(signal.SIGINT, self._interrupt)
        try:
            await self._converse()
        except _InterruptedError:
            raise KeyboardInterrupt from None
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    def _interrupt(self) -> None:
        self._is_interrupted = True
        if self._working is not None:
            self._working.cancel()

    async def _unless_interrupted(self, work: Coroutine[Any, Any, None]) -> None:
        """Awaits `work`, which Ctrl-C ends. Raises _InterruptedError then."""
        self._working = asyncio.get_running_loop().create_task(work)
        if self._is_interrupted:
            self._working.cancel()
        try:
            await asyncio.wait({self._working})
        finally:
            working, self._working, self._is_interrupted = self._working, None, False
            working.cancel()
        if working.cancelled():
            raise _InterruptedError
        working.result()

    async def _converse(self) -> None:
        domains = ", ".join(await self._client.domains())
        self._console.print(f"[bold]Frontdesk[/] with the domains {domains}. /help lists the commands.\n")
        while (line := await self._read()) is not None:
            if line in ("/quit", "/exit"):
                return
            if not line:
                continue
            try:
                await (self._command(line) if line.startswith("/") else self._unless_interrupted(self._ask(line)))
            except _InterruptedError:
                self._console.print("\n[dim]stopped[/]\n")
            except ServiceError as error:
                self._console.print(f"\n[red]{escape(str(error))}[/]\n")

    async def _read(self) -> str | None:
        """A line of input; None at its end."""
        if not sys.stdin.isatty():
            line = await asyncio.to_thread(sys.stdin.readline)
        else:
            self._console.out(f"{self._domain or 'you'}> ", end="", highlight=False)
            await self._unless_interrupted(_typed())
            line = sys.stdin.readline()
        return line.strip() if line else None

    async def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/domain" and argument:
            known = await self._client.domains()
            if argument not in known:
                raise ServiceError(f"there is no domain {argument}; there are: {', '.join(known)}")
            self._domain = argument
        elif name == "/auto":
            self._domain = None
        elif name == "/new":
            self._start_over()
            self._console.print("[dim]a new conversation[/]\n")
        elif name == "/domains":
            self._console.print(", ".join(await self._client.domains()))
        elif name in ("/up", "/down") and self._turn_id is not None:
            await self._client.vote(self._turn_id, name[1:])
            self._console.print("[dim]thank you, noted[/]\n")
        else:
            self._console.print(HELP + "\n")

    async def _ask(self, text: str) -> None:
        messages = [*self._messages, Message(role="user", content=text)]
        answer = ""
        who: dict[str, Any] = {}
        async for chunk in self._client.stream(messages, self._domain, self._conversation_id):
            who = chunk.get("frontdesk", who)
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content", "")
                answer += piece
                self._console.out(piece, end="", highlight=False)  # print() would turn ":key:" into an emoji
        self._console.print(f"\n[dim]{_signature(who)}[/]", highlight=False)
        disclaimer = who["disclaimer"]
        if disclaimer and disclaimer not in self._shown_disclaimers:
            self._console.print(f"[dim italic]{escape(disclaimer)}[/]", highlight=False)
            self._shown_disclaimers.add(disclaimer)
        self._console.print()
        self._messages = [*messages, Message(role="assistant", content=answer)]
        self._conversation_id, self._turn_id = who["conversation_id"], who["turn_id"]


async def _typed() -> None:
    """Returns when the terminal has a whole line. A thread that waited for it would keep Ctrl-C from leaving."""
    loop = asyncio.get_running_loop()
    has_line = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), has_line.set)
    try:
        await has_line.wait()
    finally:
        loop.remove_reader(sys.stdin.fileno())


class _InterruptedError(Exception):
    """The person pressed Ctrl-C."""


def _signature(who: dict[str, Any]) -> str:
    """Who answered, in one line."""
    routing = who["routing"]
    answered_by = f"{who['domain']} v{who['version']}" if who["domain"] else "router"
    if who["digest"]:
        answered_by += f" ({who['digest'][:8]})"
    return f"{answered_by} · {routing['reason']} {routing['score']:.2f} · first token {who['first_token_ms']:.0f} ms"
