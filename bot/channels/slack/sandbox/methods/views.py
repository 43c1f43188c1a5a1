"""views.*: modals and App Home."""

from bot.channels.slack.sandbox.methods.method import Call, Method
from bot.channels.slack.sandbox.views import View
from bot.channels.slack.sandbox.world import Json


def _content(call: Call) -> Json:
    content = call.arguments.record("view")
    assert content is not None
    return content


def _answer(call: Call, view: View) -> Json:
    call.core.changes.notify()
    return {"view": view.record()}


def _open(call: Call) -> Json:
    return _answer(call, call.core.views.open(call.bot, call.arguments.text("trigger_id"), _content(call)))


def _push(call: Call) -> Json:
    return _answer(call, call.core.views.push(call.bot, call.arguments.text("trigger_id"), _content(call)))


def _update(call: Call) -> Json:
    if not call.arguments.has("external_id"):
        call.arguments.require(("view_id",))
    view = call.core.views.find(call.bot, call.arguments.text("view_id"), call.arguments.text("external_id"))
    return _answer(call, call.core.views.update(view, _content(call), call.arguments.text("hash")))


def _publish(call: Call) -> Json:
    user = call.bot.workspace.user(call.arguments.text("user_id"))
    return _answer(call, call.core.views.publish(user, call.bot, _content(call), call.arguments.text("hash")))


METHODS = {
    "views.open": Method(_open, ("trigger_id", "view")),
    "views.push": Method(_push, ("trigger_id", "view")),
    "views.update": Method(_update, ("view",)),
    "views.publish": Method(_publish, ("user_id", "view")),
}
