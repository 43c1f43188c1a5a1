"""What operators and trainers read: turns by search, the export, the audit."""

from collections.abc import AsyncGenerator
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from bot.access.roles import Principal
from bot.app import Service
from bot.channels.http.access import allow
from bot.channels.http.conversation_schema import LoggedTurnObject, Page
from bot.channels.http.paths import DomainQuery, Limit, Moment, Order, TurnNumber
from bot.channels.http.schema import Text
from bot.conversations import audit
from bot.conversations.records import FinishReason, TurnFilter, Vote
from prompt_bank.conversation import record_lines

_JSONL: dict[str, Any] = {"application/jsonl": {"schema": {"type": "string"}}}


class AuditObject(BaseModel):
    """`object` is what was changed, as `kind:id`."""

    at: datetime
    actor: str
    action: str
    object: str
    detail: dict[str, Any]


class AuditList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AuditObject]


def record_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["records"])

    @router.get("/v1/turns")
    async def search_turns(
        principal: Annotated[Principal, allow("agent", "trainer")],
        text: Annotated[Text | None, Query(min_length=1, max_length=200, description="words in question or answer")] = None,
        domain: DomainQuery = None,
        version: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
        vote: Vote | None = None,
        finish_reason: FinishReason | None = None,
        conversation_id: Annotated[Text | None, Query(max_length=64)] = None,
        since: Moment | None = None,
        until: Moment | None = None,
        limit: Limit = 20,
        after: TurnNumber = None,
        order: Order = "desc",
    ) -> Page[LoggedTurnObject]:
        """Turns of all conversations that pass every filter that is given."""
        if domain is not None:
            principal.check_domain(domain)
        wanted = TurnFilter(
            conversation_id=conversation_id,
            text=text,
            domains=frozenset({domain}) if domain is not None else principal.domains,
            version=version,
            vote=vote,
            finish_reason=finish_reason,
            since=since,
            until=until,
        )
        turns = await service.reader.turns(wanted, limit + 1, after=after, descending=order == "desc")
        return Page.of([LoggedTurnObject.of(turn) for turn in turns], [str(turn.number) for turn in turns], limit)

    @router.get("/v1/export", response_model=None, responses={200: {"content": _JSONL}})
    async def export(principal: Annotated[Principal, allow("trainer")], domain: DomainQuery = None) -> Response:
        """Logged conversations as JSON lines, in the form that `frontdesk train --data` reads."""
        if domain is not None:
            principal.check_domain(domain)
        domains = frozenset({domain}) if domain is not None else principal.domains
        await service.recorded(principal.name, "export", "log:turns", {"domains": sorted(domains or ())})
        return StreamingResponse(_lines(service, domains), media_type="application/jsonl")

    @router.get("/v1/audit")
    async def read_audit(principal: Annotated[Principal, allow("admin")], limit: Limit = 20) -> AuditList:
        """Who did what to what, newest first."""
        async with service.database.reading() as connection:
            entries = await audit.read(connection, limit)
        return AuditList(data=[AuditObject(**asdict(entry)) for entry in entries])

    return router


async def _lines(service: Service, domains: frozenset[str] | None) -> AsyncGenerator[str, None]:
    async for conversation in service.reader.export(domains):
        for line in record_lines([conversation]):
            yield f"{line}\n"
