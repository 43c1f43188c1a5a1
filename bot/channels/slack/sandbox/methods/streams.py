"""chat.startStream, appendStream and stopStream: a message that grows while a person reads it.

A stream ends by itself after some five minutes. Whether Slack lets an app stop one that a person has stopped is told
differently in different places; here it refuses, so that a bot learns to live with that.
"""

from bot.channels.slack.sandbox.blocks import MOST_IN_MESSAGE, MOST_MARKDOWN_CHARACTERS, faults_of_blocks
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.messages import Message, Piece, Stream, StreamState
from bot.channels.slack.sandbox.methods.chat import blocks_of, metadata_of, username_of
from bot.channels.slack.sandbox.methods.method import Call, Method
from bot.channels.slack.sandbox.world import Channel, Json

SESSION_STATUSES = ("active", "processing", "suspended", "closed")
_CHUNK_FIELDS = {
    "markdown_text": ("text",),
    "task_update": ("id", "title", "status"),
    "plan_update": ("title",),
    "blocks": ("blocks",),
}


def _start(call: Call) -> Json:
    channel, thread_ts = call.channel_to_post_in(), call.arguments.ts("thread_ts")
    if channel.kind == "im" and thread_ts is None:
        call.arguments.require(("thread_ts",))
    _check_recipient(call, channel)
    mode, chunks = _content(call)
    now = call.core.clock.now()
    stream = Stream(now, now + call.core.script.stream_lifetime_s, mode)
    message = call.core.posting.post(
        channel, call.bot.bot_user, "", thread_ts=thread_ts, app=call.bot, username=username_of(call), stream=stream
    )
    _add(call, message, "chat.startStream", chunks)
    call.core.agents.sessions[channel.id, message.thread] = "processing"
    return {"channel": channel.id, "ts": message.ts}


def _append(call: Call) -> Json:
    message = _open_stream(call)
    mode, chunks = _content(call)
    if not chunks:
        raise MethodError("invalid_arguments", "[ERROR] missing required field: markdown_text or chunks")
    _settle_mode(message, mode)
    _add(call, message, "chat.appendStream", chunks)
    return {"channel": message.channel.id, "ts": message.ts}


def _stop(call: Call) -> Json:
    message = _open_stream(call)
    (mode, chunks), blocks, metadata = _content(call), blocks_of(call), metadata_of(call)
    status = call.arguments.text("session_status") or "active"
    if status not in SESSION_STATUSES:
        raise MethodError(
            "invalid_arguments", f"[ERROR] must be one of {', '.join(SESSION_STATUSES)} [json-pointer:/session_status]"
        )
    _settle_mode(message, mode)
    _add(call, message, "chat.stopStream", chunks)
    assert message.stream is not None
    message.stream.session_status = status
    call.core.posting.stop_stream(message, message.stream, blocks, metadata)
    call.core.agents.sessions[message.channel.id, message.thread] = status
    return {"channel": message.channel.id, "ts": message.ts, "message": message.record(call.core.clock.now())}


def _check_recipient(call: Call, channel: Channel) -> None:
    """In channels Slack must be told who reads along."""
    for name in ("recipient_user_id", "recipient_team_id"):
        if channel.kind != "im" and not call.arguments.has(name):
            raise MethodError(f"missing_{name}")
    team_id, user_id = call.arguments.text("recipient_team_id"), call.arguments.text("recipient_user_id")
    if team_id and team_id not in call.core.world.workspaces:
        raise MethodError("team_not_found")
    if user_id:
        call.bot.workspace.user(user_id)


def _open_stream(call: Call) -> Message:
    message = call.core.messages.find(call.channel(), call.arguments.text("ts"))
    if message.app is not call.bot:
        raise MethodError("message_not_owned_by_app")
    state = message.stream.state_at(call.core.clock.now()) if message.stream is not None else StreamState.STOPPED
    if state is StreamState.STOPPED_BY_USER:
        raise MethodError("stopped_by_user")
    if state is not StreamState.STREAMING:
        raise MethodError("message_not_in_streaming_state")
    return message


def _content(call: Call) -> tuple[str | None, list[Json]]:
    """Which of the two arguments came, and what it holds as chunks. One call carries 12,000 characters at most."""
    text, chunks = call.arguments.text("markdown_text"), call.arguments.items("chunks")
    if text and chunks:
        raise MethodError("invalid_arguments", "[ERROR] markdown_text and chunks exclude each other")
    mode = "markdown_text" if text else "chunks" if chunks else None
    if text:
        chunks = [{"type": "markdown_text", "text": text}]
    for chunk in chunks or []:
        fields = _CHUNK_FIELDS.get(chunk.get("type", ""))
        if fields is None or not all(chunk.get(name) is not None for name in fields):
            raise MethodError("invalid_chunks")
        if wrong := faults_of_blocks(chunk.get("blocks") or [], MOST_IN_MESSAGE):
            raise MethodError("invalid_blocks", *wrong)
    if sum(len(chunk.get("text") or "") for chunk in chunks or []) > MOST_MARKDOWN_CHARACTERS:
        raise MethodError("msg_too_long")
    return mode, chunks or []


def _settle_mode(message: Message, mode: str | None) -> None:
    """A stream that began with one of the two arguments takes only that one."""
    assert message.stream is not None
    if mode is not None and message.stream.mode not in (None, mode):
        raise MethodError("streaming_mode_mismatch")
    message.stream.mode = message.stream.mode or mode


def _add(call: Call, message: Message, method: str, chunks: list[Json]) -> None:
    assert message.stream is not None
    if chunks:
        call.core.posting.add_to_stream(message, message.stream, Piece(method, call.core.clock.now(), chunks))


METHODS = {
    "chat.startStream": Method(_start, ("channel",), ("chat:write",)),
    "chat.appendStream": Method(_append, ("channel", "ts"), ("chat:write",)),
    "chat.stopStream": Method(_stop, ("channel", "ts"), ("chat:write",)),
}
