"""Conversations that the server holds, over real connections."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.bot.conftest import ServingHere


@pytest.fixture
async def http(serving_here: ServingHere) -> AsyncIterator[httpx.AsyncClient]:
    async with serving_here() as client:
        yield client


async def begun(http: httpx.AsyncClient, **given: Any) -> str:
    created = await http.post("/v1/conversations", json={"domain": "banking", **given})
    assert created.status_code == 201, created.text
    id_: str = created.json()["id"]
    return id_


async def said(http: httpx.AsyncClient, conversation_id: str, text: str, **more: Any) -> httpx.Response:
    body = {"text": text, "max_tokens": 4, "temperature": 0, **more}
    return await http.post(f"/v1/conversations/{conversation_id}/messages", json=body)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Id and data of each event."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            events.append((fields.get("id", ""), json.loads(fields["data"])))
    return events


async def test_the_server_holds_the_history(http: httpx.AsyncClient) -> None:
    id_ = await begun(http, metadata={"ticket": "4711"}, user="anna")
    first = await said(http, id_, "I lost my card")
    assert first.status_code == 200, first.text
    turn = first.json()
    assert (turn["question"], turn["domain"], turn["finish_reason"], turn["conversation_id"]) == (
        "I lost my card",
        "banking",
        "length",
        id_,
    )
    second = (await said(http, id_, "and now?")).json()
    assert second["usage"]["prompt_tokens"] > turn["usage"]["prompt_tokens"]
    listed = (await http.get(f"/v1/conversations/{id_}/turns")).json()
    assert [one["question"] for one in listed["data"]] == ["I lost my card", "and now?"]
    got = (await http.get(f"/v1/conversations/{id_}")).json()
    assert (got["metadata"], got["user"], got["domain"]) == ({"ticket": "4711"}, "anna", "banking")


async def test_a_streamed_turn_tells_its_events_to_the_end(http: httpx.AsyncClient) -> None:
    id_ = await begun(http)
    streamed = await said(http, id_, "I lost my card", stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [event for _, event in events_of(streamed.text)]
    assert events[0]["type"] == "turn.started"
    assert events[-1]["type"] == "turn.completed"
    assert "".join(event["text"] for event in events if event["type"] == "turn.delta") == events[-1]["turn"]["answer"]


async def test_a_queued_message_is_answered_and_followed_from_where_it_was_queued(http: httpx.AsyncClient) -> None:
    id_ = await begun(http)
    queued = await said(http, id_, "I lost my card", background=True)
    assert queued.status_code == 202
    after = queued.json()["after"]
    events = []
    async with asyncio.timeout(60), http.stream("GET", f"/v1/conversations/{id_}/events", params={"after": after}) as stream:
        text = ""
        async for piece in stream.aiter_text():
            text += piece
            events = [event for _, event in events_of(text)]
            if events and events[-1]["type"] == "turn.completed":
                break
    assert {event["message_id"] for event in events} == {queued.json()["id"]}


async def test_a_long_answer_can_be_cancelled(http: httpx.AsyncClient) -> None:
    id_ = await begun(http)
    asking = asyncio.create_task(said(http, id_, "I lost my card", max_tokens=1500))
    while not (await http.post(f"/v1/conversations/{id_}/cancel")).json()["message_id"]:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    turn = (await asking).json()
    assert turn["finish_reason"] == "cancelled"
