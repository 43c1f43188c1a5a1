"""What operators and trainers read and change: turns by search, the export, domains with their versions, the audit."""

from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from bot.access.roles import Principal
from bot.app import Service
from bot.channels.http.access import allow
from bot.channels.http.conversation_schema import LoggedTurnObject, Page
from bot.channels.http.paths import Limit, Order
from bot.conversations.records import FinishReason, TurnFilter, Vote
from prompt_bank.conversation import record_lines

_JSONL: dict[str, Any] = {"application/jsonl": {"schema": {"type": "string"}}}


def record_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["records"])

    @router.get("/v1/turns")
    async def search_turns(
        principal: Annotated[Principal, allow("agent", "trainer")],
        text: Annotated[str | None, Query(min_length=1, max_length=200, description="words in question or answer")] = None,
        domain: Annotated[str | None, Query(max_length=48)] = None,
        version: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
        vote: Vote | None = None,
        finish_reason: FinishReason | None = None,
        conversation_id: Annotated[str | None, Query(max_length=64)] = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: Limit = 20,
        after: Annotated[int | None, Query(ge=0, lt=2**63, description="a turn's number")] = None,
        order: Order = "desc",
    ) -> Page[LoggedTurnObject]:
        """Turns of all conversations that pass every filter that is given."""
        wanted = TurnFilter(None, conversation_id, text, domain, version, vote, finish_reason, since, until)
        turns = await service.reader.turns(wanted, limit + 1, after=after, descending=order == "desc")
        return Page.of([LoggedTurnObject.of(turn) for turn in turns], [str(turn.number) for turn in turns], limit)

    @router.get("/v1/export", response_model=None, responses={200: {"content": _JSONL}})
    async def export(
        principal: Annotated[Principal, allow("trainer")], domain: Annotated[str | None, Query(max_length=48)] = None
    ) -> Response:
        """Logged conversations as JSON lines, in the form that `frontdesk train --data` reads."""
        await service.audit.record(principal.name, "export", domain or "all domains")
        return StreamingResponse(_lines(service, domain), media_type="application/jsonl")

    return router


async def _lines(service: Service, domain: str | None) -> AsyncGenerator[str, None]:
    async for conversation in service.reader.export(domain):
        for line in record_lines([conversation]):
            yield f"{line}\n"
