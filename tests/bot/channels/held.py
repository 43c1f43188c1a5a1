"""What tests of held conversations do over and over."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx

Events = list[tuple[str, dict[str, Any]]]


def bearer(secret: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"} if secret else {}


async def begun(http: httpx.AsyncClient, secret: str | None = None, **given: Any) -> str:
    """The id of a new conversation, in the domain banking unless another is given."""
    created = await http.post("/v1/conversations", json={"domain": "banking", **given}, headers=bearer(secret))
    assert created.status_code == 201, created.text
    id_: str = created.json()["id"]
    return id_


async def said(
    http: httpx.AsyncClient, conversation_id: str, text: str, secret: str | None = None, key: str | None = None, **more: Any
) -> httpx.Response:
    body = {"text": text, "max_tokens": 4, "temperature": 0, **more}
    headers = bearer(secret) | ({"Idempotency-Key": key} if key else {})
    return await http.post(f"/v1/conversations/{conversation_id}/messages", json=body, headers=headers)


async def turns_of(http: httpx.AsyncClient, conversation_id: str, **query: Any) -> list[dict[str, Any]]:
    listed = await http.get(f"/v1/conversations/{conversation_id}/turns", params={"limit": 100, **query})
    data: list[dict[str, Any]] = listed.json()["data"]
    return data


def events_of(text: str) -> Events:
    """Id and data of each event."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            events.append((fields.get("id", ""), json.loads(fields["data"])))
    return events


async def followed(
    http: httpx.AsyncClient, conversation_id: str, after: str | None = None, headers: dict[str, str] | None = None
) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
    """The events of a conversation as they come."""
    query = {"after": after} if after is not None else {}
    path = f"/v1/conversations/{conversation_id}/events"
    async with http.stream("GET", path, params=query, headers=headers) as stream:
        assert stream.status_code == 200
        block = ""
        async for line in stream.aiter_lines():
            block += line + "\n"
            if not line:
                for event in events_of(block):
                    yield event
                block = ""


async def until(
    http: httpx.AsyncClient,
    conversation_id: str,
    kind: str,
    after: str | None = None,
    *,
    count: int = 1,
    headers: dict[str, str] | None = None,
) -> Events:
    """The events of a conversation to the first of this type, or to as many of it."""
    events: Events = []
    async with asyncio.timeout(120), aclosing(followed(http, conversation_id, after, headers)) as following:
        async for event in following:
            events.append(event)
            count -= event[1]["type"] == kind
            if not count:
                break
    return events
