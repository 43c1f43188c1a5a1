"""Errors on the wire: OpenAI's shape, a status for every error of ours, and no exception text of the service's own troubles."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import Match

from bot.channels.http.schema import ApiError
from prompt_bank.errors import (
    AccessError,
    AuthenticationError,
    BadRequestError,
    BodyTooLargeError,
    ConversationBusyError,
    EngineBusyError,
    FrontdeskError,
    HeadTooLargeError,
    IdempotencyMismatchError,
    InboxFullError,
    PermissionDeniedError,
    PointerConflictError,
    RateLimitedError,
    RequestTooSlowError,
    RequestUnderWayError,
    TooManyRequestsError,
    UnavailableError,
    UnknownConversationError,
    UnknownDomainError,
    UnknownTurnError,
    UnknownVersionError,
    VersionInUseError,
    error_named,
)

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1

# What OpenAI's API calls them.
_ACCESS_ERRORS: dict[type[AccessError], tuple[int, str, str]] = {
    AuthenticationError: (401, "invalid_request_error", "invalid_api_key"),
    PermissionDeniedError: (403, "invalid_request_error", "permission_denied"),
    RateLimitedError: (429, "requests", "rate_limit_exceeded"),
}


_FULL = (EngineBusyError, InboxFullError, TooManyRequestsError)  # as it should be, when too much is asked
_STATUS: dict[tuple[type[FrontdeskError], ...], int] = {
    (UnknownDomainError, UnknownTurnError, UnknownConversationError, UnknownVersionError): 404,
    (ConversationBusyError, RequestUnderWayError, VersionInUseError, PointerConflictError): 409,
    (BodyTooLargeError,): 413,
    (HeadTooLargeError,): 431,
    (RequestTooSlowError,): 408,
    (IdempotencyMismatchError,): 422,
    (BadRequestError,): 400,
}


def status_of(error: FrontdeskError) -> int:
    if isinstance(error, AccessError):
        return _ACCESS_ERRORS[type(error)][0]
    for kinds, status in _STATUS.items():
        if isinstance(error, kinds):
            return status
    return 503 if isinstance(error, UnavailableError) else 500


def failure_response(code: str, sentence: str) -> JSONResponse:
    """Of a turn that failed in some process: `code` is the name of its error, `sentence` what the person is told."""
    error = error_named(code)(sentence)
    told = api_error(error).model_copy(update={"message": sentence, "code": code})
    # It is in the log as it ended: asking again with the same key would give the same, so nobody is told to.
    return error_response(min(status_of(error), 500), told)


def api_error(error: FrontdeskError) -> ApiError:
    """What the caller is told: the whole text where the mistake is the caller's, else a fixed sentence."""
    if isinstance(error, BadRequestError):
        return ApiError(message=str(error), type="invalid_request_error", code=type(error).__name__)
    if isinstance(error, AccessError):
        _, kind, code = _ACCESS_ERRORS[type(error)]
        return ApiError(message=str(error), type=kind, code=code)
    is_theirs = status_of(error) in (404, 409)
    return ApiError(
        message=str(error) if is_theirs else error.sentence,
        type="invalid_request_error" if is_theirs else "server_error",
        code=type(error).__name__,
    )


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(FrontdeskError, _on_frontdesk_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_unexpected_error)


async def _on_frontdesk_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FrontdeskError)
    status = status_of(error)
    if status >= 500 or isinstance(error, AccessError):
        level = logging.ERROR if status >= 500 and not isinstance(error, _FULL) else logging.WARNING
        log.log(level, "%s %s: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return error_of(error)


def error_of(error: FrontdeskError) -> JSONResponse:
    return error_response(status_of(error), api_error(error), _headers(error))


def _headers(error: FrontdeskError) -> dict[str, str] | None:
    if isinstance(error, AuthenticationError):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, RateLimitedError):
        return {"Retry-After": str(error.retry_after_s)}
    return {"Retry-After": str(RETRY_AFTER_S)} if isinstance(error, UnavailableError) else None


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    if problems[0]["type"] == "json_invalid":
        text = f"the body is not valid JSON: {problems[0]['ctx']['error']} (character {problems[0]['loc'][-1]})"
        return error_response(400, ApiError(message=text, type="invalid_request_error"))
    place, reason = _told(problems, error.body)
    return error_response(400, ApiError(message=f"{place}: {reason}", type="invalid_request_error", param=place))


def _told(problems: Sequence[Any], body: Any) -> tuple[str, str]:
    """The first problem's place and what is wrong. Of the forms that a value may have, the one that fits farthest counts."""
    places = [_place(problem, body) for problem in problems]
    within_first = [index for index, place in enumerate(places) if place[: len(places[0])] == places[0]]
    farthest = max(within_first, key=lambda index: len(places[index]))
    return ".".join(places[farthest]) or "body", problems[farthest]["msg"].removeprefix("Value error, ")


def _place(problem: Any, body: Any) -> tuple[str, ...]:
    """Where in the request it is, without the names that pydantic gives to the forms of a value."""
    origin, *parts = problem["loc"]
    if origin != "body":
        return tuple(map(str, parts))
    place, value = [], body
    for part in parts:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value))):
            place.append(str(part))
            value = value[part]
    return (*place, str(parts[-1])) if problem["type"] == "missing" and parts else tuple(place)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers or {})
    if "Allow" in headers:  # the framework names those of one route; there may be another with the same path
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return error_response(error.status_code, ApiError(message=text, type="invalid_request_error"), headers)


def _methods(request: Request) -> Iterator[str]:
    for context in iter_route_contexts(request.app.routes):
        if context.matches(request.scope)[0] is not Match.NONE:
            yield from context.methods or ()


async def _on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(500, api_error(FrontdeskError()))


def error_response(status: int, error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": error.model_dump()}, status, headers)
