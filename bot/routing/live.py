"""The router of the cards that are live: refitted when a version changes, off the event loop."""

import asyncio
from collections.abc import Mapping, Sequence

from bot.routing.encoder import Encoder
from bot.routing.router import Router, RoutingDecision
from prompt_bank.bank import Bank


class LiveRouter:
    """Used from one event loop."""

    def __init__(self, bank: Bank, encoder: Encoder) -> None:
        self._bank = bank
        self._encoder = encoder
        self._fitted: tuple[dict[str, int], Router] | None = None
        self._fitting = asyncio.Lock()

    async def decide(self, live: Mapping[str, int], text: str, history: Sequence[str], current: str | None) -> RoutingDecision:
        """The domain of `text` among the `live` versions (domain to number)."""
        router = await self.fitted(live)
        return await asyncio.to_thread(router.decide, text, history, current)

    async def fitted(self, live: Mapping[str, int]) -> Router:
        """The router for these versions, fitted now unless it was the last one asked for."""
        live = dict(live)
        async with self._fitting:
            if self._fitted is None or self._fitted[0] != live:
                self._fitted = live, await asyncio.to_thread(Router.fit, await self._bank.cards(live), self._encoder)
            return self._fitted[1]
