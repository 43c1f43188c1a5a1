"""Interactions as Slack words them: commands, clicks, submissions, shortcuts. What a person did, as the app is told."""

from typing import Any

from bot.channels.slack.sandbox.messages import Message
from bot.channels.slack.sandbox.views import View
from bot.channels.slack.sandbox.world import Channel, Installation, Json, User


def slash_command(
    user: User, app: Installation, channel: Channel, command: str, text: str, trigger_id: str, response_url: str
) -> Json:
    return {
        "token": app.app.verification_token,
        "team_id": app.workspace.id,
        "team_domain": app.workspace.domain,
        "channel_id": channel.id,
        "channel_name": channel.name,
        "user_id": user.id,
        "user_name": user.name,
        "command": command,
        "text": text,
        "api_app_id": app.app.id,
        "is_enterprise_install": "false",
        "response_url": response_url,
        "trigger_id": trigger_id,
    }


def _interaction(kind: str, user: User, app: Installation) -> Json:
    """What all of them tell but commands."""
    return {
        "type": kind,
        "user": {"id": user.id, "username": user.name, "name": user.name, "team_id": user.workspace.id},
        "api_app_id": app.app.id,
        "token": app.app.verification_token,
        "team": {"id": app.workspace.id, "domain": app.workspace.domain},
        "enterprise": None,
        "is_enterprise_install": False,
    }


def message_action(
    user: User, app: Installation, message: Message, action: Json, trigger_id: str, response_url: str, now: float
) -> Json:
    """A click in a message."""
    container: Json = {
        "type": "message",
        "message_ts": message.ts,
        "channel_id": message.channel.id,
        "is_ephemeral": message.only_for is not None,
    }
    if message.thread_ts is not None:
        container["thread_ts"] = message.thread_ts
    return _interaction("block_actions", user, app) | {
        "container": container,
        "trigger_id": trigger_id,
        "channel": {"id": message.channel.id, "name": message.channel.name},
        "message": message.record(now),
        "state": {"values": {}},
        "response_url": response_url,
        "actions": [action],
    }


def view_action(user: User, view: View, action: Json, trigger_id: str) -> Json:
    """A click in a modal or in App Home."""
    return _interaction("block_actions", user, view.app) | {
        "container": {"type": "view", "view_id": view.id},
        "trigger_id": trigger_id,
        "view": view.record(),
        "actions": [action],
    }


def view_submission(user: User, view: View, values: Json, trigger_id: str) -> Json:
    submitted = {"trigger_id": trigger_id, "view": view.record(values), "response_urls": []}
    return _interaction("view_submission", user, view.app) | submitted


def view_closed(user: User, view: View, is_cleared: bool) -> Json:
    return _interaction("view_closed", user, view.app) | {"view": view.record(), "is_cleared": is_cleared}


def message_shortcut(
    user: User, app: Installation, message: Message, callback_id: str, trigger_id: str, response_url: str, now: float
) -> Json:
    return _interaction("message_action", user, app) | {
        "action_ts": f"{now:.6f}",
        "callback_id": callback_id,
        "trigger_id": trigger_id,
        "response_url": response_url,
        "message_ts": message.ts,
        "channel": {"id": message.channel.id, "name": message.channel.name},
        "message": message.record(now),
    }


def action_on(block: Json, element: Json, choice: str | None, at: str) -> Json:
    """What a click on an element tells. `choice` is the value of what was chosen where there is a choice.

    Raises LookupError when there is no such choice.
    """
    action: Json = {
        "type": element["type"],
        "action_id": element["action_id"],
        "block_id": block.get("block_id", ""),
        "action_ts": at,
    }
    if element["type"] == "feedback_buttons":
        button = _chosen([element["positive_button"], element["negative_button"]], choice)
        return action | {"text": button["text"], "value": button["value"]}
    if "options" in element:
        return action | _selection(element, choice)
    kept: dict[str, Any] = {name: element[name] for name in ("text", "value") if name in element}
    return action | kept


def input_state(element: Json, entered: str | None) -> Json:
    """What a submission tells of one input."""
    if "options" in element:
        return {"type": element["type"], **(_selection(element, entered) if entered is not None else _none_selected(element))}
    return {"type": element["type"], "value": entered}


def _selection(element: Json, choice: str | None) -> Json:
    option = _chosen(element["options"], choice)
    return {"selected_options": [option]} if _takes_several(element) else {"selected_option": option}


def _none_selected(element: Json) -> Json:
    return {"selected_options": []} if _takes_several(element) else {"selected_option": None}


def _takes_several(element: Json) -> bool:
    return element["type"] in ("checkboxes", "multi_static_select")


def _chosen(options: list[Json], value: str | None) -> Json:
    for option in options:
        if option["value"] == value:
            return option
    raise LookupError(value)
