"""One client's connection: a request's head is bounded in size and time, and what is no HTTP is refused in our own shape.

uvicorn bounds neither; what comes after a head is bounded in `bounds`.
"""

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

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
        self._num_unused_bytes = 0  # of a head, of trailers or between chunks: nothing a route has asked for
        self._running: RequestResponseCycle | None = None  # `cycle` is the newest, which may have to wait for this one

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._let_idle()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if self._is_answering and self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._num_unused_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_unused_bytes > _MAX_HEAD_BYTES:
            self._refuse(HeadTooLargeError(f"the headers have more than {_MAX_HEAD_BYTES} bytes, which is the most taken"))
        elif self._head_timer is None and not self._is_answering and self.timeout_keep_alive_task is None:
            self._let_idle()  # some bytes came, but no request began

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._on_slow_head)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_unused_bytes = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        self._refuse(BadRequestError("this is not a request of HTTP/1.1; check the client, and whether it speaks TLS"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _let_idle(self) -> None:
        """As between two requests; browsers open connections before they need them."""
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _end_head(self) -> None:
        self._num_unused_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_slow_head(self) -> None:
        self._refuse(RequestTooSlowError(f"the headers were not sent within {self._head_timeout_s:g} s"))

    def _refuse(self, error: FrontdeskError) -> None:
        self._end_head()
        log.warning("a connection of %s is closed: %s: %s", self.client, type(error).__name__, error)
        if self._is_answering:  # what was written now would stand in the middle of that answer
            self.transport.abort()
            return
        response = error_of(error)
        headers = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
        head = STATUS_LINE[response.status_code] + headers + b"connection: close\r\n\r\n"
        self.transport.write(head + bytes(response.body))
        self.transport.close()
