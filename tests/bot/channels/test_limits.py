"""Limits over HTTP: headers on every answer, 429 as OpenAI's clients know it, and places held as long as an answer streams."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from bot.access.keys import ApiKeys, NewKey
from bot.conversations.database import open_database, sqlite_url
from tests.bot.channels.test_access import bearer
from tests.bot.conftest import ServingHere

HEADERS = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")


@pytest.fixture
async def keys(tmp_path: Path) -> AsyncIterator[ApiKeys]:
    async with open_database(sqlite_url(tmp_path / "data" / "conversations.db")) as database:
        yield ApiKeys(database)


def body(**more: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "Hello"}]
    return {"model": "banking", "messages": said, "max_tokens": 2, "temperature": 0, **more}


async def ask(http: httpx.AsyncClient, secret: str, **more: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json=body(**more), headers=bearer(secret))


async def test_rates_and_places(serving_here: ServingHere, keys: ApiKeys) -> None:
    """One service for all of it, as each takes seconds to start."""
    async with serving_here(api_keys="required", person_rate_per_minute=3, person_concurrent=1) as http:
        await check_rates(http, keys)
        await check_places(http, keys)


async def check_rates(http: httpx.AsyncClient, keys: ApiKeys) -> None:
    secret = await keys.add(NewKey("slow", "agent", rate_per_minute=5), "test")
    plain = await ask(http, secret)
    streamed = await ask(http, secret, stream=True)
    assert "[DONE]" in streamed.text
    unknown = await ask(http, secret, model="nowhere")
    assert [response.status_code for response in (plain, streamed, unknown)] == [200, 200, 404]
    told = [[int(response.headers[name]) for name in HEADERS[:2]] for response in (plain, streamed, unknown)]
    assert told == [[5, 4], [5, 3], [5, 2]]
    assert 50 <= int(unknown.headers["RateLimit-Reset"]) <= 60
    # What makes no turn costs nothing and tells nothing.
    models = await http.get("/v1/models", headers=bearer(secret))
    malformed = await ask(http, secret, max_tokens=0)
    assert not any(name in response.headers for response in (models, malformed) for name in HEADERS)
    person = await ask(http, secret, user="ann")
    assert [int(person.headers[name]) for name in HEADERS[:2]] == [5, 1]
    assert (await ask(http, secret)).status_code == 200
    for stream in (False, True):
        refused = await ask(http, secret, stream=stream)
        assert refused.status_code == 429
        assert 50 <= int(refused.headers["Retry-After"]) <= 60
        assert [int(refused.headers[name]) for name in HEADERS[:2]] == [5, 0]
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert "5 turns within a minute" in error["message"]
    async with AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key=secret, max_retries=0) as client:
        with pytest.raises(openai.RateLimitError, match="5 turns within a minute"):
            await client.chat.completions.create(**body())
    fast = await keys.add(NewKey("fast", "chat"), "test")
    statuses = [(await ask(http, fast, user=user)).status_code for user in ("ann", "ann", "ann", "ann", "bob")]
    assert statuses == [200, 200, 200, 429, 200]


async def check_places(http: httpx.AsyncClient, keys: ApiKeys) -> None:
    secret = await keys.add(NewKey("narrow", "chat", max_concurrent=2), "test")
    content = body(max_tokens=1500, stream=True)
    post = {"method": "POST", "url": "/v1/chat/completions", "headers": bearer(secret)}
    async with (
        http.stream(**post, json={**content, "user": "ann"}) as first,  # type: ignore[arg-type]
        http.stream(**post, json={**content, "user": "bob"}) as second,  # type: ignore[arg-type]
    ):
        lines = [first.aiter_lines(), second.aiter_lines()]
        for answer in lines:
            await anext(answer)
        for who, text in (("ann", "1 turns of this person"), ("eve", "2 turns of this API key")):
            refused = await ask(http, secret, user=who)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
            assert text in refused.json()["error"]["message"]
    # Both went away in the middle: their places come free.
    deadline = asyncio.get_running_loop().time() + 30
    while (await ask(http, secret, user="eve2")).status_code == 429:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)
    assert (await ask(http, secret, user="dan")).status_code == 200
    assert (await ask(http, secret, user="dan")).status_code == 200  # ended answers hold no place


async def test_without_keys_nobody_is_limited(serving_here: ServingHere) -> None:
    async with serving_here(rate_per_minute=1, max_concurrent=1) as http:
        answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=body()) for _ in range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert not any(name in answer.headers for answer in answers for name in HEADERS)
