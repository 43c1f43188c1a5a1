"""Every scripted fault, as a client or a bot really meets it."""

import asyncio
from typing import Any

import aiohttp
import pytest
from slack_bolt.app.async_app import AsyncApp
from slack_sdk.http_retry.builtin_async_handlers import AsyncServerErrorRetryHandler
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.deliveries import DeliveryState
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from tests.bot.channels.slack.sandbox.bots import Arrivals, bolt_app, connected, error_of, reached, refusal

both_transports = pytest.mark.parametrize("transport", ["socket", "http"])


def _listening_app(slack: SlackSandbox) -> tuple[AsyncApp, Arrivals[dict[str, Any]]]:
    """A bot that keeps the bodies of all messages it is told of."""
    app, bodies = bolt_app(slack), Arrivals[dict[str, Any]]()

    @app.event("message")
    async def keep(body: dict[str, Any]) -> None:
        bodies.append(body)

    return app, bodies


async def test_a_storm_of_429_ends(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    slack.faults.rate_limit("chat.postMessage", times=2, retry_after_s=7)
    for _ in range(2):
        limited = await refusal(client.chat_postMessage(channel=alice.id, text="hello"))
        assert (limited.response.status_code, limited.response.headers["Retry-After"]) == (429, "7")
    await client.auth_test()
    await client.chat_postMessage(channel=alice.id, text="hello")
    assert len(alice.sees()) == 1


async def test_a_call_that_fails_before_its_effect_has_none(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    slack.faults.fail_before("chat.postMessage", status=502)
    failed = await refusal(client.chat_postMessage(channel=alice.id, text="hello"))
    assert failed.response.status_code == 502
    assert alice.sees() == []


async def test_a_call_that_fails_after_its_effect_posts_twice_when_it_is_retried_blindly(
    slack: SlackSandbox, alice: Person
) -> None:
    slack.faults.fail_after("chat.postMessage")
    client = AsyncWebClient(slack.bot_token(), base_url=slack.api_url, retry_handlers=[AsyncServerErrorRetryHandler()])
    await client.chat_postMessage(channel=alice.id, text="hello")
    assert [message.text for message in alice.sees()] == ["hello", "hello"]
    assert [call.status for call in slack.calls] == [503, 200]
    assert slack.calls[0].answer is None


async def test_any_error_can_be_scripted(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    slack.faults.refuse(None, "fatal_error", times=2)
    assert await error_of(client.auth_test()) == "fatal_error"
    assert await error_of(client.chat_postMessage(channel=alice.id, text="hello")) == "fatal_error"
    await client.auth_test()
    assert [call.error for call in slack.calls_of("auth.test")] == ["fatal_error", None]


async def test_a_slow_answer_takes_its_time(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    slack.faults.slow_down("chat.postMessage", 20)
    posting = asyncio.create_task(client.chat_postMessage(channel=alice.id, text="hello"))
    await slack.until(lambda: slack.calls)
    slack.clock.advance(19)
    await client.auth_test()
    assert not posting.done()
    slack.clock.advance(1)
    await posting
    assert len(alice.sees()) == 1


async def test_revoked_tokens_count_no_more(slack: SlackSandbox, client: AsyncWebClient) -> None:
    slack.faults.revoke_tokens(slack.workspace)
    assert await error_of(client.auth_test()) == "token_revoked"
    assert slack.deliveries == []


async def test_a_stream_may_end_early(slack: SlackSandbox, client: AsyncWebClient, alice: Person) -> None:
    slack.faults.expire_streams_after(10)
    question = alice.writes("hello")
    stream = await client.chat_stream(channel=question.channel.id, thread_ts=question.ts, buffer_size=1)
    await stream.append(markdown_text="Well, ")
    slack.clock.advance(10)
    assert await error_of(stream.append(markdown_text="yes.")) == "message_not_in_streaming_state"
    # The helper keeps what it could not send.
    assert await error_of(stream.stop()) == "message_not_in_streaming_state"
    assert slack.calls[-1].arguments["chunks"] == [{"type": "markdown_text", "text": "yes."}]
    again = await client.chat_stream(channel=question.channel.id, thread_ts=question.ts, buffer_size=1)
    await again.append(markdown_text="Well, ")
    slack.faults.expire_stream(slack.messages[-1])
    assert await error_of(again.append(markdown_text="yes.")) == "message_not_in_streaming_state"


@both_transports
async def test_a_duplicate_has_the_same_event_id(slack: SlackSandbox, alice: Person, transport: str) -> None:
    app, bodies = _listening_app(slack)
    slack.faults.duplicate("message")
    async with reached(slack, app, transport):
        alice.writes("hello")
        alice.writes("again")
        told = await bodies.first(3)
        await slack.settled()
    assert sorted(body["event"]["text"] for body in told) == ["again", "hello", "hello"]
    assert len({body["event_id"] for body in told}) == 2


@both_transports
async def test_a_lost_acknowledgement_brings_the_event_again(slack: SlackSandbox, alice: Person, transport: str) -> None:
    app, bodies = _listening_app(slack)
    slack.faults.lose_acknowledgement(times=2)
    async with reached(slack, app, transport):
        alice.writes("hello")
        (delivery,) = slack.deliveries
        await slack.until(lambda: delivery.state is DeliveryState.WAITING)
        slack.clock.advance(60)
        told = await bodies.first(3)
        await slack.settled()
    assert {body["event_id"] for body in told} == {delivery.event_id}
    assert delivery.is_acknowledged
    assert [attempt.retry_reason for attempt in delivery.attempts] == [
        None,
        *(["timeout"] * 2 if transport == "socket" else ["http_timeout"] * 2),
    ]


async def test_events_may_come_in_reverse(slack: SlackSandbox, alice: Person) -> None:
    app, bodies = _listening_app(slack)
    slack.faults.reverse(3, "message")
    async with connected(slack, app):
        for number in range(4):
            alice.writes(str(number))
        await bodies.first(4)
        sent = [envelope["payload"]["event"]["text"] for envelope in slack.connections[0].envelopes[1:]]
        await slack.settled()
    assert sent == ["2", "1", "0", "3"]


async def test_a_connection_that_breaks_before_the_acknowledgement_brings_the_event_again(
    slack: SlackSandbox, alice: Person
) -> None:
    app, bodies = _listening_app(slack)
    slack.faults.drop_connection("message")
    async with connected(slack, app, ping_interval=0.2):
        alice.writes("hello")
        (delivery,) = slack.deliveries
        await slack.until(lambda: delivery.is_acknowledged)
        await bodies.first(1)
    assert [attempt.failure for attempt in delivery.attempts] == ["connection_failed", None]
    assert {body["event_id"] for body in bodies.all} == {delivery.event_id}


@pytest.mark.parametrize("reason", ["warning", "refresh_requested"])
async def test_told_to_disconnect_a_client_comes_again_and_misses_nothing(
    slack: SlackSandbox, alice: Person, reason: str
) -> None:
    app, bodies = _listening_app(slack)
    async with connected(slack, app):
        (before,) = slack.connections
        await slack.faults.disconnect(reason)
        alice.writes("hello")
        await bodies.first(1)
        await slack.until(lambda: len(slack.connections) == 1)
        assert slack.connections[0] is not before
        await slack.settled()
    assert before.envelopes[-1]["reason"] == reason
    assert slack.deliveries[0].is_acknowledged


async def test_who_stays_is_disconnected_after_ten_seconds(slack: SlackSandbox, client: AsyncWebClient) -> None:
    url = (await client.apps_connections_open(app_token=slack.app.app_token))["url"]
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as websocket:
        await websocket.receive_json(timeout=10)
        await slack.faults.disconnect("warning")
        assert (await websocket.receive_json(timeout=10))["type"] == "disconnect"
        slack.clock.advance(10)
        assert (await websocket.receive(timeout=10)).type is aiohttp.WSMsgType.CLOSE
