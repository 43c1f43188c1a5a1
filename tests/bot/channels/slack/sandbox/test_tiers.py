"""Rate limits by method, workspace and channel, on a clock that tests move on."""

import asyncio

import pytest
from slack_sdk.http_retry.builtin_async_handlers import AsyncRateLimitErrorRetryHandler
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.clock import Clock
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox
from bot.channels.slack.sandbox.tiers import TIERS, Rate, Tiers
from bot.channels.slack.sandbox.web_api import METHODS
from tests.bot.channels.slack.sandbox.bots import refusal


def test_every_method_has_a_tier() -> None:
    assert set(TIERS) == set(METHODS)


@pytest.mark.parametrize(
    ("method", "calls"),
    [("chat.startStream", 20), ("chat.stopStream", 20), ("chat.appendStream", 100), ("chat.update", 50)],
)
def test_so_many_calls_a_minute_are_allowed(method: str, calls: int) -> None:
    clock = Clock(speed=0)
    tiers = Tiers(clock, {})

    def wait_s(team_id: str = "T1") -> int:
        return tiers.retry_after_s(method, "A1", team_id, "C1", is_marketplace=True)

    assert [wait_s() for _ in range(calls)] == [0] * calls
    assert wait_s() > 0
    assert wait_s("T2") == 0
    clock.advance(60)
    assert [wait_s() for _ in range(calls)] == [0] * calls
    assert wait_s() > 0


async def test_posting_is_limited_by_channel_to_one_a_second_after_a_burst(slack: SlackSandbox, client: AsyncWebClient) -> None:
    general, random = slack.add_channel("general"), slack.add_channel("random")
    for _ in range(5):
        await client.chat_postMessage(channel=general.id, text="hello")
    limited = await refusal(client.chat_postMessage(channel=general.id, text="hello"))
    assert limited.response.status_code == 429
    assert limited.response.headers["Retry-After"] == "1"
    assert limited.response.data == {"ok": False, "error": "ratelimited"}
    await client.chat_postMessage(channel=random.id, text="hello")
    slack.clock.advance(1)
    await client.chat_postMessage(channel=general.id, text="hello")
    await refusal(client.chat_postMessage(channel=general.id, text="hello"))


async def test_the_clients_own_handler_waits_as_long_as_it_is_told(alice: Person, slack: SlackSandbox) -> None:
    slack.faults.rate_limit("chat.postMessage", retry_after_s=0)
    client = AsyncWebClient(
        slack.bot_token(), base_url=slack.api_url, retry_handlers=[AsyncRateLimitErrorRetryHandler(max_retry_count=1)]
    )
    await asyncio.wait_for(client.chat_postMessage(channel=alice.direct_messages.id, text="hello"), 20)
    assert [call.status for call in slack.calls] == [429, 200]


async def test_a_test_may_set_other_rates() -> None:
    async with SlackSandbox(clock=Clock(speed=0), rates={"auth.test": Rate(1)}) as slack:
        client = AsyncWebClient(slack.bot_token(), base_url=slack.api_url)
        await client.auth_test()
        assert (await refusal(client.auth_test())).response.headers["Retry-After"] == "60"
