"""People of a workspace, who do in Slack what people do; the app learns of it as it would from Slack."""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from bot.channels.slack.sandbox import interactions
from bot.channels.slack.sandbox.blocks import actions_of
from bot.channels.slack.sandbox.core import Core
from bot.channels.slack.sandbox.deliveries import Delivery, DeliveryKind
from bot.channels.slack.sandbox.errors import ActionError, MethodError
from bot.channels.slack.sandbox.events import rich_text
from bot.channels.slack.sandbox.messages import Message, StreamState
from bot.channels.slack.sandbox.views import View
from bot.channels.slack.sandbox.world import App, Channel, Installation, Json, User


@dataclass(frozen=True, slots=True)
class Submission:
    """How a submitted form fared; `errors` are shown beside its fields, by block id."""

    delivery: Delivery
    errors: dict[str, str] = field(default_factory=dict)


@contextmanager
def _refused_by_slack() -> Iterator[None]:
    """An app's answer is checked like its calls."""
    try:
        yield
    except MethodError as error:
        raise ActionError(f"the app's answer is refused: {error.code} {', '.join(error.messages)}") from error


class Person:
    """What makes an event returns at once; what the app answers to waits for its acknowledgement, or for three seconds."""

    def __init__(self, core: Core, user: User, app: App) -> None:
        self._core = core
        self._app = app
        self.user = user

    @property
    def id(self) -> str:
        return self.user.id

    @property
    def direct_messages(self) -> Channel:
        """With the app."""
        return self._core.world.direct_channel(self.user.workspace, self.id, self._installation().bot_user.id)

    @property
    def modal(self) -> View | None:
        """The one on top, of those that are open."""
        return self._core.views.top(self.user)

    @property
    def home(self) -> View | None:
        return self._core.views.home(self.user, self._installation())

    def sees(self, channel: Channel | None = None) -> list[Message]:
        """A channel's messages, those that only this person sees with them."""
        channel_id = (channel or self.direct_messages).id
        return [
            message
            for message in self._core.messages.all
            if message.channel.id == channel_id and not message.is_deleted and message.only_for in (None, self.id)
        ]

    def writes(self, text: str, channel: Channel | None = None, *, thread: Message | None = None) -> Message:
        """To the app directly unless a channel, or a message whose thread is meant, is given."""
        where = thread.channel if thread is not None else channel or self.direct_messages
        if self.id not in where.members:
            raise ActionError(f"{self.user.name} is not in {where.name}")
        return self._core.posting.post(
            where,
            self.user,
            text,
            blocks=rich_text(text, self._core.world.new_id("block-")),
            thread_ts=thread.thread if thread is not None else None,
            client_msg_id=str(uuid.uuid4()),
        )

    def mentions(self, text: str, channel: Channel | None = None, *, thread: Message | None = None) -> Message:
        """Writes with the app's name before the text."""
        return self.writes(f"<@{self._installation().bot_user.id}> {text}", channel, thread=thread)

    def edits(self, message: Message, text: str) -> None:
        self._must_own(message)
        self._core.posting.change(message, text, rich_text(text, self._core.world.new_id("block-")))

    def deletes(self, message: Message) -> None:
        self._must_own(message)
        self._core.posting.delete(message)

    def reacts(self, message: Message, name: str) -> None:
        self._core.posting.react(message, self.id, name)

    def opens_home(self, tab: str = "home") -> None:
        """App Home on the tab `home` or `messages`."""
        self._core.events.home_opened(self.user, self._installation(), self.direct_messages, tab, self.home)

    def stops(self, message: Message) -> None:
        """Slack's own stop button in the thread of this message: what streams there ends, and the app is told."""
        if self._core.agents.sessions.get((message.channel.id, message.thread)) != "processing":
            raise ActionError("there is no stop button: no stream is open and no session is processing")
        app = message.app or self._installation()
        now, streams = self._core.clock.now(), []
        for each in self._core.messages.in_thread(message.channel, message.thread):
            if each.app is app and each.stream is not None and each.stream.state_at(now) is StreamState.STREAMING:
                each.stream.state = StreamState.STOPPED_BY_USER
                streams.append(each.ts)
        self._core.events.session_stopped(app, self.user, message.channel, message.thread, streams)

    def installs(self, app: App | None = None, redirect_uri: str | None = None) -> str:
        """Agrees to the app's scopes; gives the code that goes with the redirect."""
        app = app or self._app
        return self._core.credentials.new_code(app, self.user.workspace, self.id, app.bot_scopes, redirect_uri)

    def uninstalls(self) -> None:
        self._core.uninstall(self._installation())

    async def clicks(self, where: Message | View, action_id: str, choice: str | None = None) -> Delivery:
        """`choice` is the value of the option or of the feedback button that is meant."""
        element_in_block = next((each for each in actions_of(where.blocks) if each[1]["action_id"] == action_id), None)
        if element_in_block is None:
            raise ActionError(f"there is nothing to click with action id {action_id!r}")
        block, element = element_in_block
        try:
            action = interactions.action_on(block, element, choice, f"{self._core.clock.now():.6f}")
        except LookupError:
            raise ActionError(f"{action_id!r} offers no choice {choice!r}") from None
        return await self._clicked(where, action)

    async def _clicked(self, where: Message | View, action: Json) -> Delivery:
        if isinstance(where, View):
            trigger_id = self._core.views.new_trigger(self.user, where.app, where)
            return await self._tell(where.app, "interactive", interactions.view_action(self.user, where, action, trigger_id))
        app = where.app
        if app is None or where.only_for not in (None, self.id):
            raise ActionError(f"{self.user.name} sees no app's message there")
        trigger_id = self._core.views.new_trigger(self.user, app)
        response_url = self._core.responses.new_url(self.user, app, where.channel, where)
        now = self._core.clock.now()
        payload = interactions.message_action(self.user, app, where, action, trigger_id, response_url, now)
        return await self._tell(app, "interactive", payload)

    async def uses(self, command: str, text: str = "", channel: Channel | None = None) -> Delivery:
        """A slash command; what the app answers is posted for this person, or for all if it says so."""
        app, where = self._installation(), channel or self.direct_messages
        if command not in app.app.commands:
            raise ActionError(f"there is no command {command}")
        trigger_id, response_url = (
            self._core.views.new_trigger(self.user, app),
            self._core.responses.new_url(self.user, app, where),
        )
        payload = interactions.slash_command(self.user, app, where, command, text, trigger_id, response_url)
        delivery = await self._tell(app, "slash_commands", payload)
        if delivery.answer:
            with _refused_by_slack():
                self._core.responses.respond(self.user, app, where, delivery.answer)
        return delivery

    async def chooses_shortcut(self, callback_id: str, message: Message) -> Delivery:
        """From the menu of a message."""
        app = self._installation()
        if callback_id not in app.app.shortcuts:
            raise ActionError(f"there is no shortcut {callback_id}")
        trigger_id = self._core.views.new_trigger(self.user, app)
        response_url = self._core.responses.new_url(self.user, app, message.channel)
        now = self._core.clock.now()
        payload = interactions.message_shortcut(self.user, app, message, callback_id, trigger_id, response_url, now)
        return await self._tell(app, "interactive", payload)

    async def submits(self, entries: Mapping[str, str] | None = None) -> Submission:
        """The modal on top, with what is entered by block id; then whatever the app answers happens to it."""
        view = self._open_modal()
        values = self._values(view, dict(entries or {}))
        trigger_id = self._core.views.new_trigger(self.user, view.app, view)
        delivery = await self._tell(view.app, "interactive", interactions.view_submission(self.user, view, values, trigger_id))
        if not delivery.is_acknowledged:
            return Submission(delivery)
        with _refused_by_slack():
            return Submission(delivery, self._follow(view, delivery.answer or {}))

    async def closes(self, everything: bool = False) -> None:
        """The modal on top, or all of them; the app hears of those that ask for it."""
        clears = everything or bool(self._open_modal().content.get("clear_on_close"))
        for view in self._core.views.close(self.user, clears):
            if view.content.get("notify_on_close"):
                await self._tell(view.app, "interactive", interactions.view_closed(self.user, view, clears))

    def _follow(self, view: View, answer: Json) -> dict[str, str]:
        views = self._core.views
        match answer.get("response_action"):
            case "errors":
                return dict(answer["errors"])
            case "update":
                views.update(view, answer["view"])
            case "push":
                views.push_onto(view, answer["view"])
            case "clear":
                views.close(self.user, everything=True)
            case _:
                views.close(self.user)
        self._core.changes.notify()
        return {}

    def _values(self, view: View, entries: dict[str, str]) -> Json:
        values: Json = {}
        for block in view.blocks:
            if block.get("type") != "input":
                continue
            entered = entries.pop(block["block_id"], None)
            if not entered and not block.get("optional"):
                raise ActionError(f"{block['block_id']!r} must be filled in")
            try:
                state = interactions.input_state(block["element"], entered)
            except LookupError:
                raise ActionError(f"{block['block_id']!r} offers no choice {entered!r}") from None
            values[block["block_id"]] = {block["element"]["action_id"]: state}
        if entries:
            raise ActionError(f"the modal has no fields {sorted(entries)}")
        return values

    def _open_modal(self) -> View:
        view = self.modal
        if view is None:
            raise ActionError(f"{self.user.name} has no modal open")
        return view

    def _must_own(self, message: Message) -> None:
        if message.author is not self.user:
            raise ActionError(f"{message.ts} is not {self.user.name}'s message")

    def _installation(self) -> Installation:
        installation = self.user.workspace.installations.get(self._app.id)
        if installation is None or not installation.is_live:
            raise ActionError(f"{self._app.name} is not installed in {self.user.workspace.name}")
        return installation

    async def _tell(self, app: Installation, kind: DeliveryKind, payload: Json) -> Delivery:
        delivery = self._core.deliveries.send(app.app, kind, payload)
        await delivery.finished.wait()
        return delivery
