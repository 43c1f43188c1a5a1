"""The pointer table: which version of each domain answers, for each base model. Pure values; nothing here reads or writes.

A table is the fold of all changes ever made, oldest first, so that a store keeps changes only, each with time, actor and
reason, and the history is the state. `check` says whether a change may be made; `with_change` makes it.
"""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from prompt_bank.errors import UnknownDomainError, UnknownVersionError, VersionInUseError
from prompt_bank.manifest import Manifest

Action = Literal["promote", "rollback", "canary", "end_canary", "shadow", "end_shadow", "retire", "restore", "delete"]
Share = Annotated[float, Field(gt=0, le=1)]

_MAX_PREVIOUS = 20


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PointerChange(_Value):
    """Who changed what, when and why. `version` may be left out where the domain alone says it: see `resolved`."""

    action: Action
    domain: str
    fingerprint: str
    version: int | None = None
    share: Share | None = None
    actor: str
    reason: str
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    deleted: Manifest | None = None  # what a deleted version was: its files are gone, its record is not


class Canary(_Value):
    """A version that answers a share of the conversations."""

    version: int
    share: Share


class DomainPointers(_Value):
    """The versions of one domain for one base model; `previous` are earlier live ones, newest last."""

    live: int | None = None
    canary: Canary | None = None
    shadow: int | None = None
    previous: tuple[int, ...] = ()

    def uses(self) -> dict[int, str]:
        """Version to what it is in use as."""
        named = {self.shadow: "shadow", self.canary.version if self.canary else None: "canary", self.live: "live"}
        return {version: use for version, use in named.items() if version is not None}

    def use_of(self, version: int) -> str:
        """What a version is in use as, for people; empty when it is not."""
        uses = ["live"] if version == self.live else []
        if self.canary is not None and version == self.canary.version:
            uses.append(f"canary {self.canary.share:.4g}")
        return ", ".join([*uses, "shadow"] if version == self.shadow else uses)

    def _with_live(self, version: int, previous: tuple[int, ...]) -> "DomainPointers":
        canary = None if self.canary and self.canary.version == version else self.canary
        shadow = None if self.shadow == version else self.shadow
        return DomainPointers(live=version, canary=canary, shadow=shadow, previous=_distinct(previous, version))

    def promoted(self, version: int) -> "DomainPointers":
        if version == self.live:
            return self
        return self._with_live(version, self.previous if self.live is None else (*self.previous, self.live))

    def rolled_back(self) -> "DomainPointers":
        return self._with_live(self.previous[-1], self.previous[:-1])

    def without(self, version: int) -> "DomainPointers":
        """Where the live version goes, canary and shadow go with it: nobody is routed there."""
        live = None if self.live == version else self.live
        if live is None:
            return DomainPointers(previous=_distinct(tuple(n for n in self.previous if n != version), None))
        previous = tuple(number for number in self.previous if number != version)
        return DomainPointers(
            live=live,
            canary=None if self.canary and self.canary.version == version else self.canary,
            shadow=None if self.shadow == version else self.shadow,
            previous=_distinct(previous, live),
        )


def _distinct(previous: tuple[int, ...], live: int | None) -> tuple[int, ...]:
    """Without a step that leads from a version to itself, as one can be left when what was between is retired."""
    followers = (*previous[1:], live)
    return tuple(number for number, follower in zip(previous, followers, strict=False) if number != follower)[-_MAX_PREVIOUS:]


class DomainRecord(_Value):
    """All pointers of one domain: by base-model fingerprint, and the versions that may not be pointed at."""

    by_model: dict[str, DomainPointers] = {}
    retired: tuple[int, ...] = ()
    deleted: tuple[int, ...] = ()


class PointerTable(_Value):
    """The state after `epoch` changes, the last of which was `change`."""

    epoch: int = 0
    domains: dict[str, DomainRecord] = {}
    change: PointerChange | None = None

    def record(self, domain: str) -> DomainRecord:
        return self.domains.get(domain, DomainRecord())

    def pointers(self, domain: str, fingerprint: str) -> DomainPointers:
        return self.record(domain).by_model.get(fingerprint, DomainPointers())

    def live_versions(self, fingerprint: str) -> dict[str, int]:
        """Domain to live version for one base model."""
        return {
            domain: pointers.live
            for domain, record in self.domains.items()
            if (pointers := record.by_model.get(fingerprint)) is not None and pointers.live is not None
        }

    def uses_of(self, domain: str, version: int) -> dict[str, str]:
        """Fingerprint to what the version is in use as there."""
        uses = {fingerprint: pointers.uses() for fingerprint, pointers in self.record(domain).by_model.items()}
        return {fingerprint: use[version] for fingerprint, use in uses.items() if version in use}

    def versions_in_use(self) -> Iterator[tuple[str, int]]:
        for domain, record in self.domains.items():
            for pointers in record.by_model.values():
                yield from ((domain, version) for version in pointers.uses())

    def resolved(self, change: PointerChange) -> PointerChange:
        """`change` with the version it is about, where the domain alone says it and there is one."""
        pointers = self.pointers(change.domain, change.fingerprint)
        implied = {
            "rollback": pointers.previous[-1] if pointers.previous else None,
            "end_canary": pointers.canary.version if pointers.canary else None,
            "end_shadow": pointers.shadow,
        }
        return change.model_copy(update={"version": implied[change.action]}) if change.action in implied else change

    def check(self, change: PointerChange) -> None:
        """Raises UnknownDomainError, UnknownVersionError or VersionInUseError when this table does not allow `change`."""
        _CHECKS[change.action](self, change)

    def with_change(self, change: PointerChange) -> "PointerTable":
        record = self.record(change.domain)
        pointers = record.by_model.get(change.fingerprint, DomainPointers())
        version = change.version or 0
        retired, deleted = record.retired, record.deleted
        by_model = dict(record.by_model)
        match change.action:
            case "promote":
                by_model[change.fingerprint] = pointers.promoted(version)
            case "rollback":
                by_model[change.fingerprint] = pointers.rolled_back()
            case "canary":
                canary = Canary(version=version, share=change.share or 1.0)
                by_model[change.fingerprint] = pointers.model_copy(update={"canary": canary})
            case "shadow":
                by_model[change.fingerprint] = pointers.model_copy(update={"shadow": version})
            case "end_canary":
                by_model[change.fingerprint] = pointers.model_copy(update={"canary": None})
            case "end_shadow":
                by_model[change.fingerprint] = pointers.model_copy(update={"shadow": None})
            case "retire":
                by_model = {fingerprint: each.without(version) for fingerprint, each in by_model.items()}
                retired = tuple(sorted({*retired, version}))
            case "restore":
                retired = tuple(number for number in retired if number != version)
            case "delete":
                by_model = {fingerprint: each.without(version) for fingerprint, each in by_model.items()}
                retired = tuple(number for number in retired if number != version)
                deleted = tuple(sorted({*deleted, version}))
        changed = DomainRecord(by_model=by_model, retired=retired, deleted=deleted)
        return PointerTable(epoch=self.epoch + 1, domains={**self.domains, change.domain: changed}, change=change)


def check_servable(table: PointerTable, domain: str, version: int | None) -> None:
    """Raises UnknownVersionError or VersionInUseError when no pointer may be set to this version."""
    record = table.record(domain)
    if version in record.deleted:
        raise UnknownVersionError(f"{domain} v{version} was deleted; publish it again as a new version")
    if version in record.retired:
        raise VersionInUseError(f"{domain} v{version} is retired; `frontdesk bank restore {domain} {version}` first")


def _check_promote(table: PointerTable, change: PointerChange) -> None:
    check_servable(table, change.domain, change.version)


def _check_beside_live(table: PointerTable, change: PointerChange) -> None:
    check_servable(table, change.domain, change.version)
    live = table.pointers(change.domain, change.fingerprint).live
    if live is None:
        raise UnknownDomainError(f"{change.domain} has no live version for this base model; promote one first")
    if live == change.version:
        raise VersionInUseError(
            f"{change.domain} v{live} is the live version; a {change.action} is another one that is compared with it"
        )


def _check_rollback(table: PointerTable, change: PointerChange) -> None:
    pointers = table.pointers(change.domain, change.fingerprint)
    if not pointers.previous:
        now = f"v{pointers.live} is live" if pointers.live else "none is live"
        raise UnknownVersionError(f"{change.domain} has no previous live version to go back to ({now}); promote one")


def _check_end(table: PointerTable, change: PointerChange) -> None:
    pointers = table.pointers(change.domain, change.fingerprint)
    if (pointers.canary if change.action == "end_canary" else pointers.shadow) is None:
        raise UnknownVersionError(f"{change.domain} has no {change.action.removeprefix('end_')} version; nothing to end")


def _check_retire(table: PointerTable, change: PointerChange) -> None:
    record = table.record(change.domain)
    if change.version in (*record.retired, *record.deleted):
        raise UnknownVersionError(f"{change.domain} v{change.version} is retired or deleted already")


def _check_restore(table: PointerTable, change: PointerChange) -> None:
    if change.version not in table.record(change.domain).retired:
        raise UnknownVersionError(f"{change.domain} v{change.version} is not retired; nothing to restore")


def _check_delete(table: PointerTable, change: PointerChange) -> None:
    if change.version in table.record(change.domain).deleted:
        raise UnknownVersionError(f"{change.domain} v{change.version} was deleted already")
    for use in table.uses_of(change.domain, change.version or 0).values():
        way_out = "promote another or retire it first" if use == "live" else f"end the {use} first"
        raise VersionInUseError(f"{change.domain} v{change.version} is the {use} version and cannot be deleted; {way_out}")


_CHECKS = {
    "promote": _check_promote,
    "rollback": _check_rollback,
    "canary": _check_beside_live,
    "shadow": _check_beside_live,
    "end_canary": _check_end,
    "end_shadow": _check_end,
    "retire": _check_retire,
    "restore": _check_restore,
    "delete": _check_delete,
}


def is_in_canary(conversation_id: str, candidate: str, share: float) -> bool:
    """Whether a conversation belongs to the `share` of them that `candidate` (a digest) answers.

    Stable for a conversation, and raising the share keeps its members; another candidate draws anew.
    """
    drawn = hashlib.sha256(f"{conversation_id} {candidate}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") < share * 2**64
