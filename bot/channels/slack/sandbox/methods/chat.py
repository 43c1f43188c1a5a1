"""chat.*: posting, changing and deleting messages."""

from bot.channels.slack.sandbox.blocks import MOST_IN_MESSAGE, MOST_MARKDOWN_CHARACTERS, faults_of_blocks
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.messages import Message, StreamState
from bot.channels.slack.sandbox.methods.method import Call, Method
from bot.channels.slack.sandbox.world import Json

# Longer text is cut when it is posted, and refused when it replaces another.
_MOST_POSTED = 40_000
_MOST_UPDATED = 4_000


def blocks_of(call: Call) -> list[Json]:
    blocks = call.arguments.items("blocks") or []
    if wrong := faults_of_blocks(blocks, MOST_IN_MESSAGE):
        raise MethodError("invalid_blocks", *wrong)
    return blocks


def metadata_of(call: Call) -> Json | None:
    metadata = call.arguments.record("metadata")
    if metadata is not None and not {"event_type", "event_payload"} <= metadata.keys():
        raise MethodError("invalid_metadata_format")
    return metadata


def username_of(call: Call) -> str | None:
    """Another name or icon for one message needs a scope of its own."""
    if any(call.arguments.has(name) for name in ("username", "icon_url", "icon_emoji")):
        call.require_scope("chat:write.customize")
    return call.arguments.text("username") or None


def _content(call: Call) -> tuple[str, list[Json]]:
    """Text and blocks; `markdown_text` excludes both."""
    text, markdown, blocks = call.arguments.text("text"), call.arguments.text("markdown_text"), blocks_of(call)
    if markdown and (text or blocks):
        raise MethodError("markdown_text_conflict")
    if len(markdown) > MOST_MARKDOWN_CHARACTERS:
        raise MethodError("msg_too_long")
    if not (text.strip() or markdown.strip() or blocks):
        raise MethodError("no_text")
    return markdown or text, blocks


def _post_message(call: Call) -> Json:
    channel, (text, blocks) = call.channel_to_post_in(), _content(call)
    message = call.core.posting.post(
        channel,
        call.bot.bot_user,
        text[:_MOST_POSTED],
        blocks=blocks,
        thread_ts=call.arguments.ts("thread_ts"),
        app=call.bot,
        metadata=metadata_of(call),
        username=username_of(call),
    )
    return {"channel": channel.id, "ts": message.ts, "message": message.record(call.core.clock.now())}


def _post_ephemeral(call: Call) -> Json:
    channel, (text, blocks) = call.channel_to_post_in(), _content(call)
    user_id = call.arguments.text("user")
    if user_id not in channel.members:
        raise MethodError("user_not_in_channel")
    thread_ts = call.arguments.ts("thread_ts")
    message = call.core.posting.post(
        channel, call.bot.bot_user, text, blocks=blocks, thread_ts=thread_ts, app=call.bot, only_for=user_id
    )
    return {"message_ts": message.ts}


def _own_message(call: Call, error: str) -> Message:
    message = call.core.messages.find(call.channel(), call.arguments.text("ts"))
    if message.app is not call.bot:
        raise MethodError(error)
    return message


def _is_streaming(call: Call, message: Message) -> bool:
    return message.stream is not None and message.stream.state_at(call.core.clock.now()) is StreamState.STREAMING


def _update(call: Call) -> Json:
    """Blocks stay when only the text is given, as Slack keeps them."""
    message, (text, blocks) = _own_message(call, "cant_update_message"), _content(call)
    if _is_streaming(call, message):
        raise MethodError("streaming_state_conflict")
    if len(call.arguments.text("text")) > _MOST_UPDATED:
        raise MethodError("msg_too_long")
    message.metadata = metadata_of(call) or message.metadata
    keeps_blocks = call.arguments.items("blocks") is None
    call.core.posting.change(message, text, message.blocks if keeps_blocks else blocks)
    shown = message.record(call.core.clock.now())
    return {"channel": message.channel.id, "ts": message.ts, "text": message.text, "message": shown}


def _delete(call: Call) -> Json:
    message = _own_message(call, "cant_delete_message")
    if _is_streaming(call, message):
        raise MethodError("cant_delete_message")
    call.core.posting.delete(message)
    return {"channel": message.channel.id, "ts": message.ts}


METHODS = {
    "chat.postMessage": Method(_post_message, ("channel",), ("chat:write",)),
    "chat.postEphemeral": Method(_post_ephemeral, ("channel", "user"), ("chat:write",)),
    "chat.update": Method(_update, ("channel", "ts"), ("chat:write",)),
    "chat.delete": Method(_delete, ("channel", "ts"), ("chat:write",)),
}
