"""What becomes of a delivery when the sandbox itself breaks or ends."""

import asyncio
from typing import Any

import aiohttp
import pytest
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.clock import Changes, Clock
from bot.channels.slack.sandbox.deliveries import Attempt, Deliveries, Delivery, DeliveryState
from bot.channels.slack.sandbox.faults import FaultScript
from bot.channels.slack.sandbox.server import SlackSandbox
from bot.channels.slack.sandbox.world import App, World
from tests.bot.channels.slack.sandbox.bots import bolt_app, connected


class BrokenTransport:
    timeout_reason = "timeout"

    async def send(self, delivery: Delivery, attempt: Attempt) -> dict[str, Any] | None:
        raise KeyError("a mistake of ours")


async def test_a_mistake_of_the_sandbox_is_told_when_it_closes() -> None:
    deliveries = Deliveries(World(Clock(speed=0), Changes()), FaultScript(), lambda app: BrokenTransport())
    delivery = deliveries.send(App(), "slash_commands", {})
    await asyncio.wait_for(delivery.finished.wait(), 10)
    assert delivery.state is DeliveryState.GIVEN_UP
    await deliveries.settled()
    with pytest.raises(KeyError, match="a mistake of ours"):
        await deliveries.close()


async def test_a_sandbox_closes_whatever_is_under_way() -> None:
    async with SlackSandbox(clock=Clock(speed=0)) as slack:
        slack.add_person("Alice").writes("hello")
        await slack.until(lambda: slack.deliveries[0].attempts)
    assert slack.deliveries[0].state is DeliveryState.GIVEN_UP
    with pytest.raises(OSError, match="Cannot connect"):
        await AsyncWebClient(slack.bot_token(), base_url=slack.api_url, retry_handlers=[]).auth_test()


async def test_a_sandbox_closes_its_websockets() -> None:
    async with aiohttp.ClientSession() as session:
        async with SlackSandbox(clock=Clock(speed=0)) as slack:
            client = AsyncWebClient(slack.bot_token(), base_url=slack.api_url)
            url = (await client.apps_connections_open(app_token=slack.app.app_token))["url"]
            websocket = await session.ws_connect(url)
            await websocket.receive_json(timeout=10)
            reading = asyncio.create_task(websocket.receive(timeout=10))
        assert (await reading).type is aiohttp.WSMsgType.CLOSE


async def test_it_works_with_the_real_clock_too() -> None:
    async with SlackSandbox() as slack:
        app, alice = bolt_app(slack), slack.add_person("Alice")

        @app.event("message")
        async def answer(event: dict[str, Any], say: Any) -> None:
            await say(text="Hello", thread_ts=event["ts"])

        async with connected(slack, app):
            alice.writes("hello")
            await slack.until(lambda: len(alice.sees()) == 2)
            await slack.settled()
