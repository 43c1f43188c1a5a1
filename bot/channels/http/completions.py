"""POST /v1/chat/completions: from a request to a turn, and from its events to OpenAI's objects, whole or streamed."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from bot.app import Service
from bot.channels.http.completion_objects import ChatCompletion, ChatCompletionChunk, Completion
from bot.channels.http.completion_schema import ChatCompletionRequest
from bot.channels.http.errors import api_error
from bot.channels.http.schema import ErrorResponse
from bot.chat import ChatEvent, TextDelta, TurnFinished, TurnStarted
from prompt_bank.errors import FrontdeskError

log = logging.getLogger(__name__)

# Callers share one scope until there are API keys.
_SCOPE = "api"

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that went away; nobody is left to read it


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None, tags=["chat"], responses={200: _documented_answer()})
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer the last message of a conversation, streaming or not.

        `model` is a domain, or `auto` to have the router choose. `metadata.conversation_id` names the conversation. The
        answer's `frontdesk` object tells domain, version, digest, turn id and routing scores. The first of `n` choices is the
        one that is logged as the conversation's answer.
        """
        events = service.chat.answer(body.to_chat_request(), _SCOPE)
        if body.stream:
            # Errors before the first token are still an ordinary response.
            first = await _unless_disconnected(request, anext(events))
            if first is None:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            chunks = _stream(events, _completion(body, first), body.n or 1)
            return StreamingResponse(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        completion = await _unless_disconnected(request, _complete(events, body))
        return JSONResponse(completion) if completion else Response(status_code=CLIENT_CLOSED_REQUEST)

    return router


def _completion(body: ChatCompletionRequest, first: ChatEvent) -> Completion:
    assert isinstance(first, TurnStarted)
    has_usage = body.stream_options is not None and body.stream_options.include_usage
    return Completion(body.model, first, body.is_json, bool(body.logprobs), has_usage)


async def _complete(events: AsyncGenerator[ChatEvent, None], body: ChatCompletionRequest) -> dict[str, Any]:
    async with aclosing(events):
        completion = _completion(body, await anext(events))
        async for event in events:
            if isinstance(event, TurnFinished):
                return completion.whole(event)
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
        yield "data: [DONE]\n\n"


def _sse(record: dict[str, Any]) -> str:
    return f"data: {json.dumps(record)}\n\n"  # escaped, so that no client takes a U+2028 for the end of a line


def _documented_answer() -> dict[str, Any]:
    """The response in OpenAPI: a completion, or with `stream` server-sent events, as FastAPI describes its own."""
    said = {"anyOf": [_self_contained(ChatCompletionChunk), _self_contained(ErrorResponse)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": said}
    event = {"type": "object", "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}}, "required": ["data"]}
    description = "The answer; with `stream`, server-sent events, of which the last is `[DONE]` or an error"
    return {
        "model": ChatCompletion,
        "description": description,
        "content": {"text/event-stream": {"itemSchema": event}},
    }


def _self_contained(model: type[BaseModel]) -> Any:
    """A model's JSON schema without `$defs`, which have no place within an OpenAPI document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs")

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolved(definitions[node["$ref"].rpartition("/")[2]])
        return {key: resolved(value) for key, value in node.items()}

    return resolved(schema)
