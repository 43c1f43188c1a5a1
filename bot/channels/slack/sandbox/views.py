"""Modals as stacks and each person's App Home, opened by triggers that live three seconds and count once."""

import secrets
from dataclasses import dataclass, field

from bot.channels.slack.sandbox.blocks import MOST_IN_VIEW, faults_of_blocks
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.world import Installation, Json, User, World

TRIGGER_LIFETIME_S = 3.0
_DEEPEST_STACK = 3


@dataclass(slots=True)
class View:
    """One view as it is now; `earlier` holds what it was before each update."""

    id: str
    user: User
    app: Installation
    content: Json
    hash: str
    root_id: str
    previous_id: str | None = None
    earlier: list[Json] = field(default_factory=list)
    is_open: bool = True

    @property
    def blocks(self) -> list[Json]:
        return list(self.content.get("blocks", []))

    def record(self, values: Json | None = None) -> Json:
        """As answers and payloads show it; `values` are what a person has filled in."""
        fixed = {
            "id": self.id,
            "team_id": self.app.workspace.id,
            "app_id": self.app.app.id,
            "app_installed_team_id": self.app.workspace.id,
            "bot_id": self.app.bot_id,
            "hash": self.hash,
            "root_view_id": self.root_id,
            "previous_view_id": self.previous_id,
            "state": {"values": values or {}},
        }
        defaults = {"private_metadata": "", "callback_id": "", "external_id": "", "submit": None, "close": None}
        return {**defaults, "clear_on_close": False, "notify_on_close": False, **self.content, **fixed}


@dataclass(slots=True)
class _Trigger:
    user: User
    app: Installation
    view_id: str | None
    expires_at: float
    is_used: bool = False


class Views:
    """All views, the closed ones too."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.all: list[View] = []
        self._triggers: dict[str, _Trigger] = {}

    def new_trigger(self, user: User, app: Installation, view: View | None = None) -> str:
        trigger_id = f"{secrets.randbelow(10**12)}.{user.workspace.id}.{secrets.token_hex(16)}"
        expires_at = self._world.clock.now() + TRIGGER_LIFETIME_S
        self._triggers[trigger_id] = _Trigger(user, app, view.id if view else None, expires_at)
        return trigger_id

    def _take_trigger(self, app: Installation, trigger_id: str) -> _Trigger:
        trigger = self._triggers.get(trigger_id)
        if trigger is None or trigger.app is not app:
            raise MethodError("invalid_trigger_id")
        if self._world.clock.now() >= trigger.expires_at:
            raise MethodError("expired_trigger_id")
        if trigger.is_used:
            raise MethodError("exchanged_trigger_id")
        return trigger

    def open(self, app: Installation, trigger_id: str, content: Json) -> View:
        trigger = self._take_trigger(app, trigger_id)
        check_view(content, "modal")
        trigger.is_used = True
        return self._add(trigger.user, app, content, previous=None)

    def push(self, app: Installation, trigger_id: str, content: Json) -> View:
        trigger = self._take_trigger(app, trigger_id)
        top = self.top(trigger.user)
        if top is None or trigger.view_id is None:
            raise MethodError("view_not_found")
        check_view(content, "modal")
        trigger.is_used = True
        return self.push_onto(top, content)

    def push_onto(self, top: View, content: Json) -> View:
        if len(self.stack(top.user)) >= _DEEPEST_STACK:
            raise MethodError("push_limit_reached")
        return self._add(top.user, top.app, content, previous=top)

    def update(self, view: View, content: Json, expected_hash: str | None = None) -> View:
        if expected_hash and expected_hash != view.hash:
            raise MethodError("hash_conflict")
        check_view(content, str(view.content["type"]))
        view.earlier.append(view.content)
        view.content, view.hash = content, self._new_hash()
        return view

    def publish(self, user: User, app: Installation, content: Json, expected_hash: str | None) -> View:
        check_view(content, "home")
        home = self.home(user, app)
        if home is None:
            return self._add(user, app, content, previous=None)
        return self.update(home, content, expected_hash)

    def find(self, app: Installation, view_id: str, external_id: str) -> View:
        for view in self.all:
            external = view.content.get("external_id")
            if view.app is app and view.is_open and (view.id == view_id or (external_id and external == external_id)):
                return view
        raise MethodError("not_found")

    def home(self, user: User, app: Installation) -> View | None:
        homes = (view for view in self.all if view.content["type"] == "home" and view.user is user and view.app is app)
        return next(homes, None)

    def stack(self, user: User) -> list[View]:
        """The person's open modals, the one on top last."""
        return [view for view in self.all if view.user is user and view.is_open and view.content["type"] == "modal"]

    def top(self, user: User) -> View | None:
        return next(reversed(self.stack(user)), None)

    def close(self, user: User, everything: bool = False) -> list[View]:
        """The views that went, which are all of them or the one on top."""
        stack = self.stack(user)
        gone = stack if everything else stack[-1:]
        for view in gone:
            view.is_open = False
        return gone

    def _add(self, user: User, app: Installation, content: Json, previous: View | None) -> View:
        external_id = content.get("external_id")
        if external_id and any(view.is_open and view.content.get("external_id") == external_id for view in self.all):
            raise MethodError("duplicate_external_id")
        if previous is None and content["type"] == "modal":
            self.close(user, everything=True)
        view_id = self._world.new_id("V")
        root_id = previous.root_id if previous else view_id
        view = View(view_id, user, app, content, self._new_hash(), root_id, previous.id if previous else None)
        self.all.append(view)
        return view

    def _new_hash(self) -> str:
        return f"{int(self._world.clock.now())}.{secrets.token_hex(4)}"


def check_view(content: Json, kind: str) -> None:
    """Raises `invalid_arguments` with all that is wrong."""
    wrong = []
    if content.get("type") != kind:
        wrong.append(f"[ERROR] unsupported type: {content.get('type')} [json-pointer:/view/type]")
    title = content.get("title") or {}
    if kind == "modal" and not 1 <= len(title.get("text", "")) <= 24:
        wrong.append("[ERROR] must be 1 to 24 characters [json-pointer:/view/title/text]")
    for name, most in (("private_metadata", 3000), ("callback_id", 255), ("external_id", 255)):
        if len(content.get(name) or "") > most:
            wrong.append(f"[ERROR] must be less than {most + 1} characters [json-pointer:/view/{name}]")
    blocks = content.get("blocks")
    if not isinstance(blocks, list):
        wrong.append("[ERROR] missing required field: blocks [json-pointer:/view]")
    else:
        wrong += faults_of_blocks(blocks, MOST_IN_VIEW, "/view/blocks")
        has_input = any(block.get("type") == "input" for block in blocks)
        if kind == "modal" and has_input and not content.get("submit"):
            wrong.append("[ERROR] submit required when an input block is within blocks [json-pointer:/view/submit]")
    if wrong:
        raise MethodError("invalid_arguments", *wrong)
