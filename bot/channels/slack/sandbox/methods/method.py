"""What a method is: its checks, and one call that has passed them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bot.channels.slack.sandbox.arguments import Arguments
from bot.channels.slack.sandbox.core import Core
from bot.channels.slack.sandbox.credentials import Token
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.world import App, Channel, Installation, Json


@dataclass(frozen=True, slots=True)
class Call:
    core: Core
    arguments: Arguments
    token: Token | None

    @property
    def bot(self) -> Installation:
        """Who calls a method that takes a bot's token."""
        assert self.token is not None
        assert self.token.installation is not None
        return self.token.installation

    def require_scope(self, *scopes: str) -> None:
        """Any of them will do."""
        if not self.bot.scopes.intersection(scopes):
            raise MethodError("missing_scope", needed=scopes[0], provided=",".join(sorted(self.bot.scopes)))

    def channel(self, name: str = "channel") -> Channel:
        """The channel of that argument, which the bot must be able to see."""
        channel = self.bot.workspace.channel(self.arguments.text(name))
        if channel.kind != "channel" and self.bot.bot_user.id not in channel.members:
            raise MethodError("channel_not_found")
        return channel

    def channel_to_post_in(self, name: str = "channel") -> Channel:
        """A person's id stands for the direct messages with that person."""
        workspace, wanted = self.bot.workspace, self.arguments.text(name)
        if wanted in workspace.users and wanted != self.bot.bot_user.id:
            return self.core.world.direct_channel(workspace, wanted, self.bot.bot_user.id)
        channel = self.channel(name)
        if channel.is_archived:
            raise MethodError("is_archived")
        if self.bot.bot_user.id not in channel.members:
            raise MethodError("not_in_channel")
        return channel

    def app_by_secret(self) -> App:
        """The app that names itself by client id and secret."""
        apps = [app for app in self.core.world.apps.values() if app.client_id == self.arguments.text("client_id")]
        if not apps:
            raise MethodError("invalid_client_id")
        if apps[0].client_secret != self.arguments.text("client_secret"):
            raise MethodError("bad_client_secret")
        return apps[0]


@dataclass(frozen=True, slots=True)
class Method:
    """`scopes`: any one of them is needed; none where it depends on the arguments. `token` None: no token is looked at."""

    answer: Callable[[Call], Json]
    required: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    token: Literal["bot", "app"] | None = "bot"
