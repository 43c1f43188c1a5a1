"""A lean HTTP client for load. What it costs itself is a column of the figures, and the server with nothing behind it a row.

Connections stay open and carry one request at a time. A request is bytes made beforehand; of an answer it looks at the status,
at where it ends, and for the marks by which its first token and its whole end are known.
"""

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_S = 60.0
_REFUSED_S = 0.01


@dataclass(frozen=True, slots=True)
class Call:
    """A request, the mark that comes with an answer's first token (none for a whole answer), and the one of its end."""

    request: bytes
    first_mark: bytes | None
    last_mark: bytes

    @classmethod
    def of(cls, path: str, body: dict[str, Any], first_mark: bytes | None, last_mark: bytes) -> "Call":
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        return cls(f"{head}\r\n\r\n".encode() + content, first_mark, last_mark)


@dataclass(slots=True)
class Outcome:
    """Seconds from the request to the first token and to the end."""

    status: int
    first_s: float
    total_s: float
    is_whole: bool
    retry_after: bool = False


class Connection(asyncio.Protocol):
    """Used from one event loop; one call at a time."""

    def __init__(self) -> None:
        self._received = b""
        self._first_at: float | None = None
        self._call: Call | None = None
        self._done: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._begun = asyncio.Event()
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._finish()

    def data_received(self, data: bytes) -> None:
        self._received += data
        call = self._call
        assert call is not None
        if self._first_at is None and call.first_mark is not None and call.first_mark in data:
            self._first_at = time.perf_counter()
            self._begun.set()
        if self._is_complete():
            self._finish()

    def _is_complete(self) -> bool:
        head, separator, content = self._received.partition(b"\r\n\r\n")
        if not separator:
            return False
        lines = head.lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        return content.endswith(b"0\r\n\r\n") if length is None else len(content) >= length

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def ask(self, call: Call) -> Outcome:
        assert self._transport is not None
        self._received, self._first_at, self._call = b"", None, call
        self._done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self._transport.write(call.request)
        async with asyncio.timeout(TIMEOUT_S):
            await self._done
        ended = time.perf_counter()
        status = int(self._received[9:12] or 0)
        return Outcome(
            status,
            (self._first_at or ended) - started,
            ended - started,
            status == 200 and call.last_mark in self._received,
            b"\r\nretry-after:" in self._received.lower(),
        )

    async def follow(self, call: Call) -> None:
        """Returns once the first mark is there; the answer goes on."""
        assert self._transport is not None
        self._received, self._first_at, self._call = b"", None, call
        self._transport.write(call.request)
        async with asyncio.timeout(TIMEOUT_S):
            await self._begun.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


@dataclass(slots=True)
class Run:
    """What came of a load; `asked_s` is from the first request to the last answer."""

    outcomes: list[Outcome] = field(default_factory=list)
    num_failed: int = 0
    elapsed_s: float = 0.0
    client_cpu_s: float = 0.0

    @property
    def num_whole(self) -> int:
        return len(self.outcomes) - self.num_failed


async def load(port: int, calls: Sequence[Call], *, seconds: float, think_s: float, most: int) -> Run:
    """One connection for each call, which asks again and again: at once, or after thinking for some time around `think_s`.

    For some seconds or `most` requests, whichever comes first; answers under way are waited for.
    """
    run, draw = Run(), random.Random(0)
    connections = await connected(port, len(calls))
    started, cpu = time.perf_counter(), time.process_time()

    async def keep_asking(index: int, call: Call) -> None:
        await asyncio.sleep(draw.uniform(0, think_s))  # not all at once
        while time.perf_counter() - started < seconds and len(run.outcomes) < most:
            if not connections[index].is_open:  # the server lets idle ones go
                connections[index] = await connect(port)
            outcome = await connections[index].ask(call)
            run.outcomes.append(outcome)
            run.num_failed += not outcome.is_whole
            if outcome.retry_after:
                await asyncio.sleep(_REFUSED_S)  # a hundredth of what it was asked to wait
            if think_s:
                await asyncio.sleep(draw.uniform(0.5, 1.5) * think_s)

    try:
        async with asyncio.TaskGroup() as group:
            for index, call in enumerate(calls):
                group.create_task(keep_asking(index, call))
    finally:
        for connection in connections:
            connection.close()
    run.elapsed_s, run.client_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    return run


async def connected(port: int, count: int) -> list[Connection]:
    connections = []
    for _ in range(count):
        with suppress(OSError):
            connections.append(await connect(port))
    assert len(connections) == count, f"{len(connections)} of {count} connections were made"
    return connections


class _Plain(asyncio.Protocol):
    """Sends pieces as the service would, with nothing behind it."""

    def __init__(self, num_tokens: int, pace_s: float) -> None:
        self._num_tokens = num_tokens
        self._pace_s = pace_s
        self._due = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._due = asyncio.get_running_loop().time()
        self._say(0)

    def _say(self, number: int) -> None:
        assert self._transport is not None
        if number == 1:
            self._transport.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        if number > 0:
            self._write(b"data: " + b"x" * 200)
        if number < self._num_tokens:
            self._due += self._pace_s
            asyncio.get_running_loop().call_at(self._due, self._say, number + 1)
            return
        self._write(b"[DONE]")
        self._transport.write(b"0\r\n\r\n")

    def _write(self, text: bytes) -> None:
        assert self._transport is not None
        self._transport.write(b"%x\r\n%b\r\n" % (len(text), text))


async def serve_plain(num_tokens: int, pace_s: float) -> None:
    """A server with nothing behind it, for what client and loopback cost alone; prints its port."""
    server = await asyncio.get_running_loop().create_server(lambda: _Plain(num_tokens, pace_s), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve_plain(int(sys.argv[1]), float(sys.argv[2])))
