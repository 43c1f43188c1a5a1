"""What the OpenAPI page says of refusals, every status that can come in one shape, and of streams."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from bot.channels.http.schema import ErrorResponse


def _refusal(description: str, **more: Any) -> dict[str, Any]:
    return {"model": ErrorResponse, "description": description, **more}


_RETRY_AFTER = {"Retry-After": {"description": "seconds to wait", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}

# Of every route; those of API keys are added by `access`.
ERRORS: dict[int | str, dict[str, Any]] = {
    400: _refusal("What was sent cannot be read or answered"),
    404: _refusal("There is no such thing, or it is another caller's"),
    408: _refusal("The body did not come in time"),
    413: _refusal("The body is too large"),
    500: _refusal("Something went wrong on our side"),
    503: _refusal("Too much to do, or something is away for now: try again", headers=_RETRY_AFTER),
}
RATE_LIMITED: dict[int | str, dict[str, Any]] = {
    429: _refusal("Too many turns of the API key or the person, in a minute or at a time", headers=_RETRY_AFTER)
}
IDEMPOTENT: dict[int | str, dict[str, Any]] = {
    409: _refusal("The first request with this idempotency key is under way, or a turn of this conversation"),
    422: _refusal("The idempotency key came with another request before"),
}
CONFLICT: dict[int | str, dict[str, Any]] = {409: _refusal("What it is in use as forbids this, or another was first")}


def describe(app: FastAPI) -> None:
    """Takes away what FastAPI says of invalid requests: here they are a 400 like others."""
    page = app.openapi()
    own = {"HTTPValidationError", "ValidationError"}
    for operations in page["paths"].values():
        for operation in operations.values():
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]
    page["components"]["schemas"] = {name: schema for name, schema in page["components"]["schemas"].items() if name not in own}


def self_contained(model: type[BaseModel]) -> Any:
    """A model's JSON schema without `$defs`, which have no place within an OpenAPI document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolved(definitions[node["$ref"].rpartition("/")[2]])
        return {key: resolved(value) for key, value in node.items()}

    return resolved(schema)
