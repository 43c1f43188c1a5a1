"""A call's arguments, from the query, a form or a JSON body alike, read with the checks that Slack makes."""

import base64
import json
import re
from typing import Any

from aiohttp import web

from bot.channels.slack.sandbox.errors import MethodError
from bot.channels.slack.sandbox.world import Json

_TS = re.compile(r"\d{10}\.\d{6}")


async def read_arguments(request: web.Request) -> "Arguments":
    """The query's arguments and the body's; client id and secret from the header that OAuth sends them in.

    Raises MethodError for a body that cannot be read.
    """
    arguments: Json = dict(request.query)
    if request.content_type == "application/json" and (body := await request.text()):
        arguments |= _json_object(body)
    elif request.can_read_body:
        arguments |= dict(await request.post())
    header = request.headers.get("Authorization", "")
    if header.startswith("Basic "):
        client_id, _, client_secret = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
        arguments |= {"client_id": client_id, "client_secret": client_secret}
    elif header.startswith("Bearer "):
        arguments["token"] = header.removeprefix("Bearer ")
    return Arguments(arguments)


def _json_object(body: str) -> Json:
    try:
        value = json.loads(body)
    except ValueError:
        raise MethodError("invalid_json") from None
    if not isinstance(value, dict):
        raise MethodError("json_not_object")
    return value


class Arguments:
    """Typed access; what has another type than it should, or is missing, raises `invalid_arguments` naming the argument."""

    def __init__(self, values: Json) -> None:
        self._values = values

    @property
    def public(self) -> Json:
        """All but the token."""
        return {name: value for name, value in self._values.items() if name != "token"}

    @property
    def token(self) -> str | None:
        return self._values.get("token")

    def has(self, name: str) -> bool:
        return self._values.get(name) not in (None, "")

    def require(self, names: tuple[str, ...]) -> None:
        missing = [f"[ERROR] missing required field: {name}" for name in names if not self.has(name)]
        if missing:
            raise MethodError("invalid_arguments", *missing)

    def text(self, name: str, default: str = "") -> str:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise _wrong(name, "must be a string")
        return value

    def flag(self, name: str) -> bool:
        value = self._values.get(name)
        if value in (None, "", "0", "false", "False", False):
            return False
        if value in ("1", "true", "True", True):
            return True
        raise _wrong(name, "must be a boolean")

    def number(self, name: str, default: int) -> int:
        try:
            return int(self._values.get(name) or default)
        except (TypeError, ValueError):
            raise _wrong(name, "must be an integer") from None

    def ts(self, name: str) -> str | None:
        value = self._values.get(name)
        if value in (None, ""):
            return None
        if not isinstance(value, str) or not _TS.fullmatch(value):
            raise MethodError(f"invalid_{name}" if name == "thread_ts" else f"invalid_ts_{name}")
        return value

    def items(self, name: str) -> list[Json] | None:
        """An array of objects, or the JSON of one; None when it was not given."""
        value = self._decoded(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise MethodError("invalid_blocks_format") if name == "blocks" else _wrong(name, "must be an array of objects")
        return value

    def record(self, name: str) -> Json | None:
        value = self._decoded(name)
        if value is not None and not isinstance(value, dict):
            raise _wrong(name, "must be an object")
        return value

    def strings(self, name: str) -> list[str]:
        value = self._decoded(name) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise _wrong(name, "must be an array of strings")
        return value

    def _decoded(self, name: str) -> Any:
        value = self._values.get(name)
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value) if value else None
        except ValueError:
            raise MethodError("invalid_blocks_format") if name == "blocks" else _wrong(name, "must be valid JSON") from None


def _wrong(name: str, what: str) -> MethodError:
    return MethodError("invalid_arguments", f"[ERROR] {what} [json-pointer:/{name}]")
