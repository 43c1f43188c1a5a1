"""The router of the cards that are live: refitted when their examples change, off the event loop."""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from bot.routing.encoder import Encoder
from bot.routing.router import Router, RoutingDecision, texts_of
from prompt_bank.bank import Bank


class LiveRouter:
    """Used from one event loop."""

    def __init__(self, bank: Bank, encoder: Encoder) -> None:
        self._bank = bank
        self._encoder = encoder
        self._live: dict[str, int] | None = None
        self._texts: dict[str, list[str]] = {}
        self._router: Router | None = None
        self._fitting = asyncio.Lock()

    async def decide(
        self,
        live: Mapping[str, int],
        text: str,
        history: Sequence[str],
        current: str | None,
        among: Collection[str] | None = None,
    ) -> RoutingDecision:
        """The domain of `text` among the `live` versions (domain to number), only of `among` if given."""
        router = await self.fitted(live)
        return await asyncio.to_thread(router.decide, text, history, current, among)

    async def fitted(self, live: Mapping[str, int]) -> Router:
        """The router for these versions. A version that changed no example, as most newly trained ones, costs no refit."""
        live = dict(live)
        async with self._fitting:
            if self._router is None or self._live != live:
                cards = await self._bank.cards(live)
                texts = {domain: texts_of(card) for domain, card in cards.items()}
                if self._router is None or texts != self._texts:
                    self._router = await asyncio.to_thread(Router.fit, cards, self._encoder)
                self._live, self._texts = live, texts
            return self._router
