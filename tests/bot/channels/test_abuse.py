"""Abuse over real connections: a thousand streams, floods that are refused, resets, and text that would be code elsewhere."""

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psutil
import pytest

from bot.channels.http.server import raise_file_limit
from tests.bot.channels.held import begun, said, turns_of
from tests.bot.channels.test_bounds import Connection, connected
from tests.bot.conftest import ServingHere
from tests.bot.service import RunningService, running_service

NUM_STREAMS = 1000
JSON = "Content-Type: application/json\r\n"


@pytest.fixture
async def http(tiny_service: RunningService) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=tiny_service.url, timeout=120, trust_env=False) as client:
        yield client


def completion(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "banking", "messages": [{"role": "user", "content": text}], "max_tokens": 2, "temperature": 0, **more}


async def send(client: Connection, path: str, body: dict[str, Any]) -> None:
    content = json.dumps(body)
    await client.send(f"POST {path} HTTP/1.1\r\nHost: here\r\n{JSON}Content-Length: {len(content)}\r\n\r\n{content}")


async def status_of(client: Connection) -> int:
    return int((await asyncio.wait_for(client.reader.readline(), 120)).split()[1])


@asynccontextmanager
async def many_connections(http: httpx.AsyncClient, count: int) -> AsyncIterator[list[Connection]]:
    """As many clients, connected some at a time: the backlog of a listening socket is short."""
    raise_file_limit()
    async with AsyncExitStack() as stack:
        clients: list[Connection] = []
        while len(clients) < count:
            clients += await asyncio.gather(*(stack.enter_async_context(connected(http, 2**16)) for _ in range(50)))
        yield clients


async def check_all_is_well(http: httpx.AsyncClient) -> None:
    """Somebody is answered, in a new conversation and without one, and the process says that it lives."""
    assert (await http.get("/livez")).status_code == 200
    assert (await http.post("/v1/chat/completions", json=completion())).status_code == 200
    assert (await said(http, await begun(http), "Hello")).status_code == 200


async def test_a_thousand_open_streams_slow_nobody_and_leave_no_trace(http: httpx.AsyncClient) -> None:
    ids = [await begun(http) for _ in range(20)]
    async with many_connections(http, NUM_STREAMS) as clients:
        for number, client in enumerate(clients):
            await client.send(f"GET /v1/conversations/{ids[number % 20]}/events HTTP/1.1\r\nHost: here\r\n\r\n")
        assert {await status_of(client) for client in clients} == {200}
        await check_all_is_well(http)
        turn = (await said(http, ids[0], "Hello")).json()
        for client in clients[::20]:  # all of those who follow this one hear of it
            heard = await asyncio.wait_for(client.reader.readuntil(b"event: turn.completed"), 120)
            assert turn["message_id"].encode() in heard
    await check_all_is_well(http)


async def test_a_thousand_streamed_completions_are_answered_or_refused_within_the_bounds(http: httpx.AsyncClient) -> None:
    async with many_connections(http, NUM_STREAMS) as clients:
        await asyncio.gather(*(send(client, "/v1/chat/completions", completion(stream=True)) for client in clients))
        assert (await http.get("/livez")).status_code == 200
        statuses = await asyncio.gather(*(status_of(client) for client in clients))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 16  # a batch at least
    await check_all_is_well(http)


@pytest.mark.slow
async def test_memory_is_flat_while_everybody_is_refused(tiny_model_dir: Path, models_dir: Path, tmp_path: Path) -> None:
    """By the engine, the inbox and at the door; each refusal says when to try again, and is forgotten."""
    settings = {"FRONTDESK_BASE_MODEL": str(tiny_model_dir), "FRONTDESK_DTYPE": "float32"}
    bounds = {"FRONTDESK_MAX_BATCH": "1", "FRONTDESK_MAX_WAITING": "1", "FRONTDESK_INBOX_MESSAGES": "1"}
    with running_service(
        models_dir, tmp_path / "data", **settings, **bounds, FRONTDESK_MAX_OPEN_REQUESTS=str(_AT_A_TIME // 5)
    ) as service:
        process = psutil.Process(service.process.pid)
        async with httpx.AsyncClient(base_url=service.url, timeout=120, trust_env=False) as http:
            id_ = await begun(http)
            await flood(http, id_, 500)
            before = process.memory_info().rss
            refusals = await flood(http, id_, 2000)
            grown = process.memory_info().rss - before
            await check_all_is_well(http)
    assert refusals >= {"EngineBusyError", "InboxFullError", "TooManyRequestsError"}
    assert grown < 20 * 2**20, f"{grown} bytes more after 2000 requests"


_AT_A_TIME = 50


async def flood(http: httpx.AsyncClient, id_: str, count: int) -> set[str]:
    """Requests of some kilobytes each; few are answered, the others told what to do. Gives the names of the refusals."""
    refusals = []

    async def one(number: int) -> None:
        text = "x" * 4000
        if number % 2:
            response = await http.post("/v1/chat/completions", json=completion(text, stream=number % 4 == 1))
        else:
            response = await said(http, id_, text)
        if response.status_code != 200:
            assert response.status_code == 503, response.text
            assert int(response.headers["Retry-After"]) > 0
            refusals.append(response.json()["error"]["code"])

    for first in range(0, count, _AT_A_TIME):
        await asyncio.gather(*(one(number) for number in range(first, first + _AT_A_TIME)))
    assert len(refusals) > count / 2
    return set(refusals)


async def test_connections_reset_in_the_middle_free_their_slots(http: httpx.AsyncClient) -> None:
    """More of them than there are places in the batch and in the queue together."""
    for _ in range(6):
        async with many_connections(http, 50) as clients:
            for client in clients:
                await send(client, "/v1/chat/completions", completion(stream=True, max_tokens=1800))
            with suppress(TimeoutError):  # where the slots of the round before are not free yet, these are refused
                async with asyncio.timeout(3):
                    while "frontdesk_engine_active 16.0" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
            for client in clients:
                reset(client)
    async with asyncio.timeout(120):
        while (await http.post("/v1/chat/completions", json=completion())).status_code == 503:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await check_all_is_well(http)


def reset(client: Connection) -> None:
    """As a network does: no farewell, the other side's next write fails."""
    connection: socket.socket = client.writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


async def test_a_client_that_reads_a_byte_at_a_time_slows_nobody(http: httpx.AsyncClient) -> None:
    id_ = await begun(http)
    async with connected(http) as slow:
        await send(slow, f"/v1/conversations/{id_}/messages", {"text": "Hello", "stream": True, "max_tokens": 300})
        for _ in range(5):
            assert await slow.reader.readexactly(1)
            assert (await said(http, await begun(http), "Hello")).status_code == 200
        # Its own turn does not wait for it either.
        while not await turns_of(http, id_):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


# Text that would be code elsewhere.

INJECTIONS = [
    "' OR '1'='1",
    "'; DROP TABLE turns; --",
    '" OR ""="',
    "%' UNION SELECT hash FROM api_keys --",
    "NEAR(",
    "a*",
    "-b",
    "^c",
    "{x}:y",
]


async def test_sql_is_text_in_every_parameter(serving_here: ServingHere, database_url: str) -> None:
    async with serving_here(database_url=database_url) as http:
        id_ = await begun(http, user="ann")
        await said(http, id_, "my secret question")
        page = (await http.get("/openapi.json")).json()
        for injection in INJECTIONS:
            for path, operations in page["paths"].items():
                if "get" in operations and not path.endswith("/events"):
                    await check_injection(http, path, operations["get"], injection)
            given = await http.post("/v1/feedback", json={"turn_id": injection, "vote": "up", "reason": injection})
            assert given.status_code == 404
            theirs = await begun(http, user=injection, metadata={"note": injection}, domain=None)
            assert (await said(http, theirs, injection, key=injection)).json()["question"] == injection
            listed = (await http.get("/v1/conversations", params={"user": injection})).json()["data"]
            assert [one["id"] for one in listed] == [theirs]
        assert [turn["question"] for turn in await turns_of(http, id_)] == ["my secret question"]
        assert len((await http.get("/v1/turns", params={"text": "secret"})).json()["data"]) == 1  # negative control


async def check_injection(http: httpx.AsyncClient, path: str, operation: dict[str, Any], injection: str) -> None:
    """Every parameter in turn: refused or found nothing, never a failure and never what it was not to find."""
    parameters = operation.get("parameters", [])
    if any(one["in"] == "path" for one in parameters):
        path = re.sub(r"\{\w+\}", lambda _: re.sub("[^ -~]|[/?#%]", "_", injection), path)
    queries = [one["name"] for one in parameters if one["in"] == "query"]
    for name in queries or [None]:
        response = await http.get(path, params={name: injection} if name else {})
        assert response.status_code < 500, (path, name, response.text)
        if name is not None:
            assert "secret" not in response.text, (path, name)


FORGED = "x\n2026-01-01 00:00:00,000 CRITICAL bot: all is lost\r\x1b[31m\u2028\u202e\x85"


async def test_nobody_writes_a_line_of_the_log(tiny_model_dir: Path, models_dir: Path, tmp_path: Path) -> None:
    """Whatever is in ids, names and text: in the file that a service writes, each line is ours."""
    settings = {"FRONTDESK_BASE_MODEL": str(tiny_model_dir), "FRONTDESK_DTYPE": "float32"}
    with running_service(models_dir, tmp_path / "data", **settings) as service:
        num_before = len(service.log_file.read_text().splitlines())
        async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as http:
            id_ = await begun(http, user=FORGED, metadata={FORGED[:40]: FORGED})
            await said(http, id_, FORGED)
            await said(http, id_, FORGED + "1" * 3000)  # fails, and is told in the log
            await http.post("/v1/chat/completions", json=completion(FORGED, model=FORGED, user=FORGED))
            await http.post("/v1/chat/completions", json=completion(FORGED, metadata={"conversation_id": FORGED[:60]}))
            for path in ("/v1/conversations", "/v1/domains", "/v1/models", "/v1"):
                quoted = f"{path}/{quote(FORGED, safe='')}"
                await http.get(quoted)
                await http.post(quoted, content=b"x" * 5_000_000)
            await http.get("/v1/turns", params={"text": FORGED, "conversation_id": FORGED[:60]})
            await http.get(f"/v1/conversations/{id_}/turns", headers={"Authorization": "Bearer \x1b[31m"})
    lines = service.log_file.read_bytes().decode().split("\n")[num_before:]
    assert not [
        line for line in lines if line and not re.match(r"\d{4}-\d\d-\d\d .* (INFO|WARNING|ERROR) \S+: |frontdesk", line)
    ]
    assert not [line for line in lines if line.startswith("2026-01-01 00:00:00,000 CRITICAL")]
    assert any("all is lost" in line for line in lines)  # it was told, within a line
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", "\n".join(lines))
