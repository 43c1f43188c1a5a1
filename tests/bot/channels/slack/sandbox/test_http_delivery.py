"""Signed requests to a bot behind HTTP: bolt's handler for the whole way, a bare server for what bolt hides."""

import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qs

import pytest
from slack_sdk.signature import SignatureVerifier
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from bot.channels.slack.sandbox.deliveries import DeliveryState
from bot.channels.slack.sandbox.errors import ActionError
from bot.channels.slack.sandbox.http_delivery import signed_headers
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from tests.bot.channels.slack.sandbox.bots import Arrivals, bolt_app, listening, serving


class Receiver:
    """Keeps what it is sent and answers with `response`; the tests say with what."""

    def __init__(self, slack: SlackSandbox) -> None:
        self._slack = slack
        self.response: Response = PlainTextResponse("")
        self.is_slow = False
        self.arrivals = Arrivals[tuple[dict[str, str], str]]()

    async def handle(self, request: Request) -> Response:
        self.arrivals.append((dict(request.headers), (await request.body()).decode()))
        if self.is_slow:
            await self._slack.clock.sleep(10)
        return self.response


@pytest.fixture
async def receiver(slack: SlackSandbox) -> AsyncIterator[Receiver]:
    receiver = Receiver(slack)
    async with listening(Starlette(routes=[Route("/", receiver.handle, methods=["POST"])])) as url:
        slack.app.request_url = f"{url}/"
        yield receiver


async def test_bolt_takes_a_signed_event_and_answers(slack: SlackSandbox, alice: Person) -> None:
    app = bolt_app(slack)

    @app.event("message")
    async def answer(event: dict[str, Any], say: Any) -> None:
        await say(text="Yes?", thread_ts=event["ts"])

    async with serving(slack, app):
        await slack.verify_request_url()
        alice.writes("hello")
        await slack.until(lambda: len(alice.sees()) == 2)
        await slack.settled()
    assert [delivery.is_acknowledged for delivery in slack.deliveries] == [True, True]
    assert slack.deliveries[0].attempts[0].status == 200


async def test_bolt_refuses_what_is_signed_with_another_secret(slack: SlackSandbox, alice: Person) -> None:
    app = bolt_app(slack)
    async with serving(slack, app):
        slack.app.signing_secret = "another"
        alice.writes("hello")
        (delivery,) = slack.deliveries
        await slack.until(lambda: delivery.state is DeliveryState.WAITING)
    assert [(attempt.failure, attempt.status) for attempt in delivery.attempts] == [("http_error", 401)] * 2


async def test_the_signature_is_the_sdks(slack: SlackSandbox, alice: Person, receiver: Receiver) -> None:
    verifier = SignatureVerifier(slack.app.signing_secret)
    alice.writes("hello, wörld")
    await slack.settled()
    ((headers, body),) = receiver.arrivals.all
    assert verifier.is_valid_request(body, headers)
    assert not verifier.is_valid_request(body + " ", headers)
    assert "x-slack-retry-num" not in headers
    assert json.loads(body)["event"]["text"] == "hello, wörld"
    old = signed_headers(slack.app.signing_secret, body, timestamp=1_700_000_000)
    assert not verifier.is_valid_request(body, old)


async def test_what_is_not_taken_comes_again_with_number_and_reason(
    slack: SlackSandbox, alice: Person, receiver: Receiver
) -> None:
    receiver.response = Response(status_code=500)
    alice.writes("hello")
    (delivery,) = slack.deliveries
    for pause_s in (60, 300):
        await slack.until(lambda: delivery.state is DeliveryState.WAITING)
        slack.clock.advance(pause_s)
        await slack.settled()
    assert delivery.state is DeliveryState.GIVEN_UP
    told = [
        (headers.get("x-slack-retry-num"), headers.get("x-slack-retry-reason"), json.loads(body)["event_id"])
        for headers, body in receiver.arrivals.all
    ]
    assert told == [
        (None, None, delivery.event_id),
        *((str(number), "http_error", delivery.event_id) for number in (1, 2, 3)),
    ]


async def test_an_answer_that_takes_more_than_three_seconds_is_none(
    slack: SlackSandbox, alice: Person, receiver: Receiver
) -> None:
    receiver.is_slow = True
    alice.writes("hello")
    (delivery,) = slack.deliveries
    for number in (1, 2):
        await receiver.arrivals.first(number)
        assert len(delivery.attempts) == number
        slack.clock.advance(3)
    await slack.until(lambda: delivery.state is DeliveryState.WAITING)
    assert [attempt.failure for attempt in delivery.attempts] == ["http_timeout"] * 2
    slack.clock.advance(7)


async def test_an_app_may_ask_not_to_be_sent_it_again(slack: SlackSandbox, alice: Person, receiver: Receiver) -> None:
    receiver.response = Response(status_code=404, headers={"X-Slack-No-Retry": "1"})
    alice.writes("hello")
    await slack.settled()
    assert slack.deliveries[0].state is DeliveryState.GIVEN_UP
    assert len(receiver.arrivals.all) == 1


async def test_a_server_that_is_away_is_tried_again(slack: SlackSandbox, alice: Person) -> None:
    slack.app.request_url = "http://127.0.0.1:9/"
    alice.writes("hello")
    (delivery,) = slack.deliveries
    await slack.until(lambda: delivery.state is DeliveryState.WAITING)
    assert [attempt.failure for attempt in delivery.attempts] == ["connection_failed"] * 2


async def test_interactions_come_as_forms(slack: SlackSandbox, alice: Person, receiver: Receiver) -> None:
    receiver.response = JSONResponse({"response_type": "in_channel", "text": "At nine."})
    question = alice.writes("hello")
    command = await alice.uses("/frontdesk", "when do you open & close?")
    await alice.chooses_shortcut("ask_frontdesk", question)
    form, wrapped = (body for headers, body in receiver.arrivals.all if "form" in headers["content-type"])
    fields = {name: values[0] for name, values in parse_qs(form).items()}
    assert (fields["command"], fields["text"]) == ("/frontdesk", "when do you open & close?")
    assert (fields["user_id"], fields["channel_id"]) == (alice.id, alice.direct_messages.id)
    assert command.answer == {"response_type": "in_channel", "text": "At nine."}
    assert alice.sees()[-1].text == "At nine."
    assert json.loads(parse_qs(wrapped)["payload"][0])["callback_id"] == "ask_frontdesk"


async def test_an_answer_that_is_no_json_though_it_says_so_is_none(
    slack: SlackSandbox, alice: Person, receiver: Receiver
) -> None:
    receiver.response = Response("{", media_type="application/json")
    command = await alice.uses("/frontdesk")
    assert command.attempts[0].failure == "unknown_error"
    assert not command.is_acknowledged


async def test_an_answer_that_slack_would_not_post_is_an_error(slack: SlackSandbox, alice: Person, receiver: Receiver) -> None:
    receiver.response = JSONResponse({"text": "hello", "blocks": [{"type": "song"}]})
    with pytest.raises(ActionError, match="invalid_blocks"):
        await alice.uses("/frontdesk")


async def test_a_challenge_must_come_back(slack: SlackSandbox, receiver: Receiver) -> None:
    with pytest.raises(ActionError, match="not with the challenge"):
        await slack.verify_request_url()
    slack.app.request_url = "http://127.0.0.1:9/"
    with pytest.raises(ActionError, match="connection_failed"):
        await slack.verify_request_url()
