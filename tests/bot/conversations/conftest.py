"""Inboxes and events on the Valkey of the test session."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from bot.conversations.events import Events
from bot.conversations.inbox import Inbox, InboxMessage

PREFIX = "frontdesk:test:"
TABLE_KEY = f"{PREFIX}pointers"
MakeInbox = Callable[..., Inbox]


def message(id_: str, conversation_id: str = "c1", text: str = "Hi", **settings: Any) -> InboxMessage:
    return InboxMessage(id_, conversation_id, text, received_at=1.5, settings=settings)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator["Redis"]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def make_inbox(redis: "Redis") -> MakeInbox:
    def make(**given: Any) -> Inbox:
        return Inbox(redis, PREFIX, TABLE_KEY, **given)

    return make


@pytest.fixture
def inbox(make_inbox: MakeInbox) -> Inbox:
    return make_inbox()


@pytest.fixture
async def events(redis: "Redis") -> AsyncIterator[Events]:
    opened = Events(redis, PREFIX)
    async with opened.listening():
        yield opened
