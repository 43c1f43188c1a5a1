"""Events and interactions on their way to an app: acknowledged within three seconds, or sent again.

Which way is the transport's matter. Interactions are sent once; their answers matter, and nobody waits for a late one.
"""

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Protocol

from bot.channels.slack.sandbox.errors import DeliveryError
from bot.channels.slack.sandbox.faults import DeliveryFault, FaultScript
from bot.channels.slack.sandbox.world import App, Json, World

ACKNOWLEDGE_WITHIN_S = 3.0
# Before the first attempt and before each further one.
_PAUSES_S = (0.0, 0.0, 60.0, 300.0)

DeliveryKind = Literal["events_api", "interactive", "slash_commands"]


class DeliveryState(StrEnum):
    HELD = "held"
    UNDER_WAY = "under_way"
    WAITING = "waiting"
    ACKNOWLEDGED = "acknowledged"
    GIVEN_UP = "given_up"


@dataclass(slots=True)
class Attempt:
    """`number` 0 is the first; `retry_reason` says why there is another, `failure` why this one did not count."""

    number: int
    at: float
    envelope_id: str
    retry_reason: str | None
    status: int | None = None
    failure: str | None = None


@dataclass(slots=True)
class Delivery:
    """`next_at` is when it is sent again, while it waits for that."""

    app: App
    kind: DeliveryKind
    payload: Json
    state: DeliveryState = DeliveryState.HELD
    attempts: list[Attempt] = field(default_factory=list)
    answer: Json | None = None
    next_at: float | None = None
    finished: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def event_type(self) -> str:
        """An event's or an interaction's type; commands are all of one."""
        if self.kind == "slash_commands":
            return self.kind
        return str((self.payload["event"] if self.kind == "events_api" else self.payload)["type"])

    @property
    def event_id(self) -> str | None:
        return self.payload.get("event_id")

    def is_under_way_at(self, now: float) -> bool:
        """An acknowledgement is waited for, or it is time to send it again."""
        is_due = self.state is DeliveryState.WAITING and self.next_at is not None and self.next_at <= now
        return is_due or self.state is DeliveryState.UNDER_WAY

    @property
    def is_acknowledged(self) -> bool:
        return self.state is DeliveryState.ACKNOWLEDGED


class Transport(Protocol):
    """How an app is reached."""

    timeout_reason: str

    async def send(self, delivery: Delivery, attempt: Attempt) -> Json | None:
        """What the app answered, if anything. Raises DeliveryError when it did not acknowledge."""


class Deliveries:
    """Every delivery with its attempts, in the order they came about. Owns the tasks that send them."""

    def __init__(self, world: World, script: FaultScript, transport_of: Callable[[App], Transport]) -> None:
        self._world = world
        self._script = script
        self._transport_of = transport_of
        self._under_way: dict[asyncio.Task[None], Delivery] = {}
        self.all: list[Delivery] = []

    def send(self, app: App, kind: DeliveryKind, payload: Json) -> Delivery:
        """Does not wait for the acknowledgement."""
        delivery = self._add(app, kind, payload)
        for due in self._script.in_order(delivery):
            self._start(due)
            if self._script.take_delivery(DeliveryFault.DUPLICATE, due.event_type):
                self._start(self._add(due.app, due.kind, due.payload))
        return delivery

    def _add(self, app: App, kind: DeliveryKind, payload: Json) -> Delivery:
        delivery = Delivery(app, kind, payload)
        self.all.append(delivery)
        return delivery

    def _start(self, delivery: Delivery) -> None:
        delivery.state = DeliveryState.UNDER_WAY
        task = asyncio.create_task(self._deliver(delivery))
        self._under_way[task] = delivery
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        """However it ended, who waits for it waits no longer. A task that failed is kept: closing raises its error."""
        delivery = self._under_way[task]
        if task.cancelled() or task.exception() is None:
            del self._under_way[task]
        if not delivery.is_acknowledged:
            self._move(delivery, DeliveryState.GIVEN_UP)
        delivery.finished.set()

    async def _deliver(self, delivery: Delivery) -> None:
        reason: str | None = None
        for number, pause_s in enumerate(_PAUSES_S if delivery.kind == "events_api" else _PAUSES_S[:1]):
            if pause_s:
                delivery.next_at = self._world.clock.now() + pause_s
                self._move(delivery, DeliveryState.WAITING)
                await self._world.clock.sleep(pause_s)
                self._move(delivery, DeliveryState.UNDER_WAY)
            attempt = Attempt(number, self._world.clock.now(), str(uuid.uuid4()), reason)
            delivery.attempts.append(attempt)
            self._world.changes.notify()
            try:
                delivery.answer = await self._attempt(delivery, attempt)
            except DeliveryError as error:
                reason = attempt.failure = error.reason
                attempt.status = error.status
                if not error.may_retry:
                    break
            else:
                self._move(delivery, DeliveryState.ACKNOWLEDGED)
                return

    async def _attempt(self, delivery: Delivery, attempt: Attempt) -> Json | None:
        transport = self._transport_of(delivery.app)
        answer = await transport.send(delivery, attempt)
        if self._script.take_delivery(DeliveryFault.LOSE_ACKNOWLEDGEMENT, delivery.event_type):
            raise DeliveryError(transport.timeout_reason)
        return answer

    def _move(self, delivery: Delivery, state: DeliveryState) -> None:
        delivery.state = state
        self._world.changes.notify()

    async def settled(self) -> None:
        """Nothing is waiting for an acknowledgement; what waits to be sent again is left to the clock."""
        now = self._world.clock.now
        await self._world.changes.until(lambda: not any(each.is_under_way_at(now()) for each in self._under_way.values()))

    async def close(self) -> None:
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
