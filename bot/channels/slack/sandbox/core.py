"""The parts of one sandbox, made in the order in which they need each other."""

from collections.abc import Mapping
from dataclasses import dataclass

from bot.channels.slack.sandbox.agents import AgentSurface
from bot.channels.slack.sandbox.clock import Changes, Clock
from bot.channels.slack.sandbox.credentials import Credentials
from bot.channels.slack.sandbox.deliveries import Deliveries, Transport
from bot.channels.slack.sandbox.events import Events
from bot.channels.slack.sandbox.faults import FaultScript
from bot.channels.slack.sandbox.http_delivery import HttpDelivery
from bot.channels.slack.sandbox.messages import Messages
from bot.channels.slack.sandbox.posting import Posting
from bot.channels.slack.sandbox.responses import Responses
from bot.channels.slack.sandbox.socket_mode import SocketMode
from bot.channels.slack.sandbox.tiers import Rate, Tiers
from bot.channels.slack.sandbox.views import Views
from bot.channels.slack.sandbox.world import App, Installation, Json, World


@dataclass(slots=True)
class ApiCall:
    """One call as it came and as it was answered; `answer` is None while it is under way, or when the answer had no JSON."""

    method: str
    arguments: Json
    at: float
    team_id: str = ""
    status: int = 0
    answer: Json | None = None

    @property
    def error(self) -> str | None:
        return None if self.answer is None else self.answer.get("error")


class Core:
    """What the methods, the people and the server share."""

    def __init__(self, clock: Clock, rates: Mapping[str, Rate]) -> None:
        self.clock = clock
        self.changes = Changes()
        self.world = World(clock, self.changes)
        self.messages = Messages()
        self.credentials = Credentials(clock)
        self.tiers = Tiers(clock, rates)
        self.script = FaultScript()
        self.socket = SocketMode(self.world, self.script)
        self.http = HttpDelivery(self.world)
        self.deliveries = Deliveries(self.world, self.script, self._transport_of)
        self.agents = AgentSurface(clock)
        self.events = Events(self.world, self.messages, self.deliveries)
        self.posting = Posting(self.world, self.messages, self.events, self.agents)
        self.responses = Responses(self.world, self.posting)
        self.views = Views(self.world)
        self.calls: list[ApiCall] = []

    def _transport_of(self, app: App) -> Transport:
        return self.http if app.request_url is not None else self.socket

    @property
    def base_url(self) -> str:
        """Where the server is reached; known once it listens."""
        return self.responses.base_url

    def uninstall(self, installation: Installation) -> None:
        """Slack tells the app in two events, of which either may come first."""
        self.credentials.revoke(installation)
        installation.is_live = False
        self.events.tokens_revoked(installation)
        self.events.uninstalled(installation)
