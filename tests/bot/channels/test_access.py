"""Who may do what over HTTP: every route against every role, keys limited to domains, and whose conversation is whose."""

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import httpx
import openai
import pytest
from fastapi import APIRouter, FastAPI
from openai import OpenAI

from bot.access.entrance import Entrance
from bot.access.keys import ApiKeys, NewKey
from bot.access.roles import Role
from bot.channels.client import connect
from bot.channels.http.access import PUBLIC, allow, guard
from bot.conversations.database import open_database, sqlite_url
from bot.settings import Settings
from prompt_bank.conversation import Message
from prompt_bank.errors import ServiceError
from tests.bot.conftest import ServingHere

ROLES: tuple[Role, ...] = get_args(Role)
BANKING = "I lost my card, what should I do?"
HEALTHCARE = "I have had a headache and a fever for three days"


@pytest.fixture
async def keys(tmp_path: Path) -> AsyncIterator[ApiKeys]:
    async with open_database(sqlite_url(tmp_path / "data" / "conversations.db")) as database:
        yield ApiKeys(database)


@pytest.fixture
async def http(serving_here: ServingHere) -> AsyncIterator[httpx.AsyncClient]:
    async with serving_here(api_keys="required") as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def ask(http: httpx.AsyncClient, secret: str, *texts: str, model: str = "auto", **more: Any) -> httpx.Response:
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(texts)]
    body = {"model": model, "messages": messages, "max_tokens": 4, "temperature": 0, **more}
    return await http.post("/v1/chat/completions", json=body, headers=bearer(secret))


async def test_every_route_against_every_role(http: httpx.AsyncClient, keys: ApiKeys) -> None:
    secrets = {role: await keys.add(NewKey(role, role), "test") for role in ROLES}
    long_ago = datetime.now(UTC) - timedelta(seconds=1)
    expired = await keys.add(NewKey("expired", "admin", expires_at=long_ago), "test")
    revoked = await keys.add(NewKey("revoked", "admin"), "test")
    await keys.revoke("revoked", "test")
    strangers = [{}, bearer("garbage"), bearer("fd-" + "x" * 10_000), bearer(expired), bearer(revoked)]
    strangers += [
        {"Authorization": "Bearer"},
        {"Authorization": f"Basic {secrets['admin']}"},
        {"Authorization": secrets["admin"]},
    ]
    page = (await http.get("/openapi.json")).json()
    assert page["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    operations = [(path, method, found) for path, methods in page["paths"].items() for method, found in methods.items()]
    assert len(operations) >= 20
    for path, method, operation in operations:
        roles = operation["x-roles"]
        where = f"{method} {path}"
        if roles == [PUBLIC]:
            assert operation["security"] == []
            assert (await http.request(method, path)).status_code not in (401, 403), where
            continue
        assert {"401", "403"} <= set(operation["responses"])
        assert operation["security"] == [{"ApiKey": []}]
        for headers in strangers:
            refused = await http.request(method, path, headers=headers)
            assert refused.status_code == 401, (where, headers)
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert refused.json()["error"]["code"] == "invalid_api_key"
        for role, secret in secrets.items():
            status = (await http.request(method, path, headers=bearer(secret))).status_code
            assert (status == 403) == (role not in roles), (where, role, status)
            assert status != 401


def test_the_rules_are_those_decided() -> None:
    """A rule that was loosened by accident shows here."""
    from bot.channels.http.api import create_app

    class Bare:
        entrance, limiter = Entrance(None), None

    paths = create_app(Bare()).openapi()["paths"]  # type: ignore[arg-type]
    rules = {f"{method} {path}": set(found["x-roles"]) for path, methods in paths.items() for method, found in methods.items()}
    assert rules == {
        "post /v1/chat/completions": {"chat", "agent", "admin"},
        "get /v1/models": {"chat", "agent", "trainer", "admin"},
        "get /v1/models/{model}": {"chat", "agent", "trainer", "admin"},
        "post /v1/feedback": {"chat", "agent", "admin"},
        "post /v1/conversations": {"chat", "agent", "admin"},
        "get /v1/conversations": {"chat", "agent", "admin"},
        "get /v1/conversations/{conversation_id}": {"chat", "agent", "admin"},
        "get /v1/conversations/{conversation_id}/turns": {"chat", "agent", "admin"},
        "post /v1/conversations/{conversation_id}/messages": {"chat", "agent", "admin"},
        "get /v1/conversations/{conversation_id}/events": {"chat", "agent", "admin"},
        "post /v1/conversations/{conversation_id}/cancel": {"chat", "agent", "admin"},
        "get /v1/domains": {"chat", "agent", "trainer", "admin"},
        "get /v1/domains/{domain}": {"chat", "agent", "trainer", "admin"},
        "get /v1/domains/{domain}/versions": {"trainer", "admin"},
        "get /v1/domains/{domain}/versions/{version}": {"trainer", "admin"},
        "post /v1/domains/{domain}/versions/{version}/promote": {"trainer", "admin"},
        "post /v1/domains/{domain}/rollback": {"trainer", "admin"},
        "get /v1/turns": {"agent", "trainer", "admin"},
        "get /v1/export": {"trainer", "admin"},
        "get /v1/audit": {"admin"},
        "get /livez": {"public"},
        "get /readyz": {"public"},
        "get /metrics": {"admin"},
    }


async def test_without_keys_no_foreign_page_uses_the_service(serving_here: ServingHere) -> None:
    """A browser sends such a request without asking first."""
    async with serving_here() as http:
        for origin, status in (
            ("http://localhost:3000", 409),
            (str(http.base_url), 409),
            ("https://evil.example", 403),
            ("null", 403),
            ("http://localhost.evil.example", 403),
        ):
            done = await http.post("/v1/domains/banking/rollback", headers={"Origin": origin})
            assert (done.status_code in (404, 409)) == (status == 409), (origin, done.text)
            assert (done.status_code == 403) == (status == 403)


@pytest.mark.parametrize("in_schema", [True, False])
@pytest.mark.parametrize("in_router", [True, False])
def test_an_application_with_a_route_without_a_rule_does_not_start(in_schema: bool, in_router: bool) -> None:
    app, router = FastAPI(redoc_url=None), APIRouter()
    target = router if in_router else app

    @target.get("/v1/ruled", dependencies=[allow("agent")])
    async def ruled() -> None: ...

    @target.get("/v1/bare", include_in_schema=in_schema)
    async def bare() -> None: ...

    app.include_router(router)
    with pytest.raises(ServiceError, match=r"/v1/bare.* says not who may use it; give it dependencies=\[allow"):
        guard(app)


async def test_the_official_client_sends_a_key_and_raises_its_own_errors(http: httpx.AsyncClient, keys: ApiKeys) -> None:
    chat, trainer = [await keys.add(NewKey(name, name), "test") for name in ("chat", "trainer")]  # type: ignore[arg-type]

    def client(secret: str) -> OpenAI:
        return OpenAI(base_url=f"{http.base_url}/v1", api_key=secret, max_retries=0)

    def use() -> None:
        messages: Any = [{"role": "user", "content": "Hello"}]
        with client(chat) as known:
            assert known.chat.completions.create(model="banking", messages=messages, max_tokens=2).usage
        with client("fd-unknown") as unknown, pytest.raises(openai.AuthenticationError, match="not known here"):
            unknown.models.list()
        with client(trainer) as other, pytest.raises(openai.PermissionDeniedError, match=r"role trainer .* may not use this"):
            other.chat.completions.create(model="banking", messages=messages)

    await asyncio.to_thread(use)


async def test_a_key_limited_to_domains_sees_and_uses_no_other(http: httpx.AsyncClient, keys: ApiKeys) -> None:
    limited = await keys.add(NewKey("bank", "chat", frozenset({"banking"})), "test")
    free = await keys.add(NewKey("free", "chat"), "test")
    models = {model["id"] for model in (await http.get("/v1/models", headers=bearer(limited))).json()["data"]}
    assert models == {"auto", "banking"}
    refused = [
        await ask(http, limited, HEALTHCARE, model="healthcare"),
        await ask(http, limited, HEALTHCARE, model="healthcare", stream=True),
        await ask(http, limited, HEALTHCARE, model="nowhere"),  # nor does it learn which there are
        await http.get("/v1/models/healthcare", headers=bearer(limited)),
    ]
    assert [response.status_code for response in refused] == [403] * 4
    error = refused[0].json()["error"]
    assert error["code"] == "permission_denied"
    assert "may not use the domain 'healthcare', only banking" in error["message"]
    assert (await ask(http, limited, BANKING)).json()["frontdesk"]["domain"] == "banking"
    assert (await ask(http, free, HEALTHCARE)).json()["frontdesk"]["domain"] == "healthcare"
    # A question for another domain is no reason to answer it from this one; and the person is asked about this one alone.
    clarified = (await ask(http, limited, HEALTHCARE)).json()
    assert clarified["frontdesk"]["routing"]["reason"] == "abstained"
    assert set(clarified["frontdesk"]["routing"]["scores"]) == {"banking"}
    text = clarified["choices"][0]["message"]["content"]
    assert "Banking" in text
    assert "Healthcare" not in text


async def test_the_default_domain_is_no_way_around_a_limit(serving_here: ServingHere, keys: ApiKeys) -> None:
    limited = await keys.add(NewKey("bank", "chat", frozenset({"banking"})), "test")
    free = await keys.add(NewKey("free", "chat"), "test")
    async with serving_here(api_keys="required", default_domain="healthcare") as http:
        question = "What is the capital of Mongolia?"
        assert (await ask(http, free, question)).json()["frontdesk"]["domain"] == "healthcare"
        assert (await ask(http, limited, question)).json()["frontdesk"]["domain"] is None


async def test_nobody_continues_the_conversation_of_another_key_or_person(http: httpx.AsyncClient, keys: ApiKeys) -> None:
    one, two = [await keys.add(NewKey(name, "chat"), "test") for name in ("one", "two")]

    async def conversation(secret: str, *texts: str, **more: Any) -> str:
        id_: str = (await ask(http, secret, *texts, **more)).json()["frontdesk"]["conversation_id"]
        return id_

    callers: list[tuple[str, dict[str, str]]] = [
        (one, {}), (two, {}), (one, {"user": "ann"}), (one, {"user": "bob"}), (two, {"user": "ann"}),
    ]  # fmt: skip
    named = {"metadata": {"conversation_id": "ticket-1"}}
    by_name = [await conversation(secret, "Hello", **who, **named) for secret, who in callers]
    assert len(set(by_name)) == len(callers)
    assert [await conversation(secret, "Hi", **who, **named) for secret, who in callers] == by_name
    # The newer field names the same person.
    assert await conversation(one, "Hi", safety_identifier="ann", user="ignored", **named) == by_name[2]
    answer = (await ask(http, one, BANKING, user="ann")).json()
    said = (BANKING, answer["choices"][0]["message"]["content"], "yes")
    mine = answer["frontdesk"]["conversation_id"]
    for secret, who in callers:
        continued = await conversation(secret, *said, **who)
        assert (continued == mine) == ((secret, who) == (one, {"user": "ann"}))
    long = await ask(http, one, "Hello", user="x" * 257)
    assert (long.status_code, long.json()["error"]["param"]) == (400, "user")


async def test_a_chat_key_votes_on_its_own_turns_only(http: httpx.AsyncClient, keys: ApiKeys) -> None:
    one, two = [await keys.add(NewKey(name, "chat"), "test") for name in ("one", "two")]
    agent = await keys.add(NewKey("agent", "agent"), "test")

    async def vote(secret: str, turn_id: str) -> int:
        body = {"turn_id": turn_id, "vote": "up"}
        return (await http.post("/v1/feedback", json=body, headers=bearer(secret))).status_code

    for who in ({}, {"user": "ann"}):
        turn_id = (await ask(http, one, "Hello", model="banking", **who)).json()["frontdesk"]["turn_id"]
        assert [await vote(secret, turn_id) for secret in (one, two, agent)] == [201, 404, 201]
    assert await vote(agent, "nobody") == 404


async def test_no_secret_reaches_the_log(http: httpx.AsyncClient, keys: ApiKeys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = await keys.add(NewKey("shop", "trainer"), "test")
    for sent in (secret, "fd-garbage-4711"):
        await ask(http, sent, "Hello")
    assert "AuthenticationError" in caplog.text  # told, but without it
    assert secret not in caplog.text
    assert "garbage-4711" not in caplog.text


async def test_the_terminal_client_sends_the_key_of_its_settings(http: httpx.AsyncClient, keys: ApiKeys) -> None:
    secret = await keys.add(NewKey("me", "chat"), "test")
    url, said = str(http.base_url), [Message(role="user", content="Hello")]
    async with connect(Settings(api_key=secret), url, lambda _: None) as client:  # type: ignore[arg-type]
        assert (await client.complete(said, "banking"))["usage"]
    async with connect(Settings(), url, lambda _: None) as client:
        with pytest.raises(ServiceError, match="no API key was given"):
            await client.complete(said, "banking")
    assert secret not in repr(Settings(api_key=secret))  # type: ignore[arg-type]


async def test_a_service_that_requires_keys_says_how_to_make_the_first(
    tiny_model_dir: Path, tmp_path: Path, keys: ApiKeys
) -> None:
    from bot.app import open_service

    settings = Settings(base_model=str(tiny_model_dir), dtype="float32", data_dir=tmp_path / "data", host="0.0.0.0")
    said: list[str] = []
    async with open_service(settings, said.append):
        assert any("frontdesk keys add" in line for line in said)
    await keys.add(NewKey("first", "admin"), "test")
    said.clear()
    async with open_service(settings, said.append):
        assert not any("frontdesk keys add" in line for line in said)


async def test_listening_beyond_this_machine_without_keys_is_warned_of(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from bot.app import open_service

    given = {"base_model": str(tiny_model_dir), "dtype": "float32", "data_dir": tmp_path / "data"}
    async with open_service(Settings(**given, host="0.0.0.0", api_keys="off")):  # type: ignore[arg-type]
        assert "listening on 0.0.0.0 without API keys" in caplog.text
