"""The HTTP application. Thin: its routes and what they say of themselves."""

from typing import Annotated, Any

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from bot.access.roles import Principal
from bot.app import Service
from bot.channels.http.access import PUBLIC, allow, guard
from bot.channels.http.completions import completion_routes
from bot.channels.http.conversations import conversation_routes
from bot.channels.http.domains import domain_routes
from bot.channels.http.errors import install_error_handlers
from bot.channels.http.idempotency import IdempotencyKey, request_key
from bot.channels.http.limits import LimitHeaders
from bot.channels.http.openapi import ERRORS, IDEMPOTENT, describe
from bot.channels.http.records import record_routes
from bot.channels.http.schema import ErrorResponse, FeedbackRequest
from prompt_bank.card import ROUTED
from prompt_bank.errors import FrontdeskError, UnknownDomainError

_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": dict[str, str] | ErrorResponse, "description": "Not now; what is amiss"}
}
_EXPOSITION: dict[int | str, dict[str, Any]] = {200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}}


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="Frontdesk",
        description="One frozen language model, a trained soft prompt for every domain.",
        responses=ERRORS,
        redoc_url=None,
    )
    install_error_handlers(app)
    app.state.entrance, app.state.limiter = service.entrance, service.limiter
    app.add_middleware(LimitHeaders)

    app.include_router(completion_routes(service))
    app.include_router(conversation_routes(service))
    app.include_router(domain_routes(service))
    app.include_router(record_routes(service))

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
            raise UnknownDomainError.not_live(model, models)
        return models[model]

    @app.post("/v1/feedback", status_code=201, tags=["feedback"], responses=IDEMPOTENT)
    async def create_feedback(
        body: FeedbackRequest,
        principal: Annotated[Principal, allow("chat", "agent")],
        idempotency_key: IdempotencyKey = None,
    ) -> dict[str, str]:
        """Vote on one answer, and tell what it should have been. A `chat` key may do so for its own answers."""

        async def add() -> dict[str, str]:
            await service.conversations.add_feedback(
                body.turn_id,
                body.vote,
                body.reason,
                body.correction,
                author=principal.id,
                scope=principal.visible_scope,
                domains=principal.readable_domains,
            )
            return {"turn_id": body.turn_id}

        return await service.idempotency.once(request_key(principal, idempotency_key, "feedback", body), add)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    @app.get("/livez", tags=["operations"], dependencies=[allow(PUBLIC)])
    async def livez() -> dict[str, str]:
        """Whether the process answers at all."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["operations"], dependencies=[allow(PUBLIC)], responses=_READY)
    async def readyz() -> JSONResponse:
        """Whether a message would be answered now."""
        checks = await _readiness(service)
        return JSONResponse(checks, 200 if all(state == "ok" for state in checks.values()) else 503)

    @app.get("/metrics", tags=["operations"], dependencies=[allow("admin")], response_class=Response, responses=_EXPOSITION)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.telemetry.exposition(), media_type=CONTENT_TYPE_LATEST)

    guard(app)
    describe(app)
    return app


async def _models(service: Service, principal: Principal) -> dict[str, dict[str, Any]]:
    cards = await service.chat.cards(principal.domains)
    described = {ROUTED: "the router chooses the domain"} | {name: card.description for name, card in cards.items()}
    return {
        name: {"id": name, "object": "model", "created": 0, "owned_by": "frontdesk", "description": description}
        for name, description in described.items()
    }


async def _readiness(service: Service) -> dict[str, str]:
    checks = {
        "engine": "ok" if service.engine.is_running else "stopped",
        "bank": "ok",
        "conversations": "ok",
        "inbox": service.worker.claim_error or "ok",
    }
    try:
        await service.bank.claim_table()
    except FrontdeskError as error:
        checks["bank"] = type(error).__name__
    try:
        await service.conversations.check()
    except FrontdeskError as error:
        checks["conversations"] = type(error).__name__
    return checks
