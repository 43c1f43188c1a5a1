"""Socket Mode: an app's websockets, the envelopes sent over them, and the acknowledgements that come back."""

import asyncio
import json
import secrets
from dataclasses import dataclass, field

from aiohttp import WSMsgType, web

from bot.channels.slack.sandbox.deliveries import ACKNOWLEDGE_WITHIN_S, Attempt, Delivery
from bot.channels.slack.sandbox.errors import DeliveryError
from bot.channels.slack.sandbox.faults import DeliveryFault, FaultScript
from bot.channels.slack.sandbox.world import App, Json, World

_MOST_CONNECTIONS = 10
_CONNECTION_LIFETIME_S = 18_000
# Between telling a connection to go and closing it.
_GRACE_S = 10.0
# For the client's half of the closing handshake.
_CLOSING_S = 1.0
_HOST = "applink-sandbox"


@dataclass(slots=True, eq=False)
class Connection:
    app: App
    websocket: web.WebSocketResponse
    request: web.Request
    waiting: dict[str, asyncio.Future[Json | None]] = field(default_factory=dict)
    envelopes: list[Json] = field(default_factory=list)
    is_leaving: bool = False

    async def send(self, envelope: Json) -> None:
        self.envelopes.append(envelope)
        await self.websocket.send_json(envelope)

    def break_off(self) -> None:
        """No closing handshake, as when a network fails."""
        if self.request.transport is not None:
            self.request.transport.abort()


class SocketMode:
    """A transport; each envelope goes to one of the app's connections, in turn."""

    timeout_reason = "timeout"

    def __init__(self, world: World, script: FaultScript) -> None:
        self._world = world
        self._script = script
        self._tickets: dict[str, App] = {}
        self._closers: set[asyncio.Task[None]] = set()
        self.connections: list[Connection] = []

    def new_ticket(self, app: App) -> str:
        """Opens one connection, once."""
        ticket = secrets.token_hex(16)
        self._tickets[ticket] = app
        return ticket

    async def accept(self, request: web.Request) -> web.StreamResponse:
        """One websocket, from hello to its end."""
        app = self._tickets.pop(request.query.get("ticket", ""), None)
        if app is None:
            return web.Response(status=404, text="no such ticket, or it is used")
        websocket = web.WebSocketResponse(timeout=_CLOSING_S)
        await websocket.prepare(request)
        connection = Connection(app, websocket, request)
        if len(self._of(app)) >= _MOST_CONNECTIONS:
            await connection.send(_disconnect("too_many_websockets"))
            await websocket.close()
            return websocket
        # Connected before it is told so, or an event between the two would find nobody.
        self.connections.append(connection)
        try:
            await connection.send(self._hello(app))
            self._world.changes.notify()
            async for message in websocket:
                if message.type is WSMsgType.TEXT:
                    _acknowledge(connection, json.loads(message.data))
        finally:
            self.connections.remove(connection)
            for waiting in connection.waiting.values():
                if not waiting.done():
                    waiting.set_exception(DeliveryError("connection_failed"))
            self._world.changes.notify()
        return websocket

    def _of(self, app: App) -> list[Connection]:
        return [connection for connection in self.connections if connection.app is app]

    def _hello(self, app: App) -> Json:
        return {
            "type": "hello",
            "num_connections": len(self._of(app)),
            "connection_info": {"app_id": app.id},
            "debug_info": {
                "host": _HOST,
                "build_number": 1,
                "approximate_connection_time": _CONNECTION_LIFETIME_S,
            },
        }

    def _next_connection(self, app: App) -> Connection | None:
        """The one that has had fewest envelopes among those that may have more."""
        able = [connection for connection in self._of(app) if not connection.is_leaving]
        return min(able, key=lambda connection: len(connection.envelopes), default=None)

    async def send(self, delivery: Delivery, attempt: Attempt) -> Json | None:
        try:
            return await self._world.clock.within(ACKNOWLEDGE_WITHIN_S, self._send(delivery, attempt))
        except TimeoutError:
            raise DeliveryError(self.timeout_reason) from None

    async def _send(self, delivery: Delivery, attempt: Attempt) -> Json | None:
        connection = await self._world.changes.until(lambda: self._next_connection(delivery.app), timeout_s=None)
        assert connection is not None
        waiting: asyncio.Future[Json | None] = asyncio.get_running_loop().create_future()
        connection.waiting[attempt.envelope_id] = waiting
        try:
            await connection.send(_envelope(delivery, attempt))
            if self._script.take_delivery(DeliveryFault.DROP_CONNECTION, delivery.event_type):
                connection.break_off()
                raise DeliveryError("connection_failed")
            return await waiting
        except ConnectionError:
            raise DeliveryError("connection_failed") from None
        finally:
            del connection.waiting[attempt.envelope_id]

    async def disconnect(self, reason: str) -> None:
        for connection in list(self.connections):
            connection.is_leaving = True
            await connection.send(_disconnect(reason))
            closer = asyncio.create_task(self._close_soon(connection))
            self._closers.add(closer)
            closer.add_done_callback(self._closers.discard)

    async def _close_soon(self, connection: Connection) -> None:
        await self._world.clock.sleep(_GRACE_S)
        await connection.websocket.close()

    async def close(self) -> None:
        closers = list(self._closers)
        for closer in closers:
            closer.cancel()
        await asyncio.gather(*closers, return_exceptions=True)
        for connection in list(self.connections):
            await connection.websocket.close()


def _acknowledge(connection: Connection, message: Json) -> None:
    waiting = connection.waiting.get(message.get("envelope_id", ""))
    # One that comes too late, or twice, changes nothing.
    if waiting is not None and not waiting.done():
        waiting.set_result(message.get("payload"))


def _envelope(delivery: Delivery, attempt: Attempt) -> Json:
    envelope: Json = {
        "type": delivery.kind,
        "envelope_id": attempt.envelope_id,
        "payload": delivery.payload,
        "accepts_response_payload": delivery.kind != "events_api",
    }
    if delivery.kind == "events_api":
        envelope |= {"retry_attempt": attempt.number, "retry_reason": attempt.retry_reason or ""}
    return envelope


def _disconnect(reason: str) -> Json:
    return {"type": "disconnect", "reason": reason, "debug_info": {"host": _HOST}}
