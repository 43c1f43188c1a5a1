"""Bad input over real connections: what is too large, too deep, too slow or too much harms nobody else."""

import asyncio
import io
import itertools
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from bot.channels.http.bounds import Bounded, Bounds, check_nesting
from bot.log_format import LineFormatter
from prompt_bank.errors import BadRequestError, BodyTooDeepError
from tests.bot.channels.held import begun, said
from tests.bot.conftest import ServingHere
from tests.bot.service import RunningService

MAX_BODY_BYTES = 50_000
TIMEOUT_S = 3.0
HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"


def body(text: str = "Hello", **more: Any) -> dict[str, Any]:
    return {"model": "banking", "messages": [{"role": "user", "content": text}], "max_tokens": 2, "temperature": 0, **more}


class Connection:
    """A client that keeps to no rules."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, content: str | bytes) -> None:
        self.writer.write(content.encode() if isinstance(content, str) else content)
        await self.writer.drain()

    async def is_hung_up_on(self, piece: str) -> bool:
        """Whether the server does so before it got ten megabytes of these pieces."""
        try:
            for _ in range(10_000_000 // len(piece)):
                await self.send(piece)
                await asyncio.sleep(0.001)
        except ConnectionError:
            return True
        return False

    async def rest(self) -> bytes:
        """What came before the connection was lost."""
        with suppress(ConnectionError):
            return await self.reader.read()
        return b""

    async def answer(self) -> tuple[int, str, dict[str, Any]]:
        """Status, head and the error."""
        async with asyncio.timeout(20):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
            (num_bytes,) = re.findall(r"content-length: (\d+)", head)
            error: dict[str, Any] = json.loads(await self.reader.readexactly(int(num_bytes)))["error"]
        return int(head.split()[1]), head, error


@asynccontextmanager
async def connected(http: httpx.AsyncClient, limit: int = 2**10) -> AsyncIterator[Connection]:
    url = http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port, limit=limit)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


async def test_bad_input_over_real_connections(serving_here: ServingHere) -> None:
    """One service for all of it, as each takes seconds to start."""
    async with serving_here(max_body_bytes=MAX_BODY_BYTES, request_timeout_s=TIMEOUT_S, max_open_requests=4) as http:
        await check_what_is_no_http(http)
        await check_endless_headers(http)
        await check_slow_headers(http)
        await check_a_long_answer(http)
        await check_endless_trailers(http)
        await check_a_body_that_nobody_asked_for(http)
        await check_a_huge_content_length(http)
        await check_an_endless_body(http)
        await check_nested_brackets(http)
        await check_a_slow_sender(http)
        await check_too_many_requests(http)
        await check_a_slow_reader(http)
        await check_log_injection(http)
        assert (await http.post("/v1/chat/completions", json=body())).status_code == 200


async def check_what_is_no_http(http: httpx.AsyncClient) -> None:
    for content in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9\r\n\r\n", b"EHLO here\r\n"):
        async with connected(http) as client:
            await client.send(content)
            status, head, error = await client.answer()
            assert await client.reader.read() == b""
        assert (status, error["code"]) == (400, "BadRequestError")
        assert "connection: close" in head


async def check_endless_headers(http: httpx.AsyncClient) -> None:
    """Of many lines, and of a single one."""
    for start, more in (("", "X-More: 1\r\n" * 100), ("X-Long: ", "x" * 1000)):
        async with connected(http) as client:
            await client.send("GET /livez HTTP/1.1\r\nHost: here\r\n" + start)
            answering, num_sent = asyncio.ensure_future(client.answer()), 0
            with suppress(ConnectionError):  # hung up on, after the answer
                while not answering.done() and num_sent < 10_000_000:
                    await client.send(more)
                    num_sent += len(more)
                    await asyncio.sleep(0.001)
            status, head, error = await answering
        assert (status, error["code"]) == (431, "HeadTooLargeError")
        assert "connection: close" in head
    assert (await http.get("/livez", headers={"X-Long": "x" * 50_000})).status_code == 200


async def check_slow_headers(http: httpx.AsyncClient) -> None:
    """Of a first request and of a second one."""
    whole = "GET /livez HTTP/1.1\r\nHost: here\r\n\r\n"
    for before in ("", whole):
        async with connected(http) as client:
            await client.send(before)
            if before:
                await client.reader.readuntil(b"{")
                await client.reader.readuntil(b"}")
            started = time.monotonic()
            answering = asyncio.ensure_future(client.answer())
            for byte in itertools.cycle("GET /livez HTTP/1.1\r\nX: x"):
                with suppress(ConnectionError):
                    await client.send(byte)
                if (await asyncio.wait({answering}, timeout=TIMEOUT_S / 5))[0]:
                    break
                assert time.monotonic() - started < 20
            status, _, error = await answering
        assert (status, error["code"]) == (408, "RequestTooSlowError")
        assert time.monotonic() - started >= TIMEOUT_S * 0.9
    async with connected(http) as silent:
        await asyncio.sleep(TIMEOUT_S * 1.5)
        await silent.send(whole)  # one that was opened before it was needed
        assert (await silent.reader.readuntil(b"\r\n")).split()[1] == b"200"


async def check_a_long_answer(http: httpx.AsyncClient) -> None:
    """It takes longer than a request may; whatever else is sent meanwhile neither stands in it nor fills memory."""
    id_ = await begun(http)
    follow = f"GET /v1/conversations/{id_}/events HTTP/1.1\r\nHost: here\r\n"
    async with connected(http, limit=2**20) as client:
        await client.send(f"{follow}\r\n")
        await client.reader.readuntil(b": here")
        await asyncio.sleep(TIMEOUT_S * 1.2)
        assert (await said(http, id_, "Hello")).status_code == 200
        assert await client.reader.readuntil(b"turn.completed")
        await client.send(follow)  # the beginning of another
        assert await client.is_hung_up_on("X-More: 1\r\n" * 100)
        assert b"431" not in await client.rest()


async def check_endless_trailers(http: httpx.AsyncClient) -> None:
    async with connected(http) as client:
        await client.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n")
        assert await client.is_hung_up_on("X-More: 1\r\n" * 100)


async def check_a_body_that_nobody_asked_for(http: httpx.AsyncClient) -> None:
    """It comes after the answer, and is no request."""
    async with connected(http) as client:
        await client.send("POST /livez HTTP/1.1\r\nHost: here\r\nContent-Length: 100\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n") == b"HTTP/1.1 405 Method Not Allowed\r\n"
        await client.send("x" * 100)
        await asyncio.sleep(TIMEOUT_S * 1.2)
        await client.send("GET /livez HTTP/1.1\r\nHost: here\r\n\r\n")
        answered = (await client.reader.readuntil(b'"ok"')).decode()
    assert re.findall(r"HTTP/1\.1 (\d+)", answered) == ["200"]


async def check_a_huge_content_length(http: httpx.AsyncClient) -> None:
    for announced in (MAX_BODY_BYTES + 1, 10**15):
        async with connected(http) as client:
            await client.send(f"{HEAD}Content-Length: {announced}\r\n\r\n")
            status, head, error = await client.answer()
        assert (status, error["code"]) == (413, "BodyTooLargeError")
        assert f"more than {MAX_BODY_BYTES} bytes" in error["message"]
        assert "connection: close" in head
    just_fits = json.dumps(body("x" * 100)).ljust(MAX_BODY_BYTES).encode()
    headers = {"Content-Type": "application/json"}
    assert (await http.post("/v1/chat/completions", content=just_fits, headers=headers)).status_code == 200


async def check_an_endless_body(http: httpx.AsyncClient) -> None:
    async with connected(http) as client:
        await client.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
        num_sent = 0
        answering = asyncio.ensure_future(client.answer())
        try:
            while not answering.done() and num_sent < 100_000:
                await client.send(chunk)
                num_sent += 1
                await asyncio.sleep(0.001)
        except ConnectionError:
            pass  # hung up on, after the answer
        status, _, error = await answering
    assert (status, error["code"]) == (413, "BodyTooLargeError")


async def check_nested_brackets(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    depth = 20_000
    for content in (
        "[" * depth,
        "[" * depth + "]" * depth,
        '{"messages": ' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "}",
        '{"model": "\\"", "messages": ' + "[" * depth + "]" * depth + "}",
    ):
        refused = await http.post("/v1/chat/completions", content=content, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "BodyTooDeepError")
    # In a person's text they are text.
    assert (await http.post("/v1/chat/completions", json=body('[{"' * 100))).status_code == 200


async def check_a_slow_sender(http: httpx.AsyncClient) -> None:
    async with connected(http) as client:
        await client.send(f"{HEAD}Content-Length: 1000\r\n\r\n")
        started = time.monotonic()
        answering = asyncio.ensure_future(client.answer())
        while not answering.done():
            assert time.monotonic() - started < 20
            await client.send(b"{")
            await asyncio.wait({answering}, timeout=TIMEOUT_S / 5)
        status, _, error = await answering
    assert (status, error["code"]) == (408, "RequestTooSlowError")
    assert "was not sent within 3 s" in error["message"]
    assert time.monotonic() - started >= TIMEOUT_S


async def check_too_many_requests(http: httpx.AsyncClient) -> None:
    async with connected(http) as one, connected(http) as two, connected(http) as three, connected(http) as four:
        for client in (one, two, three, four):
            await client.send(f"{HEAD}Content-Length: 1000\r\n\r\n")
        while (refused := await http.get("/v1/models")).status_code == 200:
            pass
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "TooManyRequestsError")
        assert int(refused.headers["Retry-After"]) > 0
        for probe in ("/livez", "/readyz"):  # who is full is alive
            assert (await http.get(probe)).status_code == 200
        assert (await one.answer())[0] == 408  # they are given up, and make room
        deadline = time.monotonic() + 20
        while (await http.get("/v1/models")).status_code != 200:
            assert time.monotonic() < deadline


async def check_a_slow_reader(http: httpx.AsyncClient) -> None:
    content = json.dumps(body(max_tokens=1500, stream=True))
    async with connected(http) as slow:
        await slow.send(f"{HEAD}Content-Length: {len(content)}\r\n\r\n{content}")
        assert await slow.reader.readexactly(1) == b"H"
        for _ in range(20):
            started = time.monotonic()
            assert (await http.post("/v1/chat/completions", json=body("and I?"))).status_code == 200
            assert time.monotonic() - started < 20  # blocked, it would be minutes
            await slow.reader.readexactly(1)


async def check_log_injection(http: httpx.AsyncClient) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(LineFormatter())
    logging.getLogger().addHandler(handler)
    try:
        forged = "x%0A2026-01-01%20CRITICAL%20bot:%20all%20is%20lost%0D%1B[31m%E2%80%A8%E2%80%AE"
        head = f"POST /v1/models/{forged} HTTP/1.1\r\nHost: here\r\nContent-Length: 999999\r\n\r\n"
        async with connected(http) as client:
            await client.send(head)
            await client.answer()
    finally:
        logging.getLogger().removeHandler(handler)
    (line,) = written.getvalue().splitlines()
    assert "POST /v1/models/x\\n2026-01-01 CRITICAL bot: all is lost\\r\\x1b[31m\\u2028\\u202e: BodyTooLargeError" in line


async def test_many_unfinished_bodies_fill_no_memory() -> None:
    """A thousand clients that each send most of a body and stop."""
    answered, limit, ended = [], 1000, asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("no body was whole")

    async def stop_in_the_middle() -> None:
        messages: list[Message] = [{"type": "http.request", "body": b"x" * (limit - 1), "more_body": True}]

        async def receive() -> Message:
            if not messages:
                await ended.wait()
                return {"type": "http.disconnect"}
            return messages.pop()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.append(message["status"])

        await bounded({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)

    bounded = Bounded(app, Bounds(limit, request_timeout_s=30, max_open_requests=2000))
    clients = [asyncio.ensure_future(stop_in_the_middle()) for _ in range(1000)]
    while len(answered) < 1000 - 64:  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert bounded._num_held_bytes == 64 * (limit - 1)
    ended.set()
    await asyncio.gather(*clients)
    assert answered == [503] * (1000 - 64)
    assert bounded._num_held_bytes == 0


def test_a_traceback_keeps_its_lines_and_forges_none() -> None:
    record = logging.LogRecord("bot", logging.ERROR, "", 0, "failed: %s", ("a\nb",), None)
    try:
        raise ValueError("first\n2026-01-01 ERROR forged\u2028\ud800")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    first, *rest = LineFormatter().format(record).split("\n")
    assert first.endswith("ERROR bot: failed: a\\nb")
    assert rest
    assert all(line.startswith("  | ") for line in rest)
    assert rest[-1] == "  | 2026-01-01 ERROR forged\\u2028\\ud800"


def test_a_service_may_open_as_many_files_as_the_system_lets_it(tiny_service: RunningService) -> None:
    (line,) = [
        line for line in Path(f"/proc/{tiny_service.process.pid}/limits").read_text().splitlines() if "open files" in line
    ]
    soft, hard = line.split()[3:5]
    assert soft == hard


# How deep.

_TREES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.text('[]{}"\\a', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('[{"\\'), inner),
)


def nested(tree: Any, depth: int) -> Any:
    for _ in range(depth):
        tree = [tree]
    return tree


def depth_of(tree: Any) -> int:
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return 0 if children is None else 1 + max(map(depth_of, children), default=0)


@given(_TREES, st.integers(50, 70))
def test_json_is_refused_exactly_when_it_is_too_deep(tree: Any, depth: int) -> None:
    whole = nested(tree, depth)
    content = json.dumps(whole).encode()
    if depth_of(whole) <= 64:
        check_nesting(content)
    else:
        with pytest.raises(BodyTooDeepError, match=f"nested {depth_of(whole)} deep"):
            check_nesting(content)


def test_other_encodings_hide_no_depth() -> None:
    for encoding in ("utf-16", "utf-32"):
        with pytest.raises(BadRequestError, match="UTF-8"):
            check_nesting(("\u2200" + "[" * 100).encode(encoding))


@pytest.mark.parametrize("piece", [b"[]", b"[", b'"', b'\\"', b'"[', b"{}x", b'"\\\\"[]'])
def test_looking_for_depth_takes_no_long_time(piece: bytes) -> None:
    content = b"[" * 65 + piece * (4_000_000 // len(piece))
    started = time.monotonic()
    with pytest.raises(BodyTooDeepError):
        check_nesting(content)
    assert time.monotonic() - started < 1
