"""/api/METHOD: from a request over scripted faults, token, rate limit and arguments to the method, and back to JSON."""

from typing import cast

from aiohttp import web

from bot.channels.slack.sandbox.arguments import Arguments, read_arguments
from bot.channels.slack.sandbox.core import ApiCall, Core
from bot.channels.slack.sandbox.credentials import Token
from bot.channels.slack.sandbox.errors import MethodError, RateLimitedError
from bot.channels.slack.sandbox.faults import CallFault
from bot.channels.slack.sandbox.methods import access, agents, chat, conversations, streams, views
from bot.channels.slack.sandbox.methods.method import Call, Method
from bot.channels.slack.sandbox.world import Json

METHODS: dict[str, Method] = {
    **access.METHODS,
    **agents.METHODS,
    **chat.METHODS,
    **conversations.METHODS,
    **streams.METHODS,
    **views.METHODS,
}


class WebApi:
    def __init__(self, core: Core) -> None:
        self._core = core

    async def handle(self, request: web.Request) -> web.Response:
        call = ApiCall(request.match_info["method"], {}, self._core.clock.now())
        self._core.calls.append(call)
        fault = self._core.script.take_call(call.method)
        if fault is not None and fault.delay_s:
            self._core.changes.notify()
            await self._core.clock.sleep(fault.delay_s)
        try:
            response = await self._respond(request, call, fault)
        except MethodError as error:
            response = _error_response(call, error)
        call.status = response.status
        self._core.changes.notify()
        return response

    async def _respond(self, request: web.Request, call: ApiCall, fault: CallFault | None) -> web.Response:
        arguments = await read_arguments(request)
        call.arguments = arguments.public
        if fault is not None and not fault.takes_effect:
            return _fault_response(fault)
        call.answer, headers = self._answer(call, arguments)
        if fault is not None and fault.status != 200:
            call.answer = None
            return _fault_response(fault)
        return web.json_response(call.answer, headers=headers)

    def _answer(self, call: ApiCall, arguments: Arguments) -> tuple[Json, dict[str, str]]:
        method = METHODS.get(call.method)
        if method is None:
            raise MethodError("unknown_method", req_method=call.method)
        token = self._token(method, arguments)
        installation = token.installation if token is not None else None
        call.team_id = installation.workspace.id if installation is not None else ""
        self._count(call, token)
        checked = Call(self._core, arguments, token)
        if method.scopes:
            checked.require_scope(*method.scopes)
        arguments.require(method.required)
        headers = {"X-OAuth-Scopes": ",".join(sorted(installation.scopes))} if installation is not None else {}
        return {"ok": True, **method.answer(checked)}, headers

    def _token(self, method: Method, arguments: Arguments) -> Token | None:
        if method.token is None:
            return None
        token = self._core.credentials.check(arguments.token)
        if token.kind != method.token:
            raise MethodError("not_allowed_token_type")
        return token

    def _count(self, call: ApiCall, token: Token | None) -> None:
        app_id = token.app.id if token is not None else ""
        is_marketplace = token is None or token.app.is_marketplace
        channel_id = cast(str, call.arguments.get("channel", ""))
        wait_s = self._core.tiers.retry_after_s(call.method, app_id, call.team_id, channel_id, is_marketplace)
        if wait_s:
            raise RateLimitedError(wait_s)


def _fault_response(fault: CallFault) -> web.Response:
    """A page where JSON is expected, as gateways send it, or the error that the script names."""
    if fault.retry_after_s is not None:
        raise RateLimitedError(fault.retry_after_s)
    if fault.error is not None:
        raise MethodError(fault.error)
    return web.Response(status=fault.status, text="<h1>Service unavailable</h1>", content_type="text/html")


def _error_response(call: ApiCall, error: MethodError) -> web.Response:
    call.answer = {"ok": False, "error": error.code, **error.fields}
    if error.messages:
        call.answer["response_metadata"] = {"messages": list(error.messages)}
    if isinstance(error, RateLimitedError):
        return web.json_response(call.answer, status=429, headers={"Retry-After": str(error.retry_after_s)})
    return web.json_response(call.answer)
