"""What an agent shows beside its messages: status, suggested prompts, title, and the session's state."""

from dataclasses import dataclass, field

from bot.channels.slack.sandbox.clock import Clock
from bot.channels.slack.sandbox.world import Json

STATUS_LIFETIME_S = 120.0
MOST_PROMPTS = 4


@dataclass(frozen=True, slots=True)
class Status:
    channel_id: str
    thread_ts: str
    text: str
    loading_messages: list[str]
    at: float


@dataclass(frozen=True, slots=True)
class Prompts:
    channel_id: str
    thread_ts: str | None
    title: str
    prompts: list[Json]


@dataclass(slots=True)
class AgentSurface:
    """All that was ever set, in order; what shows now is asked for."""

    clock: Clock
    statuses: list[Status] = field(default_factory=list)
    prompts: list[Prompts] = field(default_factory=list)
    titles: dict[tuple[str, str], str] = field(default_factory=dict)
    sessions: dict[tuple[str, str], str] = field(default_factory=dict)

    def set_status(self, channel_id: str, thread_ts: str, text: str, loading_messages: list[str]) -> None:
        self.statuses.append(Status(channel_id, thread_ts, text, loading_messages, self.clock.now()))

    def status(self, channel_id: str, thread_ts: str) -> str:
        """What the person sees: the last one, until it is cleared, answered or two minutes old."""
        for status in reversed(self.statuses):
            if (status.channel_id, status.thread_ts) == (channel_id, thread_ts):
                return status.text if self.clock.now() < status.at + STATUS_LIFETIME_S else ""
        return ""

    def answered(self, channel_id: str, thread_ts: str) -> None:
        """A message of the app in the thread clears its status."""
        if self.status(channel_id, thread_ts):
            self.set_status(channel_id, thread_ts, "", [])

    def suggested(self, channel_id: str, thread_ts: str | None = None) -> list[Json]:
        for each in reversed(self.prompts):
            if (each.channel_id, each.thread_ts) == (channel_id, thread_ts):
                return each.prompts
        return []
