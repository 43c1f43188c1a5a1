"""Faults by script: what should go wrong, with which call or event, and how many times.

The server asks the `FaultScript` at every call and delivery; tests and the terminal write it through `Faults`.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from bot.channels.slack.sandbox.credentials import Credentials
from bot.channels.slack.sandbox.messages import STREAM_LIFETIME_S, Message, StreamState
from bot.channels.slack.sandbox.world import Workspace

if TYPE_CHECKING:
    from bot.channels.slack.sandbox.deliveries import Delivery
    from bot.channels.slack.sandbox.socket_mode import SocketMode


class DeliveryFault(StrEnum):
    DUPLICATE = "duplicate"
    LOSE_ACKNOWLEDGEMENT = "lose_acknowledgement"
    DROP_CONNECTION = "drop_connection"


@dataclass(slots=True)
class CallFault:
    """How calls of a method (None: of any) go wrong; with a status other than 200 the answer has no JSON."""

    method: str | None
    times: int
    error: str | None = None
    status: int = 200
    retry_after_s: int | None = None
    delay_s: float = 0.0
    takes_effect: bool = False


@dataclass(slots=True)
class _DeliveryScript:
    fault: DeliveryFault
    event_type: str | None
    times: int


@dataclass(slots=True)
class _Reversal:
    count: int
    event_type: str | None
    held: "list[Delivery]" = field(default_factory=list)


class FaultScript:
    """What is still to go wrong. Each take uses one up."""

    def __init__(self) -> None:
        self.calls: list[CallFault] = []
        self.deliveries: list[_DeliveryScript] = []
        self.reversals: list[_Reversal] = []
        self.stream_lifetime_s = STREAM_LIFETIME_S

    def take_call(self, method: str) -> CallFault | None:
        for fault in self.calls:
            if fault.times and fault.method in (None, method):
                fault.times -= 1
                return fault
        return None

    def take_delivery(self, fault: DeliveryFault, event_type: str) -> bool:
        for script in self.deliveries:
            if script.times and script.fault is fault and script.event_type in (None, event_type):
                script.times -= 1
                return True
        return False

    def in_order(self, delivery: "Delivery") -> "list[Delivery]":
        """What is to be sent now: mostly this one, none while it is held, all that were held when they are enough."""
        for reversal in self.reversals:
            if reversal.event_type in (None, delivery.event_type):
                reversal.held.append(delivery)
                if len(reversal.held) < reversal.count:
                    return []
                self.reversals.remove(reversal)
                return reversal.held[::-1]
        return [delivery]


class Faults:
    """Makes things go wrong. `method` None is any method, `event_type` None any event or interaction."""

    def __init__(self, script: FaultScript, socket: "SocketMode", credentials: Credentials) -> None:
        self._script = script
        self._socket = socket
        self._credentials = credentials

    def rate_limit(self, method: str | None = None, *, times: int = 1, retry_after_s: int = 1) -> None:
        """The next calls answer 429, whatever the tiers would allow."""
        fault = CallFault(method, times, error="ratelimited", status=429, retry_after_s=retry_after_s)
        self._script.calls.append(fault)

    def refuse(self, method: str | None, error: str, *, times: int = 1) -> None:
        """The next calls answer `ok: false` with this error and do nothing."""
        self._script.calls.append(CallFault(method, times, error=error))

    def fail_before(self, method: str | None = None, *, times: int = 1, status: int = 503) -> None:
        """The next calls answer with this status and do nothing."""
        self._script.calls.append(CallFault(method, times, status=status))

    def fail_after(self, method: str | None = None, *, times: int = 1, status: int = 503) -> None:
        """The next calls have their effect, and answer with this status all the same."""
        self._script.calls.append(CallFault(method, times, status=status, takes_effect=True))

    def slow_down(self, method: str | None, seconds: float, *, times: int = 1) -> None:
        """The next calls take so long, on the sandbox's clock."""
        self._script.calls.append(CallFault(method, times, delay_s=seconds, takes_effect=True))

    def duplicate(self, event_type: str | None = None, *, times: int = 1) -> None:
        """The next events are sent twice, under one event id."""
        self._script.deliveries.append(_DeliveryScript(DeliveryFault.DUPLICATE, event_type, times))

    def lose_acknowledgement(self, event_type: str | None = None, *, times: int = 1) -> None:
        """The next acknowledgements do not count, so that Slack delivers again."""
        self._script.deliveries.append(_DeliveryScript(DeliveryFault.LOSE_ACKNOWLEDGEMENT, event_type, times))

    def drop_connection(self, event_type: str | None = None, *, times: int = 1) -> None:
        """The websocket breaks once the event is sent and before it is acknowledged."""
        self._script.deliveries.append(_DeliveryScript(DeliveryFault.DROP_CONNECTION, event_type, times))

    def reverse(self, count: int, event_type: str | None = None) -> None:
        """The next so many events are held until the last of them, then sent in reverse order."""
        self._script.reversals.append(_Reversal(count, event_type))

    def expire_streams_after(self, seconds: float) -> None:
        """Streams that start from now on live so long."""
        self._script.stream_lifetime_s = seconds

    def expire_stream(self, message: Message) -> None:
        """This stream has ended on Slack's side."""
        if message.stream is not None:
            message.stream.state = StreamState.EXPIRED

    def revoke_tokens(self, workspace: Workspace) -> None:
        """No token of this workspace counts any more, and no event tells."""
        for installation in workspace.installations.values():
            self._credentials.revoke(installation)

    async def disconnect(self, reason: str = "refresh_requested") -> None:
        """Slack tells every connection to go, in order to come again."""
        await self._socket.disconnect(reason)
