"""The prompt bank: publishes versions, moves pointers, and gives a turn the version that answers it when it is claimed.

Never stale: the table that a turn is claimed with is none older than the last committed change (see current_table). Blobs are
cached by digest only, so a cached soft prompt cannot be the wrong one.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from prompt_bank.cache import ReadStats, RedisCache, TableClaim, asking_redis
from prompt_bank.card import Card
from prompt_bank.current_table import CurrentTable
from prompt_bank.errors import (
    BankError,
    PointerConflictError,
    RedisUnavailableError,
    UnknownDomainError,
    VersionInUseError,
)
from prompt_bank.history import HistoryEntry, read_history
from prompt_bank.manifest import Manifest
from prompt_bank.pointers import Action, PointerChange, PointerTable, check_servable, is_in_canary
from prompt_bank.servable import check_chat_format, made_for, readable_manifest
from prompt_bank.settings import WhenRedisIsDown
from prompt_bank.soft_prompt import SoftPrompt, check_soft_prompt
from prompt_bank.store import Store
from prompt_bank.version import Draft, ServedModel, Version, check_served_model

log = logging.getLogger(__name__)

_NUM_COMMIT_TRIES = 20
_ALONE_S = 120.0  # after which one that died is waited for no longer
_POINTING = ("promote", "rollback", "canary", "shadow")  # after which another version answers


class Bank:
    """Used from one event loop. `when_redis_is_down` says whether a claim then fails or takes the last known table."""

    def __init__(self, store: Store, cache: RedisCache, when_redis_is_down: WhenRedisIsDown = "refuse") -> None:
        self.id = store.id  # keeps installations apart that share one Redis
        self._store, self.cache = store, cache
        self._current = CurrentTable(store, cache, when_redis_is_down, self._forget_unused)
        self._store_stats = ReadStats()
        self._versions: dict[tuple[str, int], Version] = {}

    async def start(self) -> None:
        """Brings Redis to the store's table. Raises ServiceError when Redis could evict it.

        With Redis away it raises RedisUnavailableError, or begins with the store's table if so configured.
        """
        await self._current.start()

    async def claim_table(self) -> PointerTable:
        """The pointer table as it is now; one round trip when it has not changed since the last claim.

        Raises RedisUnavailableError when Redis is away and this bank refuses to serve the last known table.
        """
        return await self._current.claim()

    async def table_of(self, claim: TableClaim) -> PointerTable:
        """The table that whoever read `claim` answers with: none older than what was live then. Raises as claim_table."""
        return await self._current.of(claim)

    def last_known(self, error: RedisUnavailableError) -> PointerTable:
        """What is served while Redis is away; `error` is raised when this bank then refuses."""
        return self._current.last_known(error)

    def _forget_unused(self, table: PointerTable) -> None:
        in_use = set(table.versions_in_use())
        self._versions = {key: version for key, version in self._versions.items() if key in in_use}

    async def live(self, domain: str, model: ServedModel) -> Version:
        """The version of `domain` that is live now. Raises UnknownDomainError."""
        versions = (await self.claim_table()).live_versions(model.fingerprint)
        if domain not in versions:
            raise UnknownDomainError.not_live(domain, versions)
        return await self.version(domain, versions[domain])

    async def answering(self, table: PointerTable, domain: str, conversation_id: str, model: ServedModel) -> Version:
        """The version that answers a conversation in `domain`, which must be live in `table`: the live one or the canary.

        A canary that cannot be read or served answers nobody; the live version does.
        """
        pointers = table.pointers(domain, model.fingerprint)
        assert pointers.live is not None
        if pointers.canary is not None:
            candidate = await self._beside_live(domain, pointers.canary.version, model)
            if candidate and is_in_canary(conversation_id, candidate.content_digest, pointers.canary.share):
                return candidate
        return await self.version(domain, pointers.live)

    async def shadow(self, table: PointerTable, domain: str, model: ServedModel) -> Version | None:
        """The version that answers unseen in `domain`, if there is one that can be served."""
        number = table.pointers(domain, model.fingerprint).shadow
        return None if number is None else await self._beside_live(domain, number, model)

    async def _beside_live(self, domain: str, number: int, model: ServedModel) -> Version | None:
        try:
            version = await self.version(domain, number)
            check_served_model(version, model)
        except BankError as error:
            log.error("%s v%d is left out: %s", domain, number, error)
            return None
        return version

    async def version(self, domain: str, number: int) -> Version:
        key = (domain, number)
        if key not in self._versions:
            self._versions[key] = await asyncio.to_thread(self._store.read_version, domain, number)
        return self._versions[key]

    async def versions(self, domain: str) -> list[int]:
        """The numbers of a domain's versions, oldest first; none of one that is not in the bank."""
        return await asyncio.to_thread(self._store.versions, domain)

    async def cards(self, live: Mapping[str, int]) -> dict[str, Card]:
        """The cards of these versions, by domain. One that cannot be read is logged and left out: the others go on."""
        cards = {}
        for domain, number in sorted(live.items()):
            try:
                cards[domain] = (await self.version(domain, number)).card
            except BankError as error:
                log.error("%s v%d is left out: %s", domain, number, error)
        return cards

    async def soft_prompt(self, version: Version, model: ServedModel) -> SoftPrompt:
        """The soft prompt of a version that has one, from Redis or the store.

        Raises BaseModelMismatchError or ChatFormatMismatchError when it was made for another model.
        """
        assert version.digest is not None, f"{version.name} is served by its brief"
        check_served_model(version, model)
        try:
            cached = await self.cache.get_blob(version.digest)
        except RedisUnavailableError as error:
            log.warning("%s is read from the store: %s", version.name, error)
            return await self._stored_soft_prompt(version, model)
        if cached is not None:
            return await asyncio.to_thread(check_soft_prompt, cached, model.shape)
        stored = await self._stored_soft_prompt(version, model)
        await self.cache.put_blob(stored)
        return stored

    async def _stored_soft_prompt(self, version: Version, model: ServedModel) -> SoftPrompt:
        try:
            prompt = await asyncio.to_thread(self._store.read_soft_prompt, version, model)
        except BankError:
            self._store_stats = self._store_stats.plus(num_errors=1)
            raise
        self._store_stats = self._store_stats.plus(num_hits=1)
        return prompt

    def read_stats(self) -> dict[str, ReadStats]:
        """How soft prompts were read, by tier; the store has all of them, so that it misses none."""
        return {"redis": self.cache.blob_stats, "store": self._store_stats}

    @asynccontextmanager
    async def alone(self, what: str) -> AsyncIterator[None]:
        """One at a time over all processes of the installation. Raises RedisUnavailableError."""
        with asking_redis():
            async with self.cache.redis.lock(f"{self.cache.prefix}alone:{what}", timeout=_ALONE_S):
                yield

    async def publish(self, draft: Draft, actor: str, reason: str) -> Version:
        """Commits a new version. It answers nobody until it is promoted."""
        if draft.soft_prompt is not None:
            check_soft_prompt(draft.soft_prompt, draft.model.shape)
        version = await asyncio.to_thread(self._store.add_version, draft, actor, reason)
        log.info("published %s, digest %s", version.name, version.digest)
        return version

    async def promote(
        self,
        domain: str,
        number: int,
        actor: str,
        reason: str,
        expected_live: int | None = None,
        served: ServedModel | None = None,
    ) -> PointerTable:
        """Makes a version live for the base model it was made for; returns once that is committed and published.

        Given `expected_live`, it raises VersionInUseError when another version is live by now. Given `served`, the model that
        is served here, the version must have its chat format, and else the live version's: see `check_chat_format`.

        This and the changes below raise UnknownVersionError, UnknownDomainError or VersionInUseError when the change is not
        allowed, ChatFormatMismatchError or VersionCorruptError when the version could not be served, and RedisUnavailableError
        with nothing changed when Redis is away, or when it went away before the committed change was published.
        """
        fingerprint = await self._servable(domain, number)
        return await self._change(
            "promote", domain, fingerprint, number, expected_live=expected_live, served=served, actor=actor, reason=reason
        )

    async def rollback(
        self, domain: str, fingerprint: str, actor: str, reason: str, served: ServedModel | None = None
    ) -> PointerTable:
        """Makes the previous live version live again."""
        return await self._change("rollback", domain, fingerprint, served=served, actor=actor, reason=reason)

    async def start_canary(
        self, domain: str, number: int, share: float, actor: str, reason: str, served: ServedModel | None = None
    ) -> PointerTable:
        """Has a version answer a share (0 to 1] of the domain's conversations; again with another share to change it."""
        fingerprint = await self._servable(domain, number)
        return await self._change("canary", domain, fingerprint, number, share, served=served, actor=actor, reason=reason)

    async def end_canary(self, domain: str, fingerprint: str, actor: str, reason: str) -> PointerTable:
        return await self._change("end_canary", domain, fingerprint, actor=actor, reason=reason)

    async def start_shadow(
        self, domain: str, number: int, actor: str, reason: str, served: ServedModel | None = None
    ) -> PointerTable:
        """Has a version answer every turn of the domain unseen."""
        fingerprint = await self._servable(domain, number)
        return await self._change("shadow", domain, fingerprint, number, served=served, actor=actor, reason=reason)

    async def end_shadow(self, domain: str, fingerprint: str, actor: str, reason: str) -> PointerTable:
        return await self._change("end_shadow", domain, fingerprint, actor=actor, reason=reason)

    async def retire(self, domain: str, number: int, actor: str, reason: str) -> PointerTable:
        """Takes a version out of service, live or not: it can be restored, but not promoted."""
        manifest = await asyncio.to_thread(readable_manifest, self._store, domain, number)
        return await self._change("retire", domain, made_for(manifest), number, actor=actor, reason=reason)

    async def restore(self, domain: str, number: int, actor: str, reason: str) -> PointerTable:
        manifest = await asyncio.to_thread(readable_manifest, self._store, domain, number)
        return await self._change("restore", domain, made_for(manifest), number, actor=actor, reason=reason)

    async def delete(self, domain: str, number: int, actor: str, reason: str) -> PointerTable:
        """Removes a version's files for good; its record stays in the history. Refused while it is in use.

        After a crash in between, the same call removes what is left.
        """
        table = await asyncio.to_thread(self._store.pointer_table)
        if number not in table.record(domain).deleted:
            manifest = await asyncio.to_thread(readable_manifest, self._store, domain, number)
            table = await self._change(
                "delete", domain, made_for(manifest), number, deleted=manifest, actor=actor, reason=reason
            )
            if manifest is not None and manifest.soft_prompt is not None:
                await self.cache.forget_blob(manifest.soft_prompt.digest)
        await asyncio.to_thread(self._store.delete_version, domain, number)
        return table

    async def history(self, domain: str) -> list[HistoryEntry]:
        """Everything that happened to a domain, oldest first. Raises UnknownDomainError."""
        return await asyncio.to_thread(read_history, self._store, domain)

    async def _servable(self, domain: str, number: int) -> str:
        """The fingerprint of the base model that a version, all of which can be read, was made for."""
        # First, as of what was deleted the store knows no more than that it is not there.
        check_servable(await asyncio.to_thread(self._store.pointer_table), domain, number)
        version = await asyncio.to_thread(self._store.check_version, domain, number)
        return version.manifest.base_model.fingerprint

    async def _change(
        self,
        action: Action,
        domain: str,
        fingerprint: str,
        version: int | None = None,
        share: float | None = None,
        deleted: Manifest | None = None,
        expected_live: int | None = None,
        served: ServedModel | None = None,
        *,
        actor: str,
        reason: str,
    ) -> PointerTable:
        change = PointerChange(
            action=action,
            domain=domain,
            fingerprint=fingerprint,
            version=version,
            share=share,
            deleted=deleted,
            actor=actor,
            reason=reason,
        )
        token = await self.cache.begin_change()  # from now on claims look into the store, whatever becomes of us
        try:
            table = await self._commit(change, expected_live, served)
        except BaseException:
            with suppress(RedisUnavailableError):
                await self._current.publish(await asyncio.to_thread(self._store.pointer_table), token)
            raise
        try:
            await self._current.publish(table, token)
        except RedisUnavailableError as error:
            raise RedisUnavailableError(
                f"{action} of {domain} is committed in the store (epoch {table.epoch}), but redis does not know: {error}; "
                "running services read the store when they reach redis again"
            ) from error
        log.info("%s of %s, pointer epoch %d", action, domain, table.epoch)
        return table

    async def _commit(self, change: PointerChange, expected_live: int | None, served: ServedModel | None) -> PointerTable:
        for _ in range(_NUM_COMMIT_TRIES):
            with suppress(PointerConflictError):
                return await asyncio.to_thread(self._try_commit, change, expected_live, served)
        raise PointerConflictError(
            f"{change.action} of {change.domain} not made: {_NUM_COMMIT_TRIES} other changes came first; try again"
        )

    def _try_commit(self, change: PointerChange, expected_live: int | None, served: ServedModel | None) -> PointerTable:
        table = self._store.pointer_table()
        live = table.pointers(change.domain, change.fingerprint).live
        if expected_live is not None and live != expected_live:
            raise VersionInUseError(
                f"{change.domain} v{live} became live since v{expected_live} was read; v{change.version} is published but not "
                f"live: compare them, then `frontdesk bank promote {change.domain} {change.version}`"
            )
        change = table.resolved(change)
        if change.action == "rollback" and change.version is not None:
            self._store.check_version(change.domain, change.version)
        table.check(change)
        if change.action in _POINTING and change.version is not None:
            check_chat_format(self._store, change.domain, change.version, change.fingerprint, live, served)
        return self._store.commit(change, table.epoch + 1)
