"""conversations.*, users.* and reactions.*: reading channels, threads and people, and reacting to messages."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import TypeVar

from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.messages import Message
from bot.channels.slack.sandbox.methods.method import Call, Method
from bot.channels.slack.sandbox.world import Channel, Json

T = TypeVar("T")

_MOST_MESSAGES = 999
# For apps that are distributed outside the Marketplace.
_MOST_OUTSIDE_MARKETPLACE = 15
_REACTION = re.compile(r"[\w+'-]+")


def _page(call: Call, items: Sequence[T], default: int, most: int) -> tuple[list[T], str]:
    """The items after the cursor, as many as are asked for, and the next cursor or nothing."""
    limit = call.arguments.number("limit", default)
    if limit < 1:
        raise MethodError("invalid_limit")
    start = _decode_cursor(call.arguments.text("cursor"))
    end = start + min(limit, most)
    return list(items[start:end]), _encode_cursor(end) if end < len(items) else ""


def _encode_cursor(position: int) -> str:
    return base64.b64encode(f"next:{position}".encode()).decode()


def _decode_cursor(cursor: str) -> int:
    if not cursor:
        return 0
    try:
        return int(base64.b64decode(cursor, validate=True).decode().removeprefix("next:"))
    except (binascii.Error, ValueError):
        raise MethodError("invalid_cursor") from None


def _most_messages(call: Call) -> int:
    return _MOST_MESSAGES if call.bot.app.is_marketplace else _MOST_OUTSIDE_MARKETPLACE


def _within(call: Call, messages: list[Message]) -> list[Message]:
    """Those between `oldest` and `latest`, which themselves count only when that is asked for."""
    oldest, latest = call.arguments.ts("oldest") or "", call.arguments.ts("latest")
    ends = (oldest, latest) if call.arguments.flag("inclusive") else ()
    return [
        message
        for message in messages
        if message.ts in ends or (message.ts > oldest and (latest is None or message.ts < latest))
    ]


def _messages_answer(call: Call, messages: list[Message], default: int) -> Json:
    most = _most_messages(call)
    page, cursor = _page(call, messages, min(default, most), most)
    now, shown = call.core.clock.now(), call.core.messages
    records = [message.record(now, shown.replies(message)) for message in page]
    if not call.arguments.flag("include_all_metadata"):
        records = [{name: value for name, value in record.items() if name != "metadata"} for record in records]
    answer: Json = {
        "messages": records,
        "has_more": bool(cursor),
    }
    return answer | ({"response_metadata": {"next_cursor": cursor}} if cursor else {})


def _history(call: Call) -> Json:
    """Newest first, without the replies in threads."""
    channel = _readable(call, "history")
    messages = [message for message in call.core.messages.in_channel(channel) if message.thread == message.ts]
    return _messages_answer(call, _within(call, messages)[::-1], 100)


def _replies(call: Call) -> Json:
    """Oldest first, from the message that the thread hangs on."""
    channel, ts = _readable(call, "history"), call.arguments.text("ts")
    messages = call.core.messages.in_thread(channel, ts)
    if not messages:
        raise MethodError("thread_not_found")
    return _messages_answer(call, _within(call, messages), 1000)


def _readable(call: Call, what: str) -> Channel:
    channel = call.channel()
    call.require_scope(f"{channel.scope}:{what}")
    if what == "history" and call.bot.bot_user.id not in channel.members:
        raise MethodError("not_in_channel")
    return channel


def _info(call: Call) -> Json:
    channel = _readable(call, "read")
    shown = _channel_record(channel, call.bot.bot_user.id)
    if call.arguments.flag("include_num_members"):
        shown["num_members"] = len(channel.members)
    return {"channel": shown}


def _channel_record(channel: Channel, reader_id: str) -> Json:
    shown = {
        "id": channel.id,
        "is_im": channel.kind == "im",
        "is_mpim": False,
        "is_channel": channel.kind == "channel",
        "is_group": channel.kind == "group",
        "is_private": channel.kind != "channel",
        "is_archived": channel.is_archived,
        "context_team_id": channel.workspace.id,
    }
    if channel.kind == "im":
        return shown | {"user": next(member for member in channel.members if member != reader_id)}
    return shown | {"name": channel.name, "is_member": reader_id in channel.members}


def _members(call: Call) -> Json:
    page, cursor = _page(call, _readable(call, "read").members, 100, 1000)
    return {"members": page, "response_metadata": {"next_cursor": cursor}}


def _open(call: Call) -> Json:
    """The direct messages with one person; groups of several are not in this sandbox."""
    call.require_scope("im:write")
    workspace, bot_user = call.bot.workspace, call.bot.bot_user
    if call.arguments.has("channel"):
        channel = call.channel()
    else:
        call.arguments.require(("users",))
        user_ids = call.arguments.text("users").split(",")
        if len(user_ids) > 1:
            raise MethodError("too_many_users")
        channel = call.core.world.direct_channel(workspace, workspace.user(user_ids[0]).id, bot_user.id)
    wants_all = call.arguments.flag("return_im")
    return {"channel": _channel_record(channel, bot_user.id) if wants_all else {"id": channel.id}}


def _user_info(call: Call) -> Json:
    user = call.bot.workspace.user(call.arguments.text("user"))
    return {
        "user": {
            "id": user.id,
            "team_id": user.workspace.id,
            "name": user.name.lower(),
            "real_name": user.name,
            "deleted": False,
            "is_bot": user.app_id is not None,
            "tz": "Etc/UTC",
            "profile": {"real_name": user.name, "display_name": user.name, "team": user.workspace.id},
        }
    }


def _react(call: Call) -> Json:
    if not call.core.posting.react(*_reaction(call)):
        raise MethodError("already_reacted")
    return {}


def _take_reaction_back(call: Call) -> Json:
    if not call.core.posting.take_reaction_back(*_reaction(call)):
        raise MethodError("no_reaction")
    return {}


def _reaction(call: Call) -> tuple[Message, str, str]:
    name = call.arguments.text("name")
    if not _REACTION.fullmatch(name):
        raise MethodError("invalid_name")
    message = call.core.messages.find(call.channel(), call.arguments.text("timestamp"))
    return message, call.bot.bot_user.id, name


METHODS = {
    "conversations.history": Method(_history, ("channel",)),
    "conversations.info": Method(_info, ("channel",)),
    "conversations.members": Method(_members, ("channel",)),
    "conversations.open": Method(_open),
    "conversations.replies": Method(_replies, ("channel", "ts")),
    "reactions.add": Method(_react, ("channel", "name", "timestamp"), ("reactions:write",)),
    "reactions.remove": Method(_take_reaction_back, ("channel", "name", "timestamp"), ("reactions:write",)),
    "users.info": Method(_user_info, ("user",), ("users:read",)),
}
