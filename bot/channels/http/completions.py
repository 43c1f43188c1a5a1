"""POST /v1/chat/completions: from a request to a turn, and from its events to OpenAI's objects, whole or streamed."""

import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from bot.access.roles import Principal
from bot.app import Service
from bot.channels.http.access import allow
from bot.channels.http.completion_objects import ChatCompletion, ChatCompletionChunk, Completion, repeated_chunks
from bot.channels.http.completion_schema import ChatCompletionRequest
from bot.channels.http.disconnects import CLIENT_CLOSED_REQUEST, unless_disconnected
from bot.channels.http.errors import api_error
from bot.channels.http.event_stream import stream_response
from bot.channels.http.idempotency import IdempotencyKey, request_key
from bot.channels.http.limits import TurnGate
from bot.channels.http.openapi import IDEMPOTENT, RATE_LIMITED, self_contained
from bot.channels.http.schema import ErrorResponse
from bot.turn import ChatEvent, TextDelta, TurnFinished, TurnStarted
from prompt_bank.errors import FrontdeskError

log = logging.getLogger(__name__)

_DONE = "data: [DONE]\n\n"


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        tags=["chat"],
        responses={200: _documented_answer(), **IDEMPOTENT, **RATE_LIMITED},
    )
    async def create_chat_completion(
        body: ChatCompletionRequest,
        request: Request,
        principal: Annotated[Principal, allow("chat", "agent")],
        gate: TurnGate,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """Answer the last message of a conversation, streaming or not.

        `model` is a domain, or `auto` to have the router choose. `metadata.conversation_id` names the conversation. The
        answer's `frontdesk` object tells domain, version, digest, turn id and routing scores. The first of `n` choices is the
        one that is logged as the conversation's answer. With an idempotency key, sending it again gives the same answer.
        """
        asked = body.to_chat_request(principal.domains)
        await gate.enter(principal, body.person)
        key = request_key(principal, idempotency_key, "chat completion", body)
        attempt, stored = await service.idempotency.begin(key) if key is not None else ("", None)
        if stored is not None:
            chunks = (_sse(chunk) for chunk in repeated_chunks(stored, _has_usage(body)))
            return stream_response([*chunks, _DONE]) if body.stream else JSONResponse(stored)
        events = service.chat.answer(asked, principal.caller(body.person))
        completion_of = partial(_completion, body, int(time.time()))
        if key is not None:
            kept = service.idempotency
            events = _kept(events, completion_of, partial(kept.finish, key, attempt), partial(kept.forget, key, attempt))
        if body.stream:
            # Errors before the first token are still an ordinary response.
            first = await unless_disconnected(request, anext(events))
            if first is None:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return stream_response(_stream(events, completion_of(first), body.n or 1))
        completion = await unless_disconnected(request, _complete(events, completion_of))
        return JSONResponse(completion) if completion else Response(status_code=CLIENT_CLOSED_REQUEST)

    return router


def _has_usage(body: ChatCompletionRequest) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _completion(body: ChatCompletionRequest, created: int, first: ChatEvent) -> Completion:
    assert isinstance(first, TurnStarted)
    return Completion(body.model, first, body.is_json, bool(body.logprobs), _has_usage(body), created)


async def _kept(
    events: AsyncGenerator[ChatEvent, None],
    completion_of: Callable[[ChatEvent], Completion],
    finish: Callable[[dict[str, Any]], Awaitable[None]],
    forget: Callable[[], Awaitable[None]],
) -> AsyncGenerator[ChatEvent, None]:
    """The same events; the answer is kept for its idempotency key once it is whole, and the key is free again if it is not."""
    is_whole = False
    try:
        async with aclosing(events):
            first = await anext(events)
            yield first
            async for event in events:
                if isinstance(event, TurnFinished):
                    is_whole = True
                    await finish(completion_of(first).whole(event))
                yield event
    finally:
        if not is_whole:
            await forget()


async def _complete(
    events: AsyncGenerator[ChatEvent, None], completion_of: Callable[[ChatEvent], Completion]
) -> dict[str, Any]:
    async with aclosing(events):
        completion = completion_of(await anext(events))
        async for event in events:
            if isinstance(event, TurnFinished):
                return completion.whole(event)
    raise AssertionError("a turn ends with TurnFinished")


async def _stream(
    events: AsyncGenerator[ChatEvent, None], completion: Completion, num_choices: int
) -> AsyncGenerator[str, None]:
    """Server-sent events in the order of OpenAI's API: roles, texts, finish reasons, usage if asked for, [DONE]."""
    async with aclosing(events):
        for index in range(num_choices):
            yield _sse(completion.first_chunk(index))
        try:
            async for event in events:
                if isinstance(event, TextDelta) and event.text:
                    yield _sse(completion.text_chunk(event.text, event.index, event.tokens))
                elif isinstance(event, TurnFinished):
                    for index in range(num_choices):
                        yield _sse(completion.last_chunk(index, event))
                    if completion.has_usage:
                        yield _sse(completion.usage_chunk(event))
        except Exception as error:  # boundary: the response has begun, so no error handler is left
            known = error if isinstance(error, FrontdeskError) else FrontdeskError()
            turn_id, unexpected = completion.started.turn_id, None if known is error else error
            log.error("turn %s: %s: %s", turn_id, type(error).__name__, error, exc_info=unexpected)
            yield _sse({"error": api_error(known).model_dump()})
            return
        yield _DONE


def _sse(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record)}\n\n"  # escaped, so that no client takes a U+2028 for the end of a line


def _documented_answer() -> dict[str, Any]:
    """The response in OpenAPI: a completion, or with `stream` server-sent events, as FastAPI describes its own."""
    said = {"anyOf": [self_contained(ChatCompletionChunk), self_contained(ErrorResponse)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": said}
    event = {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}}, "required": ["data"]}
    description = "The answer; with `stream`, server-sent events, of which the last is `[DONE]` or an error"
    return {
        "model": ChatCompletion,
        "description": description,
        "content": {"text/event-stream": {"itemSchema": event}},
    }
