"""The events of held conversations on the wire: what each holds, and the stream of them."""

import json
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from contextlib import aclosing
from typing import Any, Literal

from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from bot.channels.http.conversation_schema import TurnObject
from bot.channels.http.errors import api_error
from bot.channels.http.openapi import self_contained
from bot.channels.http.schema import ApiError, Routing
from bot.conversations.events import Event
from prompt_bank.errors import FrontdeskError


class StartedEvent(BaseModel):
    """It comes again when another process had to begin anew: what was streamed before is void then."""

    type: Literal["turn.started"]
    message_id: str
    turn_id: str
    domain: str | None
    version: int | None
    digest: str | None
    disclaimer: str
    routing: Routing


class DeltaEvent(BaseModel):
    type: Literal["turn.delta"]
    message_id: str
    text: str


class EndedEvent(BaseModel):
    type: Literal["turn.completed", "turn.cancelled"]
    message_id: str
    turn: TurnObject


class TurnFailure(BaseModel):
    code: str
    message: str


class FailedEvent(BaseModel):
    type: Literal["turn.failed"]
    message_id: str
    error: TurnFailure


class LostEvent(BaseModel):
    """Some events between are not kept any more; the conversation's turns have what was said in them."""

    type: Literal["events.lost"]
    message_id: None


class ErrorEvent(BaseModel):
    """The last event of this response, not of the conversation: go on from the last id."""

    type: Literal["error"]
    error: ApiError


_KINDS = (StartedEvent, DeltaEvent, EndedEvent, FailedEvent, LostEvent, ErrorEvent)
_DATA = {
    "type": "string",
    "contentMediaType": "application/json",
    "contentSchema": {"anyOf": [self_contained(kind) for kind in _KINDS]},
}
_FIELDS = {"id": {"type": "string"}, "event": {"type": "string"}, "data": _DATA}
EVENT_STREAM: dict[str, Any] = {
    "text/event-stream": {"itemSchema": {"type": "object", "properties": _FIELDS, "required": ["event", "data"]}}
}


def event_response(events: AsyncGenerator[Event | None, None], message_id: str | None = None) -> StreamingResponse:
    """`message_id` is of the message whose turn is streamed: it may have to wait, and can be cancelled meanwhile."""
    response = stream_response(_sse(events))
    if message_id is not None:
        response.headers["X-Message-Id"] = message_id
    return response


def stream_response(lines: AsyncIterable[str] | Iterable[str]) -> StreamingResponse:
    """Server-sent events that no proxy keeps or gathers."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


async def _sse(events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[str, None]:
    """In the form of the HTML standard, section 9.2; a comment is a sign of life."""
    yield ": here\n\n"
    async with aclosing(events):
        try:
            async for event in events:
                if event is None:
                    yield ": here\n\n"
                else:
                    yield f"id: {event.id}\nevent: {event.data['type']}\ndata: {json.dumps(event.data)}\n\n"
        except FrontdeskError as error:  # the response has begun; the client resumes from the last id
            yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': api_error(error).model_dump()})}\n\n"
