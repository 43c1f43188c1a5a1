"""Socket Mode with the SDK's own client and bolt: envelopes, acknowledgements, redelivery, several connections."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from slack_bolt.response import BoltResponse
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.deliveries import DeliveryState
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from tests.bot.channels.slack.sandbox.bots import Arrivals, bolt_app, connected, patient_app


async def test_an_event_is_delivered_once_and_acknowledged(slack: SlackSandbox, alice: Person) -> None:
    app, events = bolt_app(slack), list[dict[str, Any]]()

    @app.event("message")
    async def answer(event: dict[str, Any], say: Any) -> None:
        events.append(event)
        await say(text=f"You said: {event['text']}", thread_ts=event["ts"])

    async with connected(slack, app):
        question = alice.writes("I lost my card")
        await slack.until(lambda: len(alice.sees()) == 2)
        await slack.settled()
    delivery = slack.deliveries[0]
    assert delivery.is_acknowledged
    assert [attempt.number for attempt in delivery.attempts] == [0]
    assert [event["ts"] for event in events] == [question.ts]
    assert alice.sees()[1].text == "You said: I lost my card"
    assert alice.sees()[1].thread_ts == question.ts


async def test_every_connection_starts_with_hello(slack: SlackSandbox, client: AsyncWebClient) -> None:
    url = (await client.apps_connections_open(app_token=slack.app.app_token))["url"]
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(url) as websocket:
            hello = await websocket.receive_json(timeout=10)
        assert (hello["type"], hello["num_connections"]) == ("hello", 1)
        assert hello["connection_info"] == {"app_id": slack.app.id}
        async with session.get(url) as used_up:
            assert used_up.status == 404


async def test_more_than_ten_connections_are_not_kept(slack: SlackSandbox, client: AsyncWebClient) -> None:
    async with aiohttp.ClientSession() as session:
        urls = [(await client.apps_connections_open(app_token=slack.app.app_token))["url"] for _ in range(10)]
        websockets = [await session.ws_connect(url) for url in urls]
        await slack.until(lambda: len(slack.connections) == 10)
        slack.clock.advance(60)
        url = (await client.apps_connections_open(app_token=slack.app.app_token))["url"]
        async with session.ws_connect(url) as eleventh:
            told = await eleventh.receive_json(timeout=10)
        assert (told["type"], told["reason"]) == ("disconnect", "too_many_websockets")
        for websocket in websockets:
            await websocket.close()


async def test_what_is_not_acknowledged_comes_again_at_once_after_one_and_after_five_minutes(
    slack: SlackSandbox, alice: Person
) -> None:
    app, seen = bolt_app(slack), Arrivals[tuple[str, str | None, str | None]]()

    @app.middleware
    async def fail(req: Any, body: dict[str, Any], next: Callable[[], Awaitable[BoltResponse]]) -> None:
        headers = {name: values[0] for name, values in req.headers.items()}
        seen.append((body["event_id"], headers.get("x-slack-retry-num"), headers.get("x-slack-retry-reason")))
        raise ConnectionError("Redis is away")

    async with connected(slack, app):
        alice.writes("I lost my card")
        (delivery,) = slack.deliveries
        for number, pause_s in enumerate((0, 0, 60, 300)):
            if pause_s:
                await slack.until(lambda: delivery.state is DeliveryState.WAITING)
                slack.clock.advance(pause_s)
            await seen.first(number + 1)
            slack.clock.advance(3)
        await slack.until(lambda: delivery.state is DeliveryState.GIVEN_UP)
    event_id = delivery.event_id
    assert seen.all == [(event_id, "0", ""), *((event_id, str(number), "timeout") for number in (1, 2, 3))]
    assert len({attempt.envelope_id for attempt in delivery.attempts}) == 4
    assert [attempt.failure for attempt in delivery.attempts] == ["timeout"] * 4
    ages = [attempt.at - delivery.attempts[0].at for attempt in delivery.attempts]
    assert [round(age) for age in ages] == [0, 3, 66, 369]


async def test_an_event_waits_a_moment_for_an_app_that_connects(slack: SlackSandbox, alice: Person) -> None:
    alice.writes("hello")
    await asyncio.sleep(0.01)
    async with connected(slack, patient_app(slack)):
        await slack.settled()
    assert slack.deliveries[0].is_acknowledged
    assert len(slack.deliveries[0].attempts) == 1


async def test_each_event_goes_to_one_of_several_connections(slack: SlackSandbox, alice: Person) -> None:
    app = patient_app(slack)
    async with connected(slack, app), connected(slack, app):
        first, second = slack.connections
        for number in range(10):
            alice.writes(str(number))
        await slack.settled()
    # The greeting and half of the events.
    assert [len(first.envelopes), len(second.envelopes)] == [6, 6]
    assert all(len(delivery.attempts) == 1 for delivery in slack.deliveries)


async def test_a_client_that_goes_before_it_acknowledges_gets_the_event_with_its_next_connection(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person
) -> None:
    async with aiohttp.ClientSession() as session:
        told = []
        for _ in range(2):
            url = (await client.apps_connections_open(app_token=slack.app.app_token))["url"]
            async with session.ws_connect(url) as websocket:
                await websocket.receive_json(timeout=10)
                if not told:
                    alice.writes("hello")
                told.append(await websocket.receive_json(timeout=10))
        assert told[0]["payload"] == told[1]["payload"]
        assert [envelope["retry_attempt"] for envelope in told] == [0, 1]


async def test_an_acknowledgement_that_comes_too_late_changes_nothing(
    slack: SlackSandbox, client: AsyncWebClient, alice: Person
) -> None:
    url = (await client.apps_connections_open(app_token=slack.app.app_token))["url"]
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as websocket:
        await websocket.receive_json(timeout=10)
        alice.writes("hello")
        first = await websocket.receive_json(timeout=10)
        slack.clock.advance(3)
        second = await websocket.receive_json(timeout=10)
        await websocket.send_json({"envelope_id": first["envelope_id"]})
        await websocket.send_json({"envelope_id": second["envelope_id"]})
        await slack.settled()
    assert (first["retry_attempt"], second["retry_attempt"], second["retry_reason"]) == (0, 1, "timeout")
    assert first["payload"]["event_id"] == second["payload"]["event_id"]
    assert slack.deliveries[0].is_acknowledged
    assert slack.deliveries[0].attempts[0].failure == "timeout"
