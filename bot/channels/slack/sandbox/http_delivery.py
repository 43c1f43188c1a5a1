"""Signed requests to the app's URL, as Slack sends them when an app does not use Socket Mode."""

import hashlib
import hmac
import json
import time
from urllib.parse import urlencode

import aiohttp

from bot.channels.slack.sandbox.deliveries import ACKNOWLEDGE_WITHIN_S, Attempt, Delivery
from bot.channels.slack.sandbox.errors import ActionError, DeliveryError
from bot.channels.slack.sandbox.world import App, Json, World


def signed_headers(signing_secret: str, body: str, timestamp: int | None = None) -> dict[str, str]:
    """Version 0: an HMAC over timestamp and body. Apps compare the timestamp with their own clock, so it is the real one."""
    at = str(int(time.time()) if timestamp is None else timestamp)
    digest = hmac.new(signing_secret.encode(), f"v0:{at}:{body}".encode(), hashlib.sha256).hexdigest()
    return {"X-Slack-Request-Timestamp": at, "X-Slack-Signature": f"v0={digest}"}


class HttpDelivery:
    """A transport. The session is opened with the server and closed with it."""

    timeout_reason = "http_timeout"

    def __init__(self, world: World) -> None:
        self._world = world
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        self._session = aiohttp.ClientSession()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def send(self, delivery: Delivery, attempt: Attempt) -> Json | None:
        content_type, body = _encode(delivery)
        headers = {"Content-Type": content_type}
        if attempt.number:
            headers |= {"X-Slack-Retry-Num": str(attempt.number), "X-Slack-Retry-Reason": attempt.retry_reason or ""}
        attempt.status, text, is_json, may_retry = await self._post(delivery.app, body, headers)
        if not 200 <= attempt.status < 300:
            raise DeliveryError("http_error", attempt.status, may_retry)
        if not text.strip():
            return None
        if not is_json:
            return {"text": text}
        try:
            return dict(json.loads(text))
        except ValueError:
            raise DeliveryError("unknown_error", attempt.status) from None

    async def verify_url(self, app: App) -> None:
        """Slack's test of a new request URL. Raises ActionError when the challenge does not come back."""
        challenge = self._world.new_id("challenge-")
        asked = {"token": app.verification_token, "challenge": challenge, "type": "url_verification"}
        try:
            status, text, is_json, _ = await self._post(app, json.dumps(asked), {"Content-Type": "application/json"})
        except DeliveryError as error:
            raise ActionError(f"{app.request_url} did not answer the challenge: {error.reason}") from error
        answered = json.loads(text).get("challenge") if is_json else text
        if status != 200 or answered != challenge:
            raise ActionError(f"{app.request_url} answered {status} with {text[:100]!r}, not with the challenge")

    async def _post(self, app: App, body: str, headers: dict[str, str]) -> tuple[int, str, bool, bool]:
        """Status, text, whether it is JSON, and whether the app would have it sent again."""
        try:
            return await self._world.clock.within(ACKNOWLEDGE_WITHIN_S, self._answer(app, body, headers))
        except TimeoutError:
            raise DeliveryError(self.timeout_reason) from None
        except aiohttp.ClientError:
            raise DeliveryError("connection_failed") from None

    async def _answer(self, app: App, body: str, headers: dict[str, str]) -> tuple[int, str, bool, bool]:
        assert self._session is not None
        assert app.request_url is not None
        signed = headers | signed_headers(app.signing_secret, body) | {"User-Agent": "Slackbot 1.0 (sandbox)"}
        async with self._session.post(app.request_url, data=body.encode(), headers=signed) as response:
            is_json = response.content_type == "application/json"
            return response.status, await response.text(), is_json, response.headers.get("X-Slack-No-Retry") != "1"


def _encode(delivery: Delivery) -> tuple[str, str]:
    """Events as JSON, interactions as JSON in a form, commands as a form."""
    if delivery.kind == "events_api":
        return "application/json", json.dumps(delivery.payload)
    form = delivery.payload if delivery.kind == "slash_commands" else {"payload": json.dumps(delivery.payload)}
    return "application/x-www-form-urlencoded", urlencode(form)
