"""Bounds on what a client may send and hold, in front of everything: nothing is parsed before it is known to be harmless.

A pure ASGI application around another. It reads a request's body whole, within a size and a time, looks how deep its JSON is
nested, and hands it on; requests beyond a number are refused at once. Knows nothing of routes and keys.
"""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bot.channels.http.errors import error_of
from prompt_bank.errors import (
    BadRequestError,
    BodyTooDeepError,
    BodyTooLargeError,
    EngineStoppedError,
    FrontdeskError,
    RequestTooSlowError,
    TooManyRequestsError,
)

log = logging.getLogger(__name__)

_MAX_DEPTH = 64
# So many of the largest bodies are held at a time, of all requests: most have a thousandth of that.
_MAX_FULL_BODIES = 64
_LINGER_S = 2.0
# Whether the process lives does not depend on how much it has to do; refused, a supervisor would end it for being busy.
_ALWAYS_ANSWERED = ("/livez", "/readyz")

_QUOTE = ord('"')
_NO_MARKS = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1


@dataclass(frozen=True, slots=True)
class Bounds:
    max_body_bytes: int
    request_timeout_s: float
    max_open_requests: int


class Bounded:
    """Used from one event loop."""

    def __init__(self, app: ASGIApp, bounds: Bounds) -> None:
        self._app = app
        self._bounds = bounds
        self._num_open = 0
        self._num_held_bytes = 0  # of the bodies of all open requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _ALWAYS_ANSWERED:
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._bounds.max_open_requests:
            text = f"{self._num_open} requests are open, which is the most there may be; try again later"
            await _refuse(TooManyRequestsError(text), scope, receive, send)
            return
        self._num_open += 1
        is_begun = False

        async def watched_send(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._answer(scope, receive, watched_send)
        except asyncio.CancelledError:
            # By a server that stops and waits no longer. An answer that has begun ends in the middle, which its client sees.
            if not is_begun:
                await error_of(EngineStoppedError("this process is stopping"))(scope, receive, send)
        finally:
            self._num_open -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        pieces: list[bytes] = []
        try:
            try:
                is_whole = await self._read(Headers(scope=scope), receive, pieces)
                body = b"".join(pieces)
                check_nesting(body)
            except FrontdeskError as error:
                self._release(pieces)
                await _refuse(error, scope, receive, send)
                return
            if is_whole:
                await self._app(scope, _replayed(body, receive), send)
        finally:
            self._release(pieces)

    def _release(self, pieces: list[bytes]) -> None:
        self._num_held_bytes -= sum(len(piece) for piece in pieces)
        pieces.clear()

    async def _read(self, headers: Headers, receive: Receive, pieces: list[bytes]) -> bool:
        """Appends the body to `pieces`; false when the client went away.

        Raises BodyTooLargeError, RequestTooSlowError or TooManyRequestsError.
        """
        limit = self._bounds.max_body_bytes
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > limit:
            raise BodyTooLargeError(f"the body is announced to have more than {limit} bytes, which is the most taken")
        num_bytes = 0
        try:
            async with asyncio.timeout(self._bounds.request_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    pieces.append(message.get("body", b""))
                    num_bytes += len(pieces[-1])
                    self._num_held_bytes += len(pieces[-1])
                    if num_bytes > limit:
                        raise BodyTooLargeError(f"the body has more than {limit} bytes, which is the most taken; send less")
                    if self._num_held_bytes > _MAX_FULL_BODIES * limit:
                        raise TooManyRequestsError(
                            f"the bodies of all requests have {self._num_held_bytes} bytes; try again later"
                        )
                    if not message.get("more_body", False):
                        return True
        except TimeoutError:
            seconds = self._bounds.request_timeout_s
            raise RequestTooSlowError(f"the body was not sent within {seconds:g} s, {num_bytes} bytes of it were") from None


def check_nesting(body: bytes) -> None:
    """Raises BodyTooDeepError for what would exhaust a recursive parser, or BadRequestError.

    A few passes over the bytes, none of them a loop here: it runs on the event loop, for whoever sends something.
    """
    if b"\0" in body:
        # In UTF-16 or UTF-32, which parsers guess and which this cannot read.
        raise BadRequestError("the body holds a zero byte; send JSON in UTF-8")
    if body.count(b"[") + body.count(b"{") <= _MAX_DEPTH:
        return
    # Without escaped backslashes and quotes, every quote that is left begins or ends a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(plain.translate(None, _NO_MARKS), dtype=np.uint8)
    is_text = np.logical_xor.accumulate(marks == _QUOTE)
    depth = int(np.cumsum(np.where(is_text, 0, _STEPS[marks]), dtype=np.int32).max(initial=0))
    if depth > _MAX_DEPTH:
        raise BodyTooDeepError(f"the body is nested {depth} deep, at most {_MAX_DEPTH} is taken; send it flatter")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`body` as one message, and then what the client does next."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(error: FrontdeskError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers, and then lets the client finish for a moment: hung up on while it sends, it would lose the answer."""
    log.warning("%s %s: %s: %s", scope["method"], scope["path"], type(error).__name__, error)

    async def send_all_but_the_end(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    response = error_of(error)
    response.headers["Connection"] = "close"
    await response(scope, receive, send_all_but_the_end)
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_S):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
