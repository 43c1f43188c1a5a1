"""Limits over HTTP: a route that makes turns takes a TurnGate and enters it; every answer of it tells what is left.

async def create(body: ..., principal: Annotated[Principal, allow("chat")], gate: TurnGate) -> Response:
    await gate.enter(principal, body.person)
"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bot.access.limits import Gate, Limiter


async def _gate(request: Request) -> AsyncIterator[Gate]:
    """Left when the answer has been sent, however long it streams and however it ends."""
    limiter: Limiter | None = request.app.state.limiter
    gate = request.state.gate = Gate(limiter)
    try:
        yield gate
    finally:
        await gate.leave()


TurnGate = Annotated[Gate, Depends(_gate)]


class LimitHeaders:
    """ASGI middleware: refusals and streams carry the headers too, whichever way they leave."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            gate: Gate | None = scope.get("state", {}).get("gate")
            if message["type"] == "http.response.start" and gate is not None and gate.allowance is not None:
                headers = MutableHeaders(scope=message)
                headers["RateLimit-Limit"] = str(gate.allowance.limit)
                headers["RateLimit-Remaining"] = str(gate.allowance.remaining)
                headers["RateLimit-Reset"] = str(gate.allowance.reset_s)
            await send(message)

        await self._app(scope, receive, send_with_headers)
