"""While a change of the pointer table is pending: the store is asked, once for all who ask at one time, and the dead are told.

A change is pending from before its commit until Redis knows of it; its author may die in between. Used from one event loop.
"""

import asyncio
import time

from prompt_bank.pointers import PointerTable
from prompt_bank.store import Store

_PENDING_S = 60.0  # a commit takes milliseconds


class StoreLook:
    """Reads of the store's table. One that began before a claim may lack what that claim must see: it does not count for it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reading = asyncio.Lock()
        self._num_begun = 0
        self._newest = 0, PointerTable()  # the number of the read that ended last, and what it found

    async def table(self) -> PointerTable:
        """The store's table as it is now, or as a read found it that began after this call."""
        num_begun_before = self._num_begun
        async with self._reading:
            if self._newest[0] <= num_begun_before:
                self._num_begun += 1
                self._newest = self._num_begun, await asyncio.to_thread(self._store.pointer_table)
            return self._newest[1]


class PendingChanges:
    """Since when each change has been pending: one that has been for so long has no author any more."""

    def __init__(self) -> None:
        self._first_seen: dict[str, float] = {}

    def dead(self, tokens: tuple[str, ...]) -> list[str]:
        """Those of the tokens that are pending now whose authors are gone."""
        now = time.monotonic()
        self._first_seen = {token: self._first_seen.get(token, now) for token in tokens}
        return [token for token, since in self._first_seen.items() if now - since > _PENDING_S]
