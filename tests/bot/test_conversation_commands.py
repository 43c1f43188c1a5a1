"""`frontdesk logs` and `frontdesk inbox` on an installation's own database and Redis."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from bot.conversation_commands import _open_inbox
from bot.conversations.database import open_database
from bot.conversations.inbox import MAX_DELIVERIES, Inbox, InboxMessage
from bot.conversations.log import ConversationLog
from bot.conversations.records import Caller
from bot.settings import Settings
from tests.bot.conftest import Frontdesk
from tests.bot.conversations.test_log import turn


@asynccontextmanager
async def inbox_with(*texts: str) -> AsyncIterator[Inbox]:
    async with _open_inbox() as inbox:
        for number, text in enumerate(texts):
            await inbox.put(InboxMessage(f"m{number}", "c1", text, 0.0, {}))
        yield inbox


async def kill_first(inbox: Inbox) -> None:
    for _ in range(MAX_DELIVERIES):
        claim, _ = await inbox.claim()
        assert claim is not None
        await inbox.release(claim)
    claim, _ = await inbox.claim()
    if claim is not None:
        await inbox.release(claim, is_undelivered=True)


@pytest.fixture
def _embedded(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> None:
    monkeypatch.setenv("FRONTDESK_REDIS_URL", redis_url)


@pytest.mark.usefixtures("_embedded")
def test_the_inbox_is_listed_and_dead_letters_are_replayed(frontdesk: Frontdesk) -> None:
    async def prepare() -> None:
        async with inbox_with("it \x1b[31mkills\n", "waits") as inbox:
            await kill_first(inbox)

    asyncio.run(prepare())
    status, out, _ = frontdesk("inbox", "list")
    assert status == 0
    assert "1 messages wait in 1 conversations, 1 dead letters" in out
    assert "it  [31mkills" in out
    assert "\x1b[31m" not in out
    status, out, _ = frontdesk("inbox", "list", "--json")
    listed = json.loads(out)
    assert (listed["queued"], listed["waiting"]) == (1, {"c1": 1})
    assert listed["dead"] == [{"conversation_id": "c1", "message_id": "m0"}]
    assert frontdesk("inbox", "replay")[:2] == (0, "1 dead letters replayed\n")
    assert "2 messages wait in 1 conversations, 0 dead letters" in frontdesk("inbox", "list")[1]


def test_turns_are_found(frontdesk: Frontdesk) -> None:
    async def prepare() -> None:
        async with open_database(Settings.load().log_url) as database:
            log = ConversationLog(database)
            state = await log.create(Caller("api"))
            assert state is not None
            card = turn(state.id, "Where is my card?", "On\nits way.")
            await log.append(card, None, 1)
            await log.append(replace(turn(state.id, "Bonjour", "Salut", "translation"), finish_reason="cancelled"), None, 1)
            await log.add_feedback(card.id, "down", None, None)

    asyncio.run(prepare())
    status, out, _ = frontdesk("logs", "search", "card", "way")
    assert status == 0
    assert "Where is my card?" in out
    assert "On its way." in out
    assert "Bonjour" not in out
    for arguments, expected in (
        (["--domain", "translation"], ["Bonjour"]),
        (["--vote", "down"], ["Where is my card?"]),
        (["--finish", "cancelled"], ["Bonjour"]),
        (["--since", "2020-01-01"], ["Bonjour", "Where is my card?"]),
        (["--until", "2020-01-01"], []),
        (["--limit", "1"], ["Bonjour"]),
    ):
        status, out, _ = frontdesk("logs", "search", "--json", *arguments)
        assert status == 0
        assert [json.loads(line)["question"] for line in out.splitlines()] == expected
