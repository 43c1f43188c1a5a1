"""Who and what there is in Slack: workspaces, their people and channels, apps and where they are installed.

Knows no requests and sends nothing.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from bot.channels.slack.sandbox.clock import Changes, Clock
from bot.channels.slack.sandbox.errors import MethodError

Json = dict[str, Any]
ChannelKind = Literal["im", "channel", "group"]

# What the manifest asks for.
BOT_SCOPES = frozenset(
    {
        *("assistant:write", "chat:write", "chat:write.customize", "im:history", "im:read", "im:write", "app_mentions:read"),
        *("channels:history", "channels:read", "groups:history", "groups:read", "users:read", "reactions:read"),
        *("reactions:write", "commands"),
    }
)
BOT_EVENTS = frozenset(
    {
        *("app_home_opened", "app_mention", "app_uninstalled", "agent_session_stopped", "message.channels", "message.groups"),
        *("message.im", "reaction_added", "reaction_removed", "tokens_revoked"),
    }
)


@dataclass(slots=True, kw_only=True)
class App:
    """An app's settings page. Events go to `request_url`, or over Socket Mode while there is none."""

    name: str = "Frontdesk"
    id: str = "A0000000001"
    client_id: str = "1000000001.2000000001"
    client_secret: str = "client-secret"
    signing_secret: str = "signing-secret"
    verification_token: str = "verification-token"
    app_token: str = "xapp-1-A0000000001-1-sandbox"
    bot_scopes: frozenset[str] = BOT_SCOPES
    bot_events: frozenset[str] = BOT_EVENTS
    commands: frozenset[str] = frozenset({"/frontdesk"})
    shortcuts: frozenset[str] = frozenset({"ask_frontdesk"})
    redirect_urls: frozenset[str] = frozenset()
    request_url: str | None = None
    rotates_tokens: bool = False
    is_marketplace: bool = True


@dataclass(slots=True)
class User:
    id: str
    name: str
    workspace: "Workspace"
    app_id: str | None = None


@dataclass(slots=True)
class Channel:
    id: str
    name: str
    kind: ChannelKind
    workspace: "Workspace"
    members: list[str] = field(default_factory=list)
    is_archived: bool = False

    @property
    def scope(self) -> str:
        """The first half of the scopes that open this kind of conversation."""
        return {"im": "im", "channel": "channels", "group": "groups"}[self.kind]

    @property
    def subscription(self) -> str:
        return {"im": "message.im", "channel": "message.channels", "group": "message.groups"}[self.kind]


@dataclass(slots=True)
class Installation:
    """An app in a workspace, with the bot user it acts as there."""

    app: App
    workspace: "Workspace"
    bot_id: str
    bot_user: User
    installer_id: str
    scopes: frozenset[str]
    is_live: bool = True


@dataclass(slots=True)
class Workspace:
    id: str
    name: str
    users: dict[str, User] = field(default_factory=dict)
    channels: dict[str, Channel] = field(default_factory=dict)
    installations: dict[str, Installation] = field(default_factory=dict)

    @property
    def domain(self) -> str:
        return self.name.lower().replace(" ", "-")

    def channel(self, channel_id: str) -> Channel:
        if channel_id not in self.channels:
            raise MethodError("channel_not_found")
        return self.channels[channel_id]

    def user(self, user_id: str) -> User:
        if user_id not in self.users:
            raise MethodError("user_not_found")
        return self.users[user_id]

    def live_installations(self) -> Iterator[Installation]:
        return (installation for installation in list(self.installations.values()) if installation.is_live)


class World:
    """Everything above, and the ids and times by which it is known."""

    def __init__(self, clock: Clock, changes: Changes) -> None:
        self.clock = clock
        self.changes = changes
        self.apps: dict[str, App] = {}
        self.workspaces: dict[str, Workspace] = {}
        self._ids: Counter[str] = Counter()
        self._last_ts = 0

    def new_id(self, prefix: str) -> str:
        self._ids[prefix] += 1
        return f"{prefix}{self._ids[prefix]:010d}"

    def new_ts(self) -> str:
        """A message's time, which is also its name: no two are equal, and later ones are greater."""
        self._last_ts = max(self._last_ts + 1, int(self.clock.now() * 1_000_000))
        return f"{self._last_ts // 1_000_000}.{self._last_ts % 1_000_000:06d}"

    def add_app(self, app: App) -> App:
        self.apps[app.id] = app
        return app

    def add_workspace(self, name: str) -> Workspace:
        workspace = Workspace(self.new_id("T"), name)
        self.workspaces[workspace.id] = workspace
        return workspace

    def add_user(self, workspace: Workspace, name: str, app_id: str | None = None) -> User:
        user = User(self.new_id("U"), name, workspace, app_id)
        workspace.users[user.id] = user
        return user

    def add_channel(self, workspace: Workspace, name: str, kind: ChannelKind, members: list[str]) -> Channel:
        channel = Channel(self.new_id("D" if kind == "im" else "C"), name, kind, workspace, members)
        workspace.channels[channel.id] = channel
        return channel

    def direct_channel(self, workspace: Workspace, one: str, other: str) -> Channel:
        """The conversation of two, opened when there is none."""
        for channel in workspace.channels.values():
            if channel.kind == "im" and set(channel.members) == {one, other}:
                return channel
        return self.add_channel(workspace, "directmessage", "im", [one, other])

    def install(self, app: App, workspace: Workspace, installer_id: str, scopes: frozenset[str]) -> Installation:
        """Installing anew keeps the bot user and takes over the scopes."""
        known = workspace.installations.get(app.id)
        if known is None:
            bot_user = self.add_user(workspace, app.name.lower(), app.id)
            known = Installation(app, workspace, self.new_id("B"), bot_user, installer_id, scopes)
            workspace.installations[app.id] = known
        known.scopes, known.is_live, known.installer_id = scopes, True, installer_id
        return known
