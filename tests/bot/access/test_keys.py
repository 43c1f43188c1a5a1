"""API keys in a real database and by the command line."""

import asyncio
import sqlite3
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bot.access.keys import _MAX_CACHED, ApiKeys, NewKey, expiry
from bot.access.roles import Principal
from bot.conversations import audit
from bot.conversations.database import Database, open_database, sqlite_url
from bot.settings import Settings
from prompt_bank.errors import ApiKeyError
from tests.bot.conftest import Frontdesk


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with open_database(sqlite_url(tmp_path / "data" / "conversations.db")) as opened:
        yield opened


async def test_a_key_is_found_by_its_secret_which_is_kept_nowhere(database: Database, tmp_path: Path) -> None:
    keys = ApiKeys(database)
    new = NewKey("shop", "agent", frozenset({"travel", "banking"}), 60, 4, expiry(90))
    secret = await keys.add(new, "ann")
    assert secret.startswith("fd-")
    assert len(secret) >= 25
    found = await ApiKeys(database).find(secret)
    assert found is not None
    id_ = found.principal.id
    assert found.principal == Principal(id_, "shop", "agent", frozenset({"travel", "banking"}), 60, 4)
    assert (found.state, found.created_by) == ("live", "ann")
    assert found.expires_at is not None
    assert abs(found.expires_at - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=1)
    assert await keys.find(f"{secret}x") is None
    files = [path.read_bytes() for path in (tmp_path / "data").iterdir()]
    assert files
    assert not any(secret.encode() in content for content in files)


async def test_a_name_is_free_again_once_its_key_is_revoked(database: Database) -> None:
    keys = ApiKeys(database)
    first = await keys.add(NewKey("shop", "chat"), "ann")
    with pytest.raises(ApiKeyError, match=r"there is a key 'shop' already; .*frontdesk keys revoke shop"):
        await keys.add(NewKey("shop", "chat"), "ann")
    await keys.revoke("shop", "bob")
    second = await keys.add(NewKey("shop", "chat"), "ann")
    states = [getattr(await ApiKeys(database).find(secret), "state", None) for secret in (first, second)]
    assert states == ["revoked", "live"]
    with pytest.raises(ApiKeyError, match="0 live keys have the name or id 'nobody'"):
        await keys.revoke("nobody", "bob")


async def test_a_revoked_key_stops_when_the_cache_forgets_it(database: Database) -> None:
    cached, uncached = ApiKeys(database, cache_s=1000), ApiKeys(database, cache_s=0)
    secret = await cached.add(NewKey("shop", "chat"), "ann")
    for keys in (cached, uncached):
        assert (await keys.find(secret)).state == "live"  # type: ignore[union-attr]
    await uncached.revoke("shop", "bob")
    assert (await cached.find(secret)).state == "live"  # type: ignore[union-attr]
    assert (await uncached.find(secret)).state == "revoked"  # type: ignore[union-attr]


async def test_an_expired_key_stops_at_once_although_it_is_cached(database: Database) -> None:
    keys = ApiKeys(database, cache_s=1000)
    secret = await keys.add(NewKey("shop", "chat", expires_at=datetime.now(UTC) + timedelta(seconds=0.3)), "ann")
    found = await keys.find(secret)
    assert found is not None
    assert found.expires_at is not None
    while datetime.now(UTC) < found.expires_at:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert (await keys.find(secret)).state == "expired"  # type: ignore[union-attr]
    assert not await keys.has_live()


async def test_unknown_keys_fill_no_memory(database: Database) -> None:
    keys = ApiKeys(database, cache_s=1000)
    good = await keys.add(NewKey("shop", "chat"), "ann")
    keys._found = OrderedDict((str(number), (None, 0.0)) for number in range(_MAX_CACHED))
    await keys.find(good)
    for number in range(10):
        assert await keys.find(f"fd-{number}") is None
    assert len(keys._found) == _MAX_CACHED
    assert (await keys.find(good)) is not None


async def test_changes_of_keys_are_audited_without_their_secret(database: Database) -> None:
    keys = ApiKeys(database)
    secret = await keys.add(NewKey("shop", "chat", frozenset({"banking"})), "ann")
    key = await keys.revoke("shop", "bob")
    async with database.reading() as connection:
        revoked, added = await audit.read(connection)
    assert (added.actor, added.action, added.object) == ("ann", "add key", f"key:{key.principal.id}")
    assert (added.detail["name"], added.detail["domains"]) == ("shop", ["banking"])
    assert (revoked.actor, revoked.action, revoked.object) == ("bob", "revoke key", f"key:{key.principal.id}")
    assert abs(revoked.at - datetime.now(UTC)) < timedelta(minutes=1)
    assert secret not in str((added, revoked))


def test_commands(frontdesk: Frontdesk, tmp_path: Path) -> None:
    status, out, err = frontdesk(
        *("keys", "add", "shop", "--role", "chat", "--domain", "banking", "--domain", "travel"),
        *("--expires-days", "90", "--rate", "60", "--concurrent", "4"),
    )
    assert (status, out.count("\n")) == (0, 1)
    secret = out.strip()
    assert secret.startswith("fd-")
    assert "shown only now" in err
    status, out, _ = frontdesk("keys", "list")
    assert status == 0
    assert secret not in out
    with closing(sqlite3.connect(tmp_path / "data" / "conversations.db")) as database:
        (id_,) = database.execute("SELECT id FROM api_keys").fetchone()
        (row,) = database.execute("SELECT name, role, domains, rate_per_minute, max_concurrent FROM api_keys").fetchall()
    assert row == ("shop", "chat", '["banking", "travel"]', 60, 4)
    assert id_ in out  # whole, as it is what one types
    assert frontdesk("keys", "revoke", "shop") == (0, "the key shop is revoked\n", "")
    assert frontdesk("keys", "revoke", "shop")[2].startswith("error: 0 live keys have the name or id 'shop'")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("a\nb",), "printable"),
        (("x" * 65,), "1 to 64"),
        (("shop", "--domain", "No Domain"), "cannot be the name of a domain"),
        (("shop", "--role", "king"), "king"),
        (("shop", "--rate", "0"), "rate"),
    ],
)
def test_a_malformed_key_is_refused(frontdesk: Frontdesk, arguments: tuple[str, ...], problem: str) -> None:
    status, _, err = frontdesk("keys", "add", *arguments)
    assert status == 2
    assert problem in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("host", "mode", "required"),
    [
        ("127.0.0.1", "auto", False),
        ("127.8.9.1", "auto", False),
        ("::1", "auto", False),
        ("localhost", "auto", False),
        ("0.0.0.0", "auto", True),
        ("::", "auto", True),
        ("10.0.0.7", "auto", True),
        ("chat.example.com", "auto", True),
        ("", "auto", True),
        ("127.0.0.1", "required", True),
        ("0.0.0.0", "off", False),
    ],
)
def test_keys_are_required_as_soon_as_others_can_reach_the_service(host: str, mode: str, required: bool) -> None:
    assert Settings(host=host, api_keys=mode).requires_keys == required  # type: ignore[arg-type]
