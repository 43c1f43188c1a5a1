"""The rule of every route: which roles may use it. An application with a route that declares none does not start.

    @app.get("/livez", dependencies=[allow(PUBLIC)])

    @app.get("/v1/models")
    async def list_models(principal: Annotated[Principal, allow("chat", "agent")]) -> ...

The roles stand in the OpenAPI page as `x-roles`. `admin` may everything; `public` means that no key is needed.
"""

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Security
from fastapi.routing import iter_route_contexts
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from bot.access.entrance import Entrance
from bot.access.roles import LOCAL, Principal, Role
from prompt_bank.errors import PermissionDeniedError, ServiceError

PUBLIC: Literal["public"] = "public"

_SCHEME = "ApiKey"
_OWN_HOSTS = ("localhost", "127.0.0.1", "::1")
_BEARER = HTTPBearer(
    scheme_name=_SCHEME, description="An API key: `frontdesk keys add`. Not needed while keys are off.", auto_error=False
)
# The pages that describe the API and the way to them: not on the OpenAPI page, and they tell nothing of this installation.
_PAGES = {"/", "/docs", "/docs/oauth2-redirect", "/openapi.json"}
_REFUSALS = {"401": "No API key that counts", "403": "The API key's role or domains do not include this"}
_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}


def allow(*roles: Role | Literal["public"]) -> Any:
    """A dependency that gives the Principal. Raises AuthenticationError or PermissionDeniedError."""
    is_public = PUBLIC in roles
    allowed = frozenset(roles if is_public else (*roles, "admin"))

    async def principal(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
    ) -> Principal:
        if is_public:
            return LOCAL
        entrance: Entrance = request.app.state.entrance
        found = await entrance.principal(credentials.credentials if credentials else None)
        if found is LOCAL:
            _check_origin(request.headers.get("Origin"))
        if found.role not in allowed:
            raise PermissionDeniedError(
                f"the role {found.role} of this API key may not use this; it takes one of: {', '.join(sorted(allowed))}"
            )
        return found

    # As the security scheme's scopes the roles reach the OpenAPI page by FastAPI's own ways, through routers too.
    return Security(principal, scopes=sorted(allowed))


def _check_origin(origin: str | None) -> None:
    """Without keys, any page that a browser on this machine shows could ask for anything. Raises PermissionDeniedError."""
    if origin is None:
        return
    try:
        is_own = urlsplit(origin).hostname in _OWN_HOSTS
    except ValueError:
        is_own = False
    if not is_own:
        raise PermissionDeniedError(
            f"a page of {origin[:100]!r} may not use a service without API keys; see FRONTDESK_API_KEYS"
        )


def guard(app: FastAPI) -> None:
    """Called when all routes are there: writes their rules into the OpenAPI page. Raises ServiceError where one is missing."""
    paths = app.openapi()["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            _describe(operation, f"{method.upper()} {path}")
    for context in iter_route_contexts(app.routes):
        if context.path not in _PAGES and context.path not in paths:
            raise _no_rule(f"{context.path}, which is not on the OpenAPI page,")


def _describe(operation: dict[str, Any], name: str) -> None:
    roles: list[str] = next((schemes[_SCHEME] for schemes in operation.get("security", ()) if _SCHEME in schemes), [])
    if not roles:
        raise _no_rule(name)
    operation["x-roles"] = roles
    if roles == [PUBLIC]:
        operation["security"] = []
        return
    operation["security"] = [{_SCHEME: []}]
    for status, description in _REFUSALS.items():
        operation["responses"][status] = {"description": description, "content": _ERROR_CONTENT}


def _no_rule(name: str) -> ServiceError:
    return ServiceError(f"the route {name} says not who may use it; give it dependencies=[allow(...)]")
