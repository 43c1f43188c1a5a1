"""Errors on the wire: OpenAI's shape, a status for every error of ours, and no exception text of the service's own troubles."""

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import prompt_bank.errors
from bot.channels.http.schema import ApiError
from prompt_bank.errors import (
    AccessError,
    AuthenticationError,
    BadRequestError,
    BodyTooLargeError,
    BodyTooSlowError,
    ConversationBusyError,
    FrontdeskError,
    IdempotencyMismatchError,
    PermissionDeniedError,
    RateLimitedError,
    RequestUnderWayError,
    UnavailableError,
    UnknownConversationError,
    UnknownDomainError,
    UnknownTurnError,
    UnknownVersionError,
    VersionInUseError,
)

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1


# What OpenAI's API calls them.
_ACCESS_ERRORS: dict[type[AccessError], tuple[int, str, str]] = {
    AuthenticationError: (401, "invalid_request_error", "invalid_api_key"),
    PermissionDeniedError: (403, "invalid_request_error", "permission_denied"),
    RateLimitedError: (429, "requests", "rate_limit_exceeded"),
}


_STATUS: dict[tuple[type[FrontdeskError], ...], int] = {
    (UnknownDomainError, UnknownTurnError, UnknownConversationError, UnknownVersionError): 404,
    (ConversationBusyError, RequestUnderWayError, VersionInUseError): 409,
    (BodyTooLargeError,): 413,
    (BodyTooSlowError,): 408,
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
    kind = getattr(prompt_bank.errors, code, FrontdeskError)
    error = kind(sentence) if isinstance(kind, type) and issubclass(kind, FrontdeskError) else FrontdeskError(sentence)
    return error_response(status_of(error), ApiError(message=sentence, type="server_error", code=code), _headers(error))


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
        level = logging.ERROR if status >= 500 else logging.WARNING
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
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        text = f"the body is not valid JSON: {problem['ctx']['error']} (character {problem['loc'][-1]})"
        return error_response(400, ApiError(message=text, type="invalid_request_error"))
    place = ".".join(str(part) for part in problem["loc"] if part != "body") or "body"
    reason = problem["msg"].removeprefix("Value error, ")
    return error_response(400, ApiError(message=f"{place}: {reason}", type="invalid_request_error", param=place))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(error.status_code, ApiError(message=text, type="invalid_request_error"), error.headers)


async def _on_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(500, api_error(FrontdeskError()))


def error_response(status: int, error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": error.model_dump()}, status, headers)
