"""Events as the Events API words them, sent to every installed app that is subscribed and may see them."""

import re

from bot.channels.slack.sandbox.deliveries import Deliveries
from bot.channels.slack.sandbox.messages import Message, Messages
from bot.channels.slack.sandbox.views import View
from bot.channels.slack.sandbox.world import Channel, Installation, Json, User, World

_MENTION = re.compile(r"<@(U\w+)>")


class Events:
    def __init__(self, world: World, messages: Messages, deliveries: Deliveries) -> None:
        self._world = world
        self._messages = messages
        self._deliveries = deliveries

    def message_posted(self, message: Message) -> None:
        """`message`, and `app_mention` as well to an app that is mentioned in a channel."""
        event = self._record(message) | {"channel": message.channel.id, "event_ts": message.ts}
        if message.thread_ts is not None:
            event["parent_user_id"] = self._parent_user_id(message)
        for installation in self._members(message.channel):
            self._announce_message(installation, event | {"channel_type": message.channel.kind}, message.channel)
            if message.channel.kind != "im" and installation.bot_user.id in _MENTION.findall(message.text):
                self._announce(installation, event | {"type": "app_mention"})

    def message_changed(self, message: Message, previous: Json) -> None:
        changed = {"message": self._record(message), "previous_message": previous}
        self._announce_change(message.channel, {"subtype": "message_changed", **changed})

    def message_deleted(self, message: Message) -> None:
        deleted = {"previous_message": self._record(message), "deleted_ts": message.ts}
        self._announce_change(message.channel, {"subtype": "message_deleted", **deleted})

    def reaction(self, kind: str, message: Message, user_id: str, name: str) -> None:
        """`reaction_added` or `reaction_removed`."""
        item = {"type": "message", "channel": message.channel.id, "ts": message.ts}
        event = {"type": kind, "user": user_id, "reaction": name, "item": item, "item_user": message.author.id}
        for installation in self._members(message.channel):
            self._announce(installation, event | {"event_ts": self._world.new_ts()})

    def home_opened(self, user: User, installation: Installation, channel: Channel, tab: str, home: View | None) -> None:
        event: Json = {"type": "app_home_opened", "user": user.id, "channel": channel.id, "tab": tab}
        if tab == "home" and home is not None:
            event["view"] = home.record()
        self._announce(installation, event | {"event_ts": self._world.new_ts()})

    def session_stopped(
        self, installation: Installation, user: User, channel: Channel, thread_ts: str, streams: list[str]
    ) -> None:
        event = {"channel": channel.id, "thread_ts": thread_ts, "streaming_message_ts": streams, "user": user.id}
        self._announce(installation, {"type": "agent_session_stopped", **event, "event_ts": self._world.new_ts()})

    def tokens_revoked(self, installation: Installation) -> None:
        tokens = {"oauth": [], "bot": [installation.bot_user.id]}
        self._announce(installation, {"type": "tokens_revoked", "tokens": tokens, "event_ts": self._world.new_ts()})

    def uninstalled(self, installation: Installation) -> None:
        self._announce(installation, {"type": "app_uninstalled", "event_ts": self._world.new_ts()})

    def _record(self, message: Message) -> Json:
        return message.record(self._world.clock.now(), self._messages.replies(message))

    def _parent_user_id(self, message: Message) -> str | None:
        parents = [first for first in self._messages.in_thread(message.channel, message.thread) if first.ts == message.thread]
        return parents[0].author.id if parents else None

    def _members(self, channel: Channel) -> list[Installation]:
        installations = channel.workspace.live_installations()
        return [installation for installation in installations if installation.bot_user.id in channel.members]

    def _announce_change(self, channel: Channel, change: Json) -> None:
        ts = self._world.new_ts()
        event = {
            "type": "message",
            "hidden": True,
            "channel": channel.id,
            "channel_type": channel.kind,
            "ts": ts,
            "event_ts": ts,
        }
        for installation in self._members(channel):
            self._announce_message(installation, event | change, channel)

    def _announce_message(self, installation: Installation, event: Json, channel: Channel) -> None:
        if channel.subscription in installation.app.bot_events:
            self._send(installation, event)

    def _announce(self, installation: Installation, event: Json) -> None:
        if event["type"] in installation.app.bot_events:
            self._send(installation, event)

    def _send(self, installation: Installation, event: Json) -> None:
        app, workspace = installation.app, installation.workspace
        authorization = {
            "enterprise_id": None,
            "team_id": workspace.id,
            "user_id": installation.bot_user.id,
            "is_bot": True,
            "is_enterprise_install": False,
        }
        payload = {
            "token": app.verification_token,
            "team_id": workspace.id,
            "context_team_id": workspace.id,
            "context_enterprise_id": None,
            "api_app_id": app.id,
            "event": event,
            "type": "event_callback",
            "event_id": self._world.new_id("Ev"),
            "event_time": int(self._world.clock.now()),
            "authorizations": [authorization] if installation.is_live else [],
            "is_ext_shared_channel": False,
            "event_context": self._world.new_id("4-"),
        }
        self._deliveries.send(app, "events_api", payload)


def rich_text(text: str, block_id: str) -> list[Json]:
    """What Slack's own client sends beside a person's text."""
    elements: list[Json] = []
    # Of a split by one group every second part is what the group caught: the ids.
    for number, part in enumerate(_MENTION.split(text)):
        if number % 2:
            elements.append({"type": "user", "user_id": part})
        elif part:
            elements.append({"type": "text", "text": part})
    section = {"type": "rich_text_section", "elements": elements}
    return [{"type": "rich_text", "block_id": block_id, "elements": [section]}]
