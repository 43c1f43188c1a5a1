"""The HTTP application. Thin: it turns requests into chat requests and chat events into OpenAI's objects."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from bot.access.roles import Principal
from bot.app import Service
from bot.channels.http.access import PUBLIC, allow, guard
from bot.channels.http.errors import api_error, install_error_handlers
from bot.channels.http.limits import RATE_LIMITED, LimitHeaders, TurnGate
from bot.channels.http.schema import (
    ChatCompletionRequest,
    ErrorResponse,
    FeedbackRequest,
    chunk_record,
    completion_record,
    finished_record,
    started_record,
    usage_record,
)
from bot.chat import ChatEvent, TextDelta, TurnFinished, TurnStarted
from prompt_bank.card import ROUTED
from prompt_bank.errors import FrontdeskError, UnknownDomainError

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that went away; nobody is left to read it

_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 404, 500, 503)}


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="Frontdesk",
        description="One frozen language model, a trained soft prompt for every domain.",
        responses=_ERRORS,
        redoc_url=None,
    )
    install_error_handlers(app)
    app.state.entrance, app.state.limiter = service.entrance, service.limiter
    app.add_middleware(LimitHeaders)

    @app.post("/v1/chat/completions", response_model=None, tags=["chat"], responses=RATE_LIMITED)
    async def create_chat_completion(
        body: ChatCompletionRequest,
        request: Request,
        principal: Annotated[Principal, allow("chat", "agent")],
        gate: TurnGate,
    ) -> Response:
        """Answer the last message of a conversation, streaming or not.

        `model` is a domain, or `auto` to have the router choose. `metadata.conversation_id` names the conversation. The
        answer's `frontdesk` object tells domain, version, digest, turn id and routing scores.
        """
        await gate.enter(principal, body.person)
        events = service.chat.answer(body.to_chat_request(principal.domains), principal.caller(body.person))
        if body.stream:
            # Errors before the first token are still an ordinary response.
            first = await _unless_disconnected(request, anext(events))
            if first is None:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            chunks = _stream(events, first, body)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        completion = await _unless_disconnected(request, _complete(events, body.model))
        return JSONResponse(completion) if completion else Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.get("/v1/models", tags=["chat"])
    async def list_models(principal: Annotated[Principal, allow("chat", "agent", "trainer")]) -> dict[str, Any]:
        """`auto` and every live domain that the API key may use."""
        return {"object": "list", "data": list((await _models(service, principal)).values())}

    @app.get("/v1/models/{model}", tags=["chat"])
    async def retrieve_model(model: str, principal: Annotated[Principal, allow("chat", "agent", "trainer")]) -> dict[str, Any]:
        """One of them."""
        if model != ROUTED:
            principal.check_domain(model)
        models = await _models(service, principal)
        if model not in models:
            raise UnknownDomainError(f"no domain {model!r} is live; there are: {', '.join(models)}")
        return models[model]

    @app.post("/v1/feedback", status_code=201, tags=["feedback"])
    async def create_feedback(body: FeedbackRequest, principal: Annotated[Principal, allow("chat", "agent")]) -> dict[str, str]:
        """Vote on one answer, and tell what it should have been. A `chat` key may do so for its own answers."""
        await service.conversations.add_feedback(
            body.turn_id, body.vote, body.reason, body.correction, author=principal.id, scope=principal.visible_scope
        )
        return {"turn_id": body.turn_id}

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/livez", tags=["operations"], dependencies=[allow(PUBLIC)])
    async def livez() -> dict[str, str]:
        """Whether the process answers at all."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"], dependencies=[allow(PUBLIC)])
    async def readyz() -> JSONResponse:
        """Whether a message would be answered now."""
        checks = await _readiness(service)
        return JSONResponse(checks, 200 if all(state == "ok" for state in checks.values()) else 503)

    @app.get("/metrics", tags=["operations"], dependencies=[allow("admin")])
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.telemetry.exposition(), media_type=CONTENT_TYPE_LATEST)

    guard(app)
    return app


async def _models(service: Service, principal: Principal) -> dict[str, dict[str, Any]]:
    cards = await service.chat.cards(principal.domains)
    described = {ROUTED: "the router chooses the domain"} | {name: card.description for name, card in cards.items()}
    return {
        name: {"id": name, "object": "model", "created": 0, "owned_by": "frontdesk", "description": description}
        for name, description in described.items()
    }


async def _complete(events: AsyncGenerator[ChatEvent, None], model: str) -> dict[str, Any]:
    started: dict[str, Any] = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, TurnStarted):
                started = started_record(event)
            elif isinstance(event, TurnFinished):
                turn = event.turn
                return completion_record(model, turn.answer, turn, finished_record(started, turn))
    raise AssertionError("a turn ends with TurnFinished")


async def _unless_disconnected(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client goes away first; None then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            log.info("client went away: generation cancelled")
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    events: AsyncGenerator[ChatEvent, None], first: ChatEvent, body: ChatCompletionRequest
) -> AsyncGenerator[str, None]:
    """Server-sent events in the order of OpenAI's API: role, texts, finish reason, usage if asked for, [DONE]."""
    assert isinstance(first, TurnStarted)
    started = started_record(first)
    turn_id = first.turn_id
    async with aclosing(events):
        yield _sse(chunk_record(body.model, turn_id, {"role": "assistant", "content": ""}, frontdesk=started))
        try:
            async for event in events:
                if isinstance(event, TextDelta) and event.text:
                    yield _sse(chunk_record(body.model, turn_id, {"content": event.text}))
                elif isinstance(event, TurnFinished):
                    finished = finished_record(started, event.turn)
                    yield _sse(chunk_record(body.model, turn_id, {}, event.turn.finish_reason, frontdesk=finished))
                    if body.stream_options and body.stream_options.include_usage:
                        usage = chunk_record(body.model, turn_id, {}, usage=usage_record(event.turn))
                        yield _sse({**usage, "choices": []})
        except Exception as error:  # boundary: the response has begun, so no error handler is left
            known = error if isinstance(error, FrontdeskError) else FrontdeskError()
            log.error("turn %s: %s: %s", turn_id, type(error).__name__, error, exc_info=None if known is error else error)
            yield _sse({"error": api_error(known).model_dump()})
            return
        yield "data: [DONE]\n\n"


def _sse(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record)}\n\n"  # escaped, so that no client takes a U+2028 for the end of a line


async def _readiness(service: Service) -> dict[str, str]:
    checks = {"engine": "ok" if service.engine.is_running else "stopped", "bank": "ok", "conversations": "ok"}
    try:
        await service.bank.claim_table()
    except FrontdeskError as error:
        checks["bank"] = type(error).__name__
    try:
        await service.conversations.check()
    except FrontdeskError as error:
        checks["conversations"] = type(error).__name__
    return checks
