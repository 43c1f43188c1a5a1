"""Domains and their versions: what answers, what else there is, and moving the live pointer."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from bot.access.roles import Principal
from bot.app import Service
from bot.channels.http.access import allow
from bot.channels.http.openapi import CONFLICT
from bot.channels.http.paths import DomainPath, VersionNumber
from bot.channels.http.schema import OwnBody, Text
from prompt_bank.errors import UnknownDomainError
from prompt_bank.pointers import PointerTable
from prompt_bank.version import Version


class DomainObject(BaseModel):
    """A live domain. `canary` and `shadow` are versions beside the live one."""

    id: str
    object: Literal["domain"] = "domain"
    title: str
    description: str
    suggested_prompts: list[str]
    live: int
    canary: int | None
    canary_share: float | None
    shadow: int | None


class DomainList(BaseModel):
    object: Literal["list"] = "list"
    data: list[DomainObject]


class VersionObject(BaseModel):
    """A version of a domain. `use` is live, canary, shadow, retired or empty; `digest` null for one answered by its brief."""

    object: Literal["domain.version"] = "domain.version"
    domain: str
    version: int
    use: str
    created_at: str
    actor: str
    reason: str
    parent: int | None
    kind: str | None
    num_virtual_tokens: int | None
    digest: str | None
    base_model: str
    metrics: dict[str, dict[str, Any]]


class VersionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[VersionObject]


class Reason(OwnBody):
    reason: Text = Field(default="", max_length=500, description="kept in the domain's history")


def domain_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["domains"])

    @router.get("/v1/domains")
    async def list_domains(principal: Annotated[Principal, allow("chat", "agent", "trainer")]) -> DomainList:
        """The live domains, of those that the key may use."""
        table = await service.bank.claim_table()
        return DomainList(data=[await _described(service, domain, table) for domain in _live(service, table, principal)])

    @router.get("/v1/domains/{domain}")
    async def get_domain(
        domain: DomainPath, principal: Annotated[Principal, allow("chat", "agent", "trainer")]
    ) -> DomainObject:
        """One of them."""
        principal.check_domain(domain)
        table = await service.bank.claim_table()
        live = _live(service, table, principal)
        if domain not in live:
            raise UnknownDomainError.not_live(domain, live)
        return await _described(service, domain, table)

    @router.get("/v1/domains/{domain}/versions")
    async def list_versions(domain: DomainPath, principal: Annotated[Principal, allow("trainer")]) -> VersionList:
        """Every version of a domain, newest first."""
        principal.check_domain(domain)
        table = await service.bank.claim_table()
        numbers = await service.bank.versions(domain)
        if not numbers:
            raise UnknownDomainError(f"no domain {domain!r} in the bank; GET /v1/domains lists those that are live")
        return VersionList(data=[_version(await service.bank.version(domain, number), table) for number in reversed(numbers)])

    @router.get("/v1/domains/{domain}/versions/{version}")
    async def get_version(
        domain: DomainPath, version: VersionNumber, principal: Annotated[Principal, allow("trainer")]
    ) -> VersionObject:
        """One of them."""
        principal.check_domain(domain)
        return _version(await service.bank.version(domain, version), await service.bank.claim_table())

    @router.post("/v1/domains/{domain}/versions/{version}/promote", responses=CONFLICT)
    async def promote(
        domain: DomainPath,
        version: VersionNumber,
        principal: Annotated[Principal, allow("trainer")],
        body: Reason | None = None,
    ) -> VersionObject:
        """Make a version live. Every turn that is claimed after the answer is answered by it."""
        principal.check_domain(domain)
        table = await service.bank.promote(domain, version, principal.name, body.reason if body else "")
        await service.recorded(principal.name, "promote", f"domain:{domain}", {"version": version})
        return _version(await service.bank.version(domain, version), table)

    @router.post("/v1/domains/{domain}/rollback", responses=CONFLICT)
    async def rollback(
        domain: DomainPath, principal: Annotated[Principal, allow("trainer")], body: Reason | None = None
    ) -> VersionObject:
        """Make the previous live version live again."""
        principal.check_domain(domain)
        table = await service.bank.rollback(domain, service.model.fingerprint, principal.name, body.reason if body else "")
        live = table.pointers(domain, service.model.fingerprint).live
        assert live is not None
        await service.recorded(principal.name, "rollback", f"domain:{domain}", {"version": live})
        return _version(await service.bank.version(domain, live), table)

    return router


def _live(service: Service, table: PointerTable, principal: Principal) -> list[str]:
    live = sorted(table.live_versions(service.model.fingerprint))
    return [domain for domain in live if principal.domains is None or domain in principal.domains]


async def _described(service: Service, domain: str, table: PointerTable) -> DomainObject:
    pointers = table.pointers(domain, service.model.fingerprint)
    assert pointers.live is not None
    card = (await service.bank.version(domain, pointers.live)).card
    return DomainObject(
        id=domain,
        title=card.title,
        description=card.description,
        suggested_prompts=list(card.suggested_prompts),
        live=pointers.live,
        canary=pointers.canary.version if pointers.canary else None,
        canary_share=pointers.canary.share if pointers.canary else None,
        shadow=pointers.shadow,
    )


def _version(version: Version, table: PointerTable) -> VersionObject:
    manifest = version.manifest
    prompt, record = manifest.soft_prompt, table.record(manifest.domain)
    use = table.pointers(manifest.domain, manifest.base_model.fingerprint).use_of(manifest.version)
    return VersionObject(
        domain=manifest.domain,
        version=manifest.version,
        use="retired" if manifest.version in record.retired else use,
        created_at=manifest.created_at.isoformat(),
        actor=manifest.actor,
        reason=manifest.reason,
        parent=manifest.parent,
        kind=prompt.kind if prompt else None,
        num_virtual_tokens=prompt.num_virtual_tokens if prompt else None,
        digest=prompt.digest if prompt else None,
        base_model=manifest.base_model.name,
        metrics=manifest.training.metrics if manifest.training else {},
    )
