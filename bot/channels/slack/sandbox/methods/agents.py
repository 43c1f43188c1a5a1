"""assistant.threads.* and agents.sessions.*: what an agent shows beside its messages."""

from bot.channels.slack.sandbox.agents import MOST_PROMPTS, Prompts
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.methods.method import Call, Method
from bot.channels.slack.sandbox.methods.streams import SESSION_STATUSES
from bot.channels.slack.sandbox.world import Json


def _thread(call: Call) -> tuple[str, str]:
    channel = call.channel("channel_id")
    thread_ts = call.arguments.ts("thread_ts")
    assert thread_ts is not None
    if not call.core.messages.in_thread(channel, thread_ts):
        raise MethodError("thread_not_found")
    return channel.id, thread_ts


def _set_status(call: Call) -> Json:
    """An empty status clears it."""
    channel_id, thread_ts = _thread(call)
    loading = call.arguments.strings("loading_messages")
    call.core.agents.set_status(channel_id, thread_ts, call.arguments.text("status"), loading)
    return {}


def _set_title(call: Call) -> Json:
    call.core.agents.titles[_thread(call)] = call.arguments.text("title")
    return {}


def _set_suggested_prompts(call: Call) -> Json:
    channel, prompts = call.channel("channel_id"), call.arguments.items("prompts") or []
    if len(prompts) > MOST_PROMPTS:
        raise MethodError("invalid_arguments", f"[ERROR] no more than {MOST_PROMPTS} items allowed [json-pointer:/prompts]")
    if not all(prompt.get("title") and prompt.get("message") for prompt in prompts):
        raise MethodError("invalid_arguments", "[ERROR] missing required field: title or message [json-pointer:/prompts]")
    thread_ts, title = call.arguments.ts("thread_ts"), call.arguments.text("title")
    call.core.agents.prompts.append(Prompts(channel.id, thread_ts, title, prompts))
    return {}


def _set_session_status(call: Call) -> Json:
    thread, status = _thread(call), call.arguments.text("status")
    if status not in SESSION_STATUSES:
        raise MethodError("invalid_arguments", f"[ERROR] must be one of {', '.join(SESSION_STATUSES)} [json-pointer:/status]")
    call.core.agents.sessions[thread] = status
    if call.arguments.has("title"):
        call.core.agents.titles.setdefault(thread, call.arguments.text("title"))
    answer = {"status": status, "agent_status": status}
    if "agent_session_stopped" not in call.bot.app.bot_events:
        answer["warning"] = "missing_agent_session_stopped_event_subscription"
    return answer


METHODS = {
    "assistant.threads.setStatus": Method(_set_status, ("channel_id", "thread_ts"), ("assistant:write", "chat:write")),
    "assistant.threads.setTitle": Method(_set_title, ("channel_id", "thread_ts", "title"), ("assistant:write",)),
    "assistant.threads.setSuggestedPrompts": Method(_set_suggested_prompts, ("channel_id", "prompts"), ("assistant:write",)),
    "agents.sessions.setStatus": Method(_set_session_status, ("channel_id", "thread_ts", "status"), ("chat:write",)),
}
