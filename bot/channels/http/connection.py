"""One client's connection: a request's head is bounded in size and time, and what is no HTTP is refused in our own shape.

uvicorn bounds neither; what comes after a head is bounded in `bounds`.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from bot.channels.http.errors import error_of
from prompt_bank.errors import BadRequestError, FrontdeskError, HeadTooLargeError, RequestTooSlowError

log = logging.getLogger(__name__)

_MAX_HEAD_BYTES = 64 * 1024


class HttpConnection(HttpToolsProtocol):
    """A protocol of asyncio's, made by uvicorn for each connection, with how long a request's head may take (seconds)."""

    def __init__(self, head_timeout_s: float, **given: Any) -> None:
        super().__init__(**given)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # As one that is idle between two requests: browsers open some before they need them.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing() or not (self.cycle is None or self.cycle.response_complete):
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > _MAX_HEAD_BYTES:
            self._refuse(HeadTooLargeError(f"the headers have more than {_MAX_HEAD_BYTES} bytes, which is the most taken"))
        elif self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._forget_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequestError("this is not a request of HTTP/1.1; check the client, and whether it speaks TLS"))

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._on_slow_head)

    def _forget_head(self) -> None:
        self._num_head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_slow_head(self) -> None:
        self._refuse(RequestTooSlowError(f"the headers were not sent within {self._head_timeout_s:g} s"))

    def _refuse(self, error: FrontdeskError) -> None:
        self._forget_head()
        log.warning("a connection is closed: %s: %s", type(error).__name__, error)
        response = error_of(error)
        headers = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
        self.transport.write(
            b"%b%bconnection: close\r\n\r\n%b" % (STATUS_LINE[response.status_code], headers, bytes(response.body))
        )
        self.transport.close()
