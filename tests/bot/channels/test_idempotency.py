"""The Idempotency-Key header over real connections: one turn in the log, whatever happens in between."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
from redis.asyncio import Redis

from bot.access.keys import ApiKeys, NewKey
from bot.conversations.database import open_database, sqlite_url
from prompt_bank.valkey import _socket_path
from tests.bot.channels.held import bearer, begun, events_of, said, turns_of
from tests.bot.conftest import ServingHere

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


async def ask(http: httpx.AsyncClient, key: str | None, secret: str | None = None, **more: Any) -> httpx.Response:
    body = {"model": "banking", "messages": HELLO, "max_tokens": 4, "temperature": 0, **more}
    headers = bearer(secret) | ({"Idempotency-Key": key} if key else {})
    return await http.post("/v1/chat/completions", json=body, headers=headers)


def streamed(response: httpx.Response) -> tuple[str, str]:
    """Id and text of a streamed completion."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    (id_,) = {chunk["id"] for chunk in chunks}
    return id_, "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def num_turns(http: httpx.AsyncClient) -> int:
    return len((await http.get("/v1/turns", params={"limit": 100})).json()["data"])


async def test_one_key_over_a_service_a_restart_and_an_empty_redis(serving_here: ServingHere, tmp_path: Path) -> None:
    async with serving_here() as http:
        await check_completions(http)
        await check_failures(http)
        await check_at_the_same_time(http)
        await check_conversations_and_feedback(http)
        id_, turn = await check_messages(http)
        num_before = await num_turns(http)
    async with serving_here() as http:
        completion = (await ask(http, "whole")).json()
        assert completion["id"] == (await ask(http, "whole")).json()["id"]
        assert (await said(http, id_, "Hello", key="m")).json() == turn
        async with Redis(unix_socket_path=str(_socket_path(tmp_path / "data" / "valkey"))) as redis:
            await redis.flushall()
        # It is put into the inbox again, and found in the log.
        assert (await said(http, id_, "Hello", key="m")).json() == turn
        # And when the events are gone, though the inbox knows it.
        await forget_events(tmp_path)
        for how in ({}, {"stream": True}):
            again = await said(http, id_, "Hello", key=f"m{len(how) or ''}", **how)
            events = [event for _, event in events_of(again.text)] if how else [{"turn": again.json()}]
            assert events[-1]["turn"]["question"] == "Hello"
        assert await num_turns(http) == num_before


async def forget_events(tmp_path: Path) -> None:
    async with Redis(unix_socket_path=str(_socket_path(tmp_path / "data" / "valkey"))) as redis:
        async for name in redis.scan_iter("*events:*"):
            await redis.delete(name)


async def check_completions(http: httpx.AsyncClient) -> None:
    before = await num_turns(http)
    whole = [await ask(http, "whole") for _ in range(2)]
    assert whole[0].json() == whole[1].json()
    streams = [streamed(await ask(http, "stream", stream=True)) for _ in range(2)]
    assert streams[0] == streams[1]
    assert await num_turns(http) == before + 2
    # Negative control: without a key, and with another, each is a turn.
    assert streamed(await ask(http, None, stream=True))[0] != streams[0][0]
    assert (await ask(http, "another")).json()["id"] != whole[0].json()["id"]
    for key, more in (("whole", {"max_tokens": 5}), ("whole", {"stream": True}), ("stream", {})):
        refused = await ask(http, key, **more)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "IdempotencyMismatchError")
    for key in ("x" * 256, ""):
        assert (await http.post("/v1/conversations", json={}, headers={"Idempotency-Key": key})).status_code == 400


async def check_failures(http: httpx.AsyncClient) -> None:
    """A refusal before, at and after the beginning of an answer leaves the key free at once."""
    out_of_order = [{"role": "assistant", "content": "Hi"}]
    for number, (more, status) in enumerate(
        [
            ({"messages": out_of_order}, 400),
            ({"model": "nowhere"}, 404),
            ({"messages": [{**HELLO[0], "content": "1" * 3000}]}, 400),
        ]
    ):
        for stream in (False, True):
            key = f"failed {number} {stream}"
            assert (await ask(http, key, stream=stream, **more)).status_code == status
            assert (await ask(http, key)).status_code == 200
    # A client that goes away gets no answer, and may ask again.
    for stream in (False, True):
        asking = asyncio.create_task(ask(http, f"gone {stream}", stream=stream, max_tokens=1800))
        while "frontdesk_engine_active 1.0" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        async with asyncio.timeout(60):
            while (again := await ask(http, f"gone {stream}")).status_code == 422:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert again.status_code == 200


async def check_at_the_same_time(http: httpx.AsyncClient) -> None:
    before = await num_turns(http)
    first = asyncio.create_task(ask(http, "busy", max_tokens=300))
    while "frontdesk_engine_active 1.0" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for stream in (False, True):
        refused = await ask(http, "busy", max_tokens=300, stream=stream)
        assert refused.status_code == (422 if stream else 409)
    assert not first.done()
    assert (await first).status_code == 200
    assert (await ask(http, "busy", max_tokens=300)).json() == (await first).json()
    assert await num_turns(http) == before + 1


async def check_conversations_and_feedback(http: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "begin"}
    created = [await http.post("/v1/conversations", json={"user": "once"}, headers=headers) for _ in range(2)]
    assert [response.status_code for response in created] == [201, 201]
    assert created[0].json() == created[1].json()
    assert len((await http.get("/v1/conversations", params={"user": "once"})).json()["data"]) == 1
    assert (await http.post("/v1/conversations", json={"user": "twice"}, headers=headers)).status_code == 422
    turn_id = (await ask(http, None)).json()["frontdesk"]["turn_id"]
    headers = {"Idempotency-Key": "vote"}
    for vote, key, status in (("up", headers, 201), ("down", {}, 201), ("up", headers, 201), ("down", headers, 422)):
        given = await http.post("/v1/feedback", json={"turn_id": turn_id, "vote": vote}, headers=key)
        assert given.status_code == status
    (turn,) = [turn for turn in (await http.get("/v1/turns")).json()["data"] if turn["id"] == turn_id]
    assert turn["vote"] == "down"  # the repeated vote did not come after it
    unknown = {"turn_id": "unknown", "vote": "up"}
    for _ in range(2):
        given = await http.post("/v1/feedback", json=unknown, headers={"Idempotency-Key": "unknown"})
        assert given.status_code == 404


async def check_messages(http: httpx.AsyncClient) -> tuple[str, dict[str, Any]]:
    id_, other = await begun(http), await begun(http)
    first = (await said(http, id_, "Hello", key="m")).json()
    assert (await said(http, id_, "Hello", key="m")).json() == first
    assert (await said(http, id_, "Hello", key="m1", stream=True)).status_code == 200
    queued = [(await said(http, id_, "Hello", key="b", background=True)).json()["id"] for _ in range(2)]
    assert queued[0] == queued[1]
    # At the same time they hear the same turn, from its beginning.
    both = await asyncio.gather(*(said(http, id_, "both", key="s", stream=True, max_tokens=30) for _ in range(3)))
    ends = [events_of(response.text)[-1][1] for response in both]
    assert ends[0]["type"] == "turn.completed"
    assert ends.count(ends[0]) == 3
    for where, text in ((id_, "Hello!"), (other, "Hello")):
        refused = await said(http, where, text, key="m")
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "IdempotencyMismatchError")
    assert [turn["question"] for turn in await turns_of(http, id_)] == ["Hello"] * 3 + ["both"]
    assert await turns_of(http, other) == []
    return id_, first


async def test_a_key_of_one_caller_is_nothing_to_another(serving_here: ServingHere, tmp_path: Path) -> None:
    async with open_database(sqlite_url(tmp_path / "data" / "conversations.db")) as database:
        one, two = [await ApiKeys(database).add(NewKey(name, "chat"), "test") for name in ("one", "two")]
    async with serving_here(api_keys="required") as http:
        answers = [(await ask(http, "same", secret)).json() for secret in (one, two, one)]
        assert answers[0] == answers[2]
        assert answers[0]["id"] != answers[1]["id"]
        assert (await ask(http, "same", two, max_tokens=5)).status_code == 422
