"""The sandbox's server, and the one object by which tests and the terminal use it.

    async with SlackSandbox() as slack:
        client = AsyncWebClient(slack.bot_token(), base_url=slack.api_url)
        alice = slack.add_person("Alice")
        alice.writes("I lost my card")
        await slack.until(lambda: len(alice.sees()) == 2)

Events go out in the order in which things happen; over HTTP, as with Slack, they may arrive in another.

Not covered: files, attachments, direct messages of several, the older assistant view, user tokens, Enterprise Grid.
"""

import json
import socket
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self, TypeVar

from aiohttp import web
from yarl import URL

from bot.channels.slack.sandbox.agents import AgentSurface
from bot.channels.slack.sandbox.clock import Clock
from bot.channels.slack.sandbox.core import ApiCall, Core
from bot.channels.slack.sandbox.deliveries import Delivery
from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.faults import Faults
from bot.channels.slack.sandbox.messages import Message
from bot.channels.slack.sandbox.people import Person
from bot.channels.slack.sandbox.socket_mode import Connection
from bot.channels.slack.sandbox.tiers import Rate
from bot.channels.slack.sandbox.views import View
from bot.channels.slack.sandbox.web_api import WebApi
from bot.channels.slack.sandbox.world import App, Channel, Installation, Workspace

T = TypeVar("T")


class SlackSandbox:
    """One Slack with one workspace, in which the app is installed; more of everything can be added."""

    def __init__(
        self,
        app: App | None = None,
        *,
        clock: Clock | None = None,
        rates: Mapping[str, Rate] | None = None,
        port: int = 0,
    ) -> None:
        self.clock = clock or Clock()
        self._core = Core(self.clock, rates or {})
        self._port = port
        self._closing = AsyncExitStack()
        self.faults = Faults(self._core.script, self._core.socket, self._core.credentials)
        self.app = self.add_app(app or App())
        self.workspace = self.add_workspace("Acme")
        self.install()

    async def __aenter__(self) -> Self:
        core = self._core
        listener = socket.create_server(("127.0.0.1", self._port))
        core.responses.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        core.http.open()
        self._closing.push_async_callback(core.http.close)
        application = web.Application()
        application.router.add_route("*", "/api/{method}", WebApi(core).handle)
        application.router.add_get("/link", core.socket.accept)
        application.router.add_post("/response/{secret}", self._use_response_url)
        application.router.add_get("/oauth/v2/authorize", self._authorize)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._closing.push_async_callback(runner.cleanup)
        await web.SockSite(runner, listener).start()
        self._closing.push_async_callback(core.socket.close)
        self._closing.push_async_callback(core.deliveries.close)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._closing.aclose()

    @property
    def api_url(self) -> str:
        """What a client takes as its base URL."""
        return f"{self._core.base_url}/api/"

    @property
    def authorize_url(self) -> str:
        """The page on which somebody agrees to an app's scopes."""
        return f"{self._core.base_url}/oauth/v2/authorize"

    # What there is, and what is added.

    def add_app(self, app: App) -> App:
        self._core.credentials.add_app_token(app)
        return self._core.world.add_app(app)

    def add_workspace(self, name: str) -> Workspace:
        """Without the app."""
        return self._core.world.add_workspace(name)

    def install(self, app: App | None = None, workspace: Workspace | None = None) -> Installation:
        """As if somebody had agreed to all of the app's scopes."""
        app, workspace = app or self.app, workspace or self.workspace
        return self._core.world.install(app, workspace, "U0000000000", app.bot_scopes)

    def add_person(self, name: str, workspace: Workspace | None = None, app: App | None = None) -> Person:
        """`app` is the one that this person talks to."""
        user = self._core.world.add_user(workspace or self.workspace, name)
        return Person(self._core, user, app or self.app)

    def add_channel(
        self, name: str, *people: Person, has_app: bool = True, is_private: bool = False, workspace: Workspace | None = None
    ) -> Channel:
        """With these people and, unless said otherwise, every app that is installed."""
        workspace = workspace or self.workspace
        members = [person.id for person in people]
        if has_app:
            members += [installation.bot_user.id for installation in workspace.live_installations()]
        return self._core.world.add_channel(workspace, name, "group" if is_private else "channel", members)

    def installation(self, workspace: Workspace | None = None, app: App | None = None) -> Installation:
        return (workspace or self.workspace).installations[(app or self.app).id]

    def bot_token(self, workspace: Workspace | None = None, app: App | None = None) -> str:
        return self._core.credentials.bot_token(self.installation(workspace, app))

    def trigger(self, person: Person, view: View | None = None) -> str:
        """A trigger id as every interaction brings one; with a view, as if the interaction were in it."""
        return self._core.views.new_trigger(person.user, self.installation(person.user.workspace), view)

    async def verify_request_url(self, app: App | None = None) -> None:
        """The challenge that Slack sends to a new request URL. Raises ActionError when it does not come back."""
        await self._core.http.verify_url(app or self.app)

    # What has happened.

    @property
    def calls(self) -> list[ApiCall]:
        """Every call of the Web API, in the order in which they came."""
        return self._core.calls

    def calls_of(self, method: str) -> list[ApiCall]:
        return [call for call in self.calls if call.method == method]

    @property
    def messages(self) -> list[Message]:
        """Every message that was ever posted, deleted and private ones too."""
        return self._core.messages.all

    @property
    def deliveries(self) -> list[Delivery]:
        """Every event and interaction with its attempts."""
        return self._core.deliveries.all

    def deliveries_of(self, event_type: str) -> list[Delivery]:
        return [delivery for delivery in self.deliveries if delivery.event_type == event_type]

    @property
    def views(self) -> list[View]:
        return self._core.views.all

    @property
    def agents(self) -> AgentSurface:
        return self._core.agents

    @property
    def connections(self) -> list[Connection]:
        """The websockets that are open."""
        return self._core.socket.connections

    async def until(self, condition: Callable[[], T], timeout_s: float = 20.0) -> T:
        """The first value of `condition` that counts as true. Raises TimeoutError after so many real seconds."""
        return await self._core.changes.until(condition, timeout_s)

    async def settled(self) -> None:
        """Every delivery is acknowledged, given up, or waiting for its time to be sent again."""
        await self._core.deliveries.settled()

    async def _use_response_url(self, request: web.Request) -> web.Response:
        try:
            self._core.responses.use(request.match_info["secret"], json.loads(await request.text()))
        except ValueError:
            return web.json_response({"ok": False, "error": "invalid_payload"}, status=400)
        except MethodError as error:
            status = 404 if error.code.endswith("_url") else 400
            return web.json_response({"ok": False, "error": error.code}, status=status)
        return web.Response(text="ok")

    async def _authorize(self, request: web.Request) -> web.Response:
        """The first person of the workspace (`team`, or the first one) agrees at once."""
        query = request.query
        app = next((app for app in self._core.world.apps.values() if app.client_id == query.get("client_id")), None)
        workspace = self._core.world.workspaces.get(query.get("team", self.workspace.id))
        redirect_uri = query.get("redirect_uri")
        if app is None or workspace is None or redirect_uri not in {None, *app.redirect_urls} or not app.redirect_urls:
            return web.Response(status=400, text="client_id, team or redirect_uri do not match an app")
        user = next(user for user in workspace.users.values() if user.app_id is None)
        scopes = frozenset(query.get("scope", "").split(",")) & app.bot_scopes
        code = self._core.credentials.new_code(app, workspace, user.id, scopes, redirect_uri)
        target = URL(redirect_uri or min(app.redirect_urls)).update_query(code=code, state=query.get("state", ""))
        raise web.HTTPFound(str(target))
