"""A Slack whose clock stands still, and a client of it."""

from collections.abc import AsyncIterator

import pytest
from slack_sdk.web.async_client import AsyncWebClient

from bot.channels.slack.sandbox.clock import Clock
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.server import SlackSandbox


@pytest.fixture
async def slack() -> AsyncIterator[SlackSandbox]:
    async with SlackSandbox(clock=Clock(speed=0)) as sandbox:
        yield sandbox


@pytest.fixture
def client(slack: SlackSandbox) -> AsyncWebClient:
    return AsyncWebClient(slack.bot_token(), base_url=slack.api_url)


@pytest.fixture
def alice(slack: SlackSandbox) -> Person:
    return slack.add_person("Alice")
