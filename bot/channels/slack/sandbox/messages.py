"""Messages with their edits, and streams with their pieces: what a channel shows and what it has shown."""

from dataclasses import dataclass, field
from enum import StrEnum

from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.world import Channel, Installation, Json, User

STREAM_LIFETIME_S = 300.0


class StreamState(StrEnum):
    STREAMING = "streaming"
    STOPPED = "stopped"
    STOPPED_BY_USER = "stopped_by_user"
    EXPIRED = "expired"


@dataclass(slots=True)
class Piece:
    """What one call added to a stream."""

    method: str
    at: float
    chunks: list[Json]

    @property
    def text(self) -> str:
        return "".join(chunk["text"] for chunk in self.chunks if chunk["type"] == "markdown_text")


@dataclass(slots=True)
class Stream:
    """`mode` is what its calls bring, `markdown_text` or `chunks`; the first call with either settles it."""

    started_at: float
    expires_at: float
    mode: str | None = None
    state: StreamState = StreamState.STREAMING
    pieces: list[Piece] = field(default_factory=list)
    session_status: str | None = None

    def state_at(self, now: float) -> StreamState:
        """A stream ends at its time, however much it is appended to."""
        if self.state is StreamState.STREAMING and now >= self.expires_at:
            self.state = StreamState.EXPIRED
        return self.state


@dataclass(slots=True)
class Edit:
    """What a message said until it was changed."""

    at: float
    text: str
    blocks: list[Json]


@dataclass(slots=True)
class Message:
    ts: str
    channel: Channel
    author: User
    text: str
    posted_at: float
    blocks: list[Json] = field(default_factory=list)
    thread_ts: str | None = None
    app: Installation | None = None
    metadata: Json | None = None
    client_msg_id: str | None = None
    username: str | None = None
    only_for: str | None = None
    edits: list[Edit] = field(default_factory=list)
    edited_ts: str | None = None
    is_deleted: bool = False
    reactions: dict[str, list[str]] = field(default_factory=dict)
    stream: Stream | None = None

    @property
    def thread(self) -> str:
        """The thread it is in, or would start."""
        return self.thread_ts or self.ts

    def change(self, text: str, blocks: list[Json], at: float) -> None:
        self.edits.append(Edit(at, self.text, self.blocks))
        self.text, self.blocks = text, blocks

    def record(self, now: float, replies: "list[Message] | None" = None) -> Json:
        """As the Web API and events show it."""
        shown: Json = {"type": "message", "user": self.author.id, "text": self.text, "ts": self.ts}
        shown["team"] = self.author.workspace.id
        if self.app is not None:
            shown |= {"bot_id": self.app.bot_id, "app_id": self.app.app.id, "bot_profile": _profile(self.app)}
        for name in ("client_msg_id", "metadata", "username"):
            if (value := getattr(self, name)) is not None:
                shown[name] = value
        if self.blocks:
            shown["blocks"] = self.blocks
        if self.edited_ts is not None:
            shown["edited"] = {"user": self.author.id, "ts": self.edited_ts}
        if self.reactions:
            shown["reactions"] = [
                {"name": name, "users": list(users), "count": len(users)} for name, users in self.reactions.items()
            ]
        if self.stream is not None:
            is_open = self.stream.state_at(now) is StreamState.STREAMING
            shown["streaming_state"] = "in_progress" if is_open else "completed"
        return shown | self._thread_record(replies or [])

    def _thread_record(self, replies: "list[Message]") -> Json:
        if self.thread_ts is not None and self.thread_ts != self.ts:
            return {"thread_ts": self.thread_ts}
        if not replies:
            return {}
        people = list(dict.fromkeys(reply.author.id for reply in replies))
        return {
            "thread_ts": self.ts,
            "reply_count": len(replies),
            "reply_users": people,
            "reply_users_count": len(people),
            "latest_reply": replies[-1].ts,
        }


def _profile(installation: Installation) -> Json:
    return {
        "id": installation.bot_id,
        "app_id": installation.app.id,
        "name": installation.app.name,
        "team_id": installation.workspace.id,
        "deleted": False,
    }


class Messages:
    """All messages of all channels, the deleted and the private ones too."""

    def __init__(self) -> None:
        self.all: list[Message] = []
        self._by_channel: dict[str, dict[str, Message]] = {}
        self._by_thread: dict[tuple[str, str], list[Message]] = {}

    def add(self, message: Message) -> None:
        self.all.append(message)
        self._by_channel.setdefault(message.channel.id, {})[message.ts] = message
        self._by_thread.setdefault((message.channel.id, message.thread), []).append(message)

    def find(self, channel: Channel, ts: str) -> Message:
        message = self._by_channel.get(channel.id, {}).get(ts)
        if message is None or not _is_shown(message):
            raise MethodError("message_not_found")
        return message

    def in_channel(self, channel: Channel) -> list[Message]:
        """What everybody in the channel sees, oldest first."""
        return [message for message in self._by_channel.get(channel.id, {}).values() if _is_shown(message)]

    def in_thread(self, channel: Channel, thread_ts: str) -> list[Message]:
        """The thread's first message, where it still is, and its replies."""
        return [message for message in self._by_thread.get((channel.id, thread_ts), []) if _is_shown(message)]

    def replies(self, message: Message) -> list[Message]:
        return [reply for reply in self.in_thread(message.channel, message.ts) if reply is not message]


def _is_shown(message: Message) -> bool:
    return not message.is_deleted and message.only_for is None
