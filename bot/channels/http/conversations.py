"""Conversations whose history the server holds: create, list, continue, follow, cancel.

A message is durable before it is acknowledged, and is answered by whichever process is free; its turn is told as events, which
any process can give from any place. A client that goes away cancels nothing.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse

from bot import turn_events
from bot.access.roles import Principal
from bot.app import Service
from bot.channels.http.access import allow
from bot.channels.http.conversation_schema import (
    CancelRequest,
    CancelResult,
    ConversationObject,
    NewConversation,
    NewMessage,
    Page,
    QueuedMessage,
    TurnObject,
)
from bot.channels.http.disconnects import CLIENT_CLOSED_REQUEST, unless_disconnected
from bot.channels.http.errors import failure_response
from bot.channels.http.event_stream import EVENT_STREAM, event_response
from bot.channels.http.idempotency import IdempotencyKey, request_key
from bot.channels.http.limits import TurnGate
from bot.channels.http.openapi import IDEMPOTENT, RATE_LIMITED
from bot.channels.http.paths import ConversationId, Limit, Order, TurnNumber
from bot.channels.http.schema import MAX_ID_CHARS, MAX_PERSON_CHARS, Text
from bot.conversations.events import Event
from bot.conversations.idempotency import RequestKey
from bot.conversations.inbox import InboxMessage
from bot.conversations.records import ConversationRecord, TurnFilter, new_id
from prompt_bank.errors import UnknownDomainError

_ANYBODY = allow("chat", "agent")


def conversation_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["conversations"])

    async def own(conversation_id: str, principal: Principal) -> ConversationRecord:
        """Raises UnknownConversationError for another caller's, as for one that is not there, or PermissionDeniedError."""
        record = await service.reader.conversation(conversation_id, principal.visible_scope)
        principal.check_conversation(record.scope, record.domain)
        return record

    @router.post("/v1/conversations", status_code=201, responses=IDEMPOTENT)
    async def create_conversation(
        body: NewConversation, principal: Annotated[Principal, _ANYBODY], idempotency_key: IdempotencyKey = None
    ) -> ConversationObject:
        """Begin a conversation. It has no messages yet."""
        await _check_domain(service, principal, body.domain)

        async def create() -> dict[str, Any]:
            caller = principal.caller(body.user)
            state = await service.conversations.create(caller, domain=body.domain, metadata=body.metadata)
            assert state is not None
            return ConversationObject.of(await service.reader.conversation(state.id)).model_dump()

        key = request_key(principal, idempotency_key, "create conversation", body)
        return ConversationObject(**await service.idempotency.once(key, create))

    @router.get("/v1/conversations")
    async def list_conversations(
        principal: Annotated[Principal, _ANYBODY],
        user: Annotated[Text | None, Query(max_length=MAX_PERSON_CHARS)] = None,
        limit: Limit = 20,
        after: Annotated[Text | None, Query(max_length=MAX_ID_CHARS, description="a conversation's id")] = None,
        order: Order = "desc",
    ) -> Page[ConversationObject]:
        """One's own conversations, of one `user` if given; those of everybody for agents and admins."""
        records = await service.reader.conversations(
            limit + 1, scope=principal.visible_scope, person=user, after=after, descending=order == "desc"
        )
        return Page.of([ConversationObject.of(record) for record in records], [record.id for record in records], limit)

    @router.get("/v1/conversations/{conversation_id}")
    async def get_conversation(
        conversation_id: ConversationId, principal: Annotated[Principal, _ANYBODY]
    ) -> ConversationObject:
        """One of them."""
        return ConversationObject.of(await own(conversation_id, principal))

    @router.get("/v1/conversations/{conversation_id}/turns")
    async def list_conversation_turns(
        conversation_id: ConversationId,
        principal: Annotated[Principal, _ANYBODY],
        limit: Limit = 20,
        after: TurnNumber = None,
        order: Order = "asc",
    ) -> Page[TurnObject]:
        """What was said, oldest first unless `order` is desc."""
        record = await own(conversation_id, principal)
        turns = await service.reader.turns(
            TurnFilter(conversation_id=record.id, domains=principal.readable_domains),
            limit + 1,
            after=after,
            descending=order == "desc",
        )
        objects = [TurnObject(**turn_events.described(turn.turn)) for turn in turns]
        return Page.of(objects, [str(turn.number) for turn in turns], limit)

    @router.post(
        "/v1/conversations/{conversation_id}/messages",
        response_model=None,
        responses={
            200: {"model": TurnObject, "content": EVENT_STREAM, "description": "The turn, or with `stream` its events"},
            202: {"model": QueuedMessage, "description": "With `background`: it is durable and will be answered"},
            **IDEMPOTENT,
            **RATE_LIMITED,
        },
    )
    async def create_message(
        conversation_id: ConversationId,
        body: NewMessage,
        request: Request,
        principal: Annotated[Principal, _ANYBODY],
        gate: TurnGate,
        idempotency_key: IdempotencyKey = None,
    ) -> Response:
        """Say the next thing. It will be answered once it is acknowledged, in order, also when this client goes away.

        With an idempotency key, sending it again gives the same turn. A stream's `X-Message-Id` is what to cancel.
        """
        service.chat.check_text(body.text)  # before it is durable: what is refused takes no room in the inbox
        record = await own(conversation_id, principal)
        await _check_domain(service, principal, body.domain)
        await gate.enter(principal, record.person)
        key = request_key(principal, idempotency_key, f"message in {record.id}", body)
        queued, is_new = await _queue(service, record, body, principal, key)
        if body.background:
            return JSONResponse(queued.model_dump(), 202)
        events = service.follower.message(record.id, queued.id, queued.after, is_new)
        if body.stream:
            return event_response(events, queued.id)
        answer = await unless_disconnected(request, _turn_response(events))
        return answer or Response(status_code=CLIENT_CLOSED_REQUEST)

    @router.get(
        "/v1/conversations/{conversation_id}/events",
        response_model=None,
        responses={200: {"content": EVENT_STREAM, "description": "Server-sent events"}, **RATE_LIMITED},
    )
    async def follow_conversation(
        conversation_id: ConversationId,
        principal: Annotated[Principal, _ANYBODY],
        gate: TurnGate,
        after: Annotated[Text | None, Query(max_length=64, description="an event's id; new events only when left out")] = None,
        last_event_id: Annotated[Text | None, Header(max_length=64, description="as `after`; sent by EventSource")] = None,
    ) -> Response:
        """Its events as they happen, kept for five minutes. An answer that another process began anew starts again."""
        record = await own(conversation_id, principal)
        await gate.follow(principal)
        place = last_event_id or after or await service.events.last_id(record.id)
        return event_response(service.follower.conversation(record.id, place))

    @router.post("/v1/conversations/{conversation_id}/cancel")
    async def cancel_message(
        conversation_id: ConversationId, principal: Annotated[Principal, _ANYBODY], body: CancelRequest | None = None
    ) -> CancelResult:
        """Stop the answer that is under way, in whichever process; what was said so far stays in the conversation. Or, given a
        message that still waits, have it not answered at all.
        """
        record = await own(conversation_id, principal)
        return CancelResult(message_id=await service.inbox.stop(record.id, body.message_id if body else None))

    return router


async def _check_domain(service: Service, principal: Principal, domain: str | None) -> None:
    """Raises PermissionDeniedError or UnknownDomainError."""
    if domain is None:
        return
    principal.check_domain(domain)
    live = await service.chat.cards()
    if domain not in live:
        raise UnknownDomainError.not_live(domain, live)


async def _queue(
    service: Service, record: ConversationRecord, body: NewMessage, principal: Principal, key: RequestKey | None
) -> tuple[QueuedMessage, bool]:
    """The message in its inbox, and whether it is there for the first time."""
    after = await service.events.last_id(record.id)
    message_id = await service.idempotency.id_for(key) if key else new_id()
    limits = service.limiter.concurrency(principal, record.person) if service.limiter else {}
    message = InboxMessage(message_id, record.id, body.text, time.time(), body.settings(principal.domains), tuple(limits))
    is_new = await service.inbox.put(message, limits)
    # One that was sent again may have begun: its events from the first on.
    return QueuedMessage(id=message_id, conversation_id=record.id, after=after if is_new else "0"), is_new


async def _turn_response(events: AsyncGenerator[Event | None, None]) -> Response:
    async with aclosing(events):
        async for event in events:
            if event is not None and "turn" in event.data:
                return JSONResponse(TurnObject(**event.data["turn"]).model_dump())
            if event is not None and event.data["type"] == "turn.failed":
                return failure_response(event.data["error"]["code"], event.data["error"]["message"])
    raise AssertionError("a turn ends")
