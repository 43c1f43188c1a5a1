"""The pointer table as it is now, without asking more than one round trip for it.

A change is committed to the store first (compare and set) and then published to Redis; every claim compares the table's stamp
in Redis with the one in memory, and the table is taken anew when they differ. What is pending in Redis, or behind a new
connection to it, is compared with the store, whose word counts.
"""

import asyncio
import logging
from collections.abc import Callable

from prompt_bank.cache import RedisCache, TableClaim, TableStamp
from prompt_bank.errors import RedisUnavailableError
from prompt_bank.pending import PendingChanges, StoreLook
from prompt_bank.pointers import PointerTable
from prompt_bank.settings import WhenRedisIsDown
from prompt_bank.store import Store

log = logging.getLogger(__name__)


class CurrentTable:
    """Used from one event loop. `on_change` is called with each table that is taken."""

    def __init__(
        self, store: Store, cache: RedisCache, when_redis_is_down: WhenRedisIsDown, on_change: Callable[[PointerTable], None]
    ) -> None:
        self._store = store
        self._cache = cache
        self._when_redis_is_down = when_redis_is_down
        self._on_change = on_change
        self._stamp: TableStamp | None = None
        self._table = PointerTable()
        self._has_table = False
        self._pending = PendingChanges()
        self._look = StoreLook(store)
        self._num_connections = 0  # of the cache's, behind which Redis was compared with the store

    async def start(self) -> None:
        """Brings Redis to the store's table. Raises ServiceError when Redis could evict it.

        With Redis away it raises RedisUnavailableError, or begins with the store's table if so configured.
        """
        try:
            await self._cache.check_policy()
            await self._publish_stored()
        except RedisUnavailableError as error:
            if self._when_redis_is_down == "refuse":
                raise
            self._table = await asyncio.to_thread(self._store.pointer_table)
            self._has_table = True
            log.warning("starting with the store's pointer table, epoch %d: %s", self._table.epoch, error)

    async def _publish_stored(self) -> PointerTable:
        """Takes the store's table, and puts it into Redis."""
        num_connections = self._cache.num_connections
        stored = await asyncio.to_thread(self._store.pointer_table)
        stamp = await self.publish(stored)
        # What was lost with the Redis before this table id is in the store by now; what comes later changes the stamp.
        while (newest := await asyncio.to_thread(self._store.pointer_table)).epoch != stored.epoch:
            seen, stored = stamp, newest
            stamp = await self.publish(stored)
            if stamp.id == seen.id:
                break
        self._take(TableStamp(stamp.id, stored.epoch), stored)
        self._num_connections = num_connections
        return stored

    async def publish(self, table: PointerTable, token: str = "") -> TableStamp:
        """Puts the store's table into Redis and takes the `token` of its change back; gives the stamp of what is there then."""
        stamp = await self._cache.publish_table(table, token)
        if stamp.epoch > table.epoch:
            stored = await asyncio.to_thread(self._store.pointer_table)
            if stamp.epoch > stored.epoch:
                log.warning("redis holds pointer epoch %d, the store %d: the store counts", stamp.epoch, stored.epoch)
                await self._cache.forget_table()
                stamp = await self._cache.publish_table(stored)
        return stamp

    def _take(self, stamp: TableStamp, table: PointerTable) -> None:
        self._stamp, self._table, self._has_table = stamp, table, True
        self._on_change(table)

    async def claim(self) -> PointerTable:
        """The pointer table as it is now; one round trip when it has not changed since the last claim.

        Raises RedisUnavailableError when Redis is away and this bank refuses to serve the last known table.
        """
        try:
            claim = await self._cache.claim()
        except RedisUnavailableError as error:
            return self.last_known(error)
        return await self.of(claim)

    async def of(self, claim: TableClaim) -> PointerTable:
        """The table that whoever read `claim` answers with: none older than what was live when it was read.

        Only what a call found itself is given: another one may have put something older in `_table` since.
        Raises RedisUnavailableError as above.
        """
        try:
            if claim.pending or self._cache.num_connections != self._num_connections:
                # The store may hold a change that Redis does not: not yet, never as its author died, or no longer.
                table = await self._compared(claim)
                await self._forget_dead(claim.pending)
                return table
            return self._table if claim.stamp is not None and claim.stamp == self._stamp else await self._reload()
        except RedisUnavailableError as error:
            return self.last_known(error)

    def last_known(self, error: RedisUnavailableError) -> PointerTable:
        """What is served while Redis is away; `error` is raised when this bank then refuses."""
        if self._when_redis_is_down == "refuse" or not self._has_table:
            raise error
        log.warning("serving the last known pointer table, epoch %d: %s", self._table.epoch, error)
        return self._table

    async def _compared(self, claim: TableClaim) -> PointerTable:
        """The store's table. Redis is given it, unless it is seen to have it: that costs much more, at every claim."""
        known, num_connections = self._stamp, self._num_connections
        if claim.stamp is not None and known is not None and self._cache.num_connections == num_connections:
            table = await self._look.table()
            stamp = TableStamp(known.id, table.epoch)
            if claim.stamp == stamp or (claim.stamp.id == known.id and self._stamp == stamp):
                if stamp != self._stamp or table.change != self._table.change:
                    self._take(stamp, table)
                return table
        return await self._publish_stored()

    async def _forget_dead(self, pending: tuple[str, ...]) -> None:
        """Takes back what has been pending for so long that its author must be gone, so that claims are cheap again."""
        if dead := self._pending.dead(pending):
            await self._cache.forget_pending(dead)
            log.warning("%d changes of the pointer table were never finished by their authors; the store counts", len(dead))

    async def _reload(self) -> PointerTable:
        published = await self._cache.table()
        if published is not None:
            stamp, table = published
            is_known = self._stamp is not None and stamp.id == self._stamp.id
            if is_known and stamp.epoch >= self._table.epoch:
                self._take(stamp, table)
                return table
        # Redis lost its data, which another may have refilled with what it knew, or was set back to an older state of it.
        table = await self._publish_stored()
        log.warning("the pointer table was read from the store, not from redis: %s", self._stamp)
        return table
