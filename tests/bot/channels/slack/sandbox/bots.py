"""Bots as their makers write them, over Socket Mode and over HTTP; and what a client is refused."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import pytest
import uvicorn
from slack_bolt.adapter.socket_mode.aiohttp import AsyncSocketModeHandler
from slack_bolt.adapter.starlette.async_handler import AsyncSlackRequestHandler
from slack_bolt.app.async_app import AsyncApp
from slack_sdk.errors import SlackApiError
from slack_sdk.web.async_client import AsyncWebClient
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bot.channels.slack.sandbox.clock import Changes
from bot.channels.slack.sandbox.server import SlackSandbox

T = TypeVar("T")


class Arrivals(Generic[T]):
    """What a bot has been told, and a way to wait until it has been told so much."""

    def __init__(self) -> None:
        self.all: list[T] = []
        self._changes = Changes()

    def append(self, item: T) -> None:
        self.all.append(item)
        self._changes.notify()

    async def first(self, count: int) -> list[T]:
        await self._changes.until(lambda: len(self.all) >= count)
        return self.all[:count]


async def refusal(call: Awaitable[Any]) -> SlackApiError:
    with pytest.raises(SlackApiError) as raised:
        await call
    return raised.value


async def error_of(call: Awaitable[Any]) -> str:
    return str((await refusal(call)).response["error"])


def bolt_app(slack: SlackSandbox) -> AsyncApp:
    client = AsyncWebClient(slack.bot_token(), base_url=slack.api_url)
    return AsyncApp(client=client, signing_secret=slack.app.signing_secret)


def patient_app(slack: SlackSandbox) -> AsyncApp:
    """Takes every event and does nothing with it. (What bolt has no listener for it does not acknowledge.)"""
    app = bolt_app(slack)

    @app.event(re.compile(".*"))
    async def take() -> None:
        pass

    return app


@asynccontextmanager
async def connected(slack: SlackSandbox, app: AsyncApp, ping_interval: float = 10) -> AsyncIterator[AsyncSocketModeHandler]:
    handler = AsyncSocketModeHandler(app, app_token=slack.app.app_token, ping_interval=ping_interval)
    num_open = len(slack.connections)
    await handler.connect_async()
    try:
        await slack.until(lambda: len(slack.connections) > num_open)
        yield handler
    finally:
        await handler.close_async()


@asynccontextmanager
async def serving(slack: SlackSandbox, app: AsyncApp) -> AsyncIterator[str]:
    """The app behind an HTTP server, to which Slack then sends."""
    handler = AsyncSlackRequestHandler(app)

    async def handle(request: Request) -> Response:
        return await handler.handle(request)

    async with listening(Starlette(routes=[Route("/slack/events", handle, methods=["POST"])])) as url:
        slack.app.request_url = f"{url}/slack/events"
        yield slack.app.request_url


@asynccontextmanager
async def reached(slack: SlackSandbox, app: AsyncApp, transport: str) -> AsyncIterator[None]:
    """Either of the two."""
    async with connected(slack, app) if transport == "socket" else serving(slack, app):
        yield


@asynccontextmanager
async def listening(application: Starlette) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(application, log_config=None, access_log=False, lifespan="off"))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await running
