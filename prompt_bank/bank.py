"""The prompt bank: publishes versions, moves live pointers, and gives a turn the version that is live when it is claimed.

Never stale: a pointer is committed to the store first (compare and set) and then published to Redis; every claim compares the
table's stamp in Redis with the one in memory, in one round trip, and reloads when they differ. Blobs are cached by digest
only, so a cached soft prompt cannot be the wrong one.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping

from prompt_bank.cache import RedisCache, TableStamp
from prompt_bank.card import Card
from prompt_bank.errors import BankError, PointerConflictError, RedisUnavailableError, UnknownDomainError
from prompt_bank.settings import WhenRedisIsDown
from prompt_bank.soft_prompt import SoftPrompt, check_soft_prompt
from prompt_bank.store import PointerChange, PointerTable, Store
from prompt_bank.version import Draft, ServedModel, Version, check_served_model

log = logging.getLogger(__name__)

_NUM_PROMPTS_IN_MEMORY = 64
_NUM_COMMIT_TRIES = 20


class Bank:
    """Used from one event loop. `when_redis_is_down` says whether a claim then fails or takes the last known table."""

    def __init__(self, store: Store, cache: RedisCache, when_redis_is_down: WhenRedisIsDown = "refuse") -> None:
        self._store = store
        self._cache = cache
        self._when_redis_is_down = when_redis_is_down
        self._stamp: TableStamp | None = None
        self._table = PointerTable()
        self._versions: dict[tuple[str, int], Version] = {}
        self._prompts: OrderedDict[str, SoftPrompt] = OrderedDict()

    async def start(self) -> None:
        """Brings Redis to the store's table. Raises ServiceError when Redis could evict it."""
        await self._cache.check_policy()
        # Redis first: a promotion between the two reads is in the store before it is in Redis.
        stamp = await self._cache.table_stamp()
        stored = await asyncio.to_thread(self._store.pointer_table)
        if stamp is not None and stamp.epoch > stored.epoch:
            log.warning("redis holds pointer epoch %d, the store %d: the store counts", stamp.epoch, stored.epoch)
            await self._cache.forget_table()
        await self._publish_stored()

    async def _publish_stored(self) -> None:
        """Takes the store's table, and puts it into Redis unless a newer one is there."""
        stored = await asyncio.to_thread(self._store.pointer_table)
        self._stamp, self._table = await self._cache.publish_table(stored), stored

    async def claim_table(self) -> PointerTable:
        """The pointer table as it is now; one round trip when it has not changed since the last claim.

        Raises RedisUnavailableError when Redis is away and this bank refuses to serve the last known table.
        """
        try:
            stamp = await self._cache.table_stamp()
            if stamp is None or stamp != self._stamp:
                await self._reload()
        except RedisUnavailableError as error:
            if self._when_redis_is_down == "refuse" or self._stamp is None:
                raise
            log.warning("serving the last known pointer table, epoch %d: %s", self._table.epoch, error)
        return self._table

    async def _reload(self) -> None:
        published = await self._cache.table()
        if published is not None and published[0].epoch >= self._table.epoch:
            self._stamp, self._table = published
            return
        # Redis lost its data, or was set back to an older state of it.
        await self._publish_stored()
        log.warning("redis had lost the pointer table: refilled from the store, %s", self._stamp)

    async def live(self, domain: str, model: ServedModel) -> Version:
        """The version of `domain` that is live now. Raises UnknownDomainError."""
        versions = (await self.claim_table()).live_versions(model.fingerprint)
        if domain not in versions:
            raise UnknownDomainError(f"no domain {domain!r} is live; there are: {', '.join(sorted(versions)) or 'none'}")
        return await self.version(domain, versions[domain])

    async def version(self, domain: str, number: int) -> Version:
        key = (domain, number)
        if key not in self._versions:
            self._versions[key] = await asyncio.to_thread(self._store.read_version, domain, number)
        return self._versions[key]

    async def cards(self, live: Mapping[str, int]) -> dict[str, Card]:
        """The cards of these versions, by domain. One that cannot be read is logged and left out: the others go on."""
        cards = {}
        for domain, number in sorted(live.items()):
            try:
                cards[domain] = (await self.version(domain, number)).card
            except BankError as error:
                log.error("%s v%d is left out: %s", domain, number, error)
        return cards

    async def soft_prompt(self, version: Version, model: ServedModel) -> SoftPrompt | None:
        """The version's soft prompt from memory, Redis or the store; None for a version served by its brief.

        Raises BaseModelMismatchError or ChatFormatMismatchError when it was made for another model.
        """
        if version.digest is None:
            return None
        check_served_model(version, model)
        known = self._prompts.get(version.digest)
        if known is not None:
            self._prompts.move_to_end(version.digest)
            return known
        prompt = await self._cache.get_blob(version.digest)
        if prompt is None:
            prompt = await asyncio.to_thread(self._store.read_soft_prompt, version, model)
            await self._cache.put_blob(prompt)
        self._prompts[version.digest] = await asyncio.to_thread(check_soft_prompt, prompt, model.shape)
        while len(self._prompts) > _NUM_PROMPTS_IN_MEMORY:
            self._prompts.popitem(last=False)
        return prompt

    async def publish(self, draft: Draft) -> Version:
        """Commits a new version. It answers nobody until it is promoted."""
        if draft.soft_prompt is not None:
            check_soft_prompt(draft.soft_prompt, draft.model.shape)
        version = await asyncio.to_thread(self._store.add_version, draft)
        log.info("published %s, digest %s", version.name, version.digest)
        return version

    async def promote(self, domain: str, number: int, actor: str, reason: str) -> PointerTable:
        """Makes a version live for the base model it was made for; returns once that is committed and published.

        Raises UnknownVersionError, or RedisUnavailableError when it is committed but could not be published.
        """
        version = await asyncio.to_thread(self._store.read_version, domain, number)
        change = PointerChange(
            domain=domain,
            fingerprint=version.manifest.base_model.fingerprint,
            version=number,
            actor=actor,
            reason=reason,
        )
        for _ in range(_NUM_COMMIT_TRIES):
            stored = await asyncio.to_thread(self._store.pointer_table)
            table = stored.with_change(change)
            try:
                await asyncio.to_thread(self._store.commit_pointers, table)
            except PointerConflictError:
                continue
            try:
                await self._cache.publish_table(table)
            except RedisUnavailableError as error:
                raise RedisUnavailableError(
                    f"{version.name} is promoted in the store (epoch {table.epoch}), but running services may not know: "
                    f"{error}; promote it again once redis is back"
                ) from error
            log.info("promoted %s, pointer epoch %d", version.name, table.epoch)
            return table
        raise PointerConflictError(f"{version.name} not promoted: {_NUM_COMMIT_TRIES} other changes came first; try again")
