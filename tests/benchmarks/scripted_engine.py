"""A service whose answers cost nothing: what is left is the service's own time.

    python -m tests.benchmarks.scripted_engine NUM_TOKENS PACE_MS

Settings are taken from the environment, as `frontdesk serve` does, but for what bounds turns under way: any number at once.
"""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import uvloop

from bot.app import EngineFactory
from bot.channels.http.server import serve
from bot.engine.request import Engine, EngineStats, GeneratedToken, GenerationRequest, PrefixStats
from bot.settings import Settings
from prompt_bank.opening import LoadedModel

_TEXT = " I will look into that for you, please wait a moment and have your card at hand."


class ScriptedEngine:
    """Says the same tokens at a fixed pace, to any number of requests at once."""

    is_running = True

    def __init__(self, token_ids: list[int], pace_s: float, context_tokens: int) -> None:
        self._token_ids = token_ids
        self._pace_s = pace_s
        self.context_tokens = context_tokens
        self._num_active = 0
        self._num_generated_tokens = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedToken, None]:
        loop = asyncio.get_running_loop()
        due, last = loop.time(), len(self._token_ids) - 1
        self._num_active += 1
        try:
            for index, token_id in enumerate(self._token_ids):
                due += self._pace_s
                await asyncio.sleep(due - loop.time())  # to the due time: being late does not add up
                self._num_generated_tokens += 1
                yield GeneratedToken(token_id, "stop" if index == last else None)
        finally:
            self._num_active -= 1

    def stats(self) -> EngineStats:
        return EngineStats(self._num_active, 0, self._num_generated_tokens, PrefixStats(0, 0, 0, 0, 0, 0, 0))

    def is_half_idle(self) -> bool:
        return True


def scripted(num_tokens: int, pace_s: float) -> EngineFactory:
    @asynccontextmanager
    async def opened(loaded: LoadedModel, settings: Settings) -> AsyncIterator[Engine]:
        words = loaded.base.tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
        token_ids = (words * (num_tokens // len(words) + 1))[:num_tokens]
        yield ScriptedEngine(token_ids, pace_s, settings.context_tokens)

    def make(loaded: LoadedModel, settings: Settings) -> AbstractAsyncContextManager[Engine]:
        return opened(loaded, settings)

    return make


def main() -> None:
    started = time.monotonic()
    num_tokens, pace_s = int(sys.argv[1]), float(sys.argv[2]) / 1000
    settings = Settings.load()
    if "max_batch" not in settings.model_fields_set:  # beyond what a real engine may be asked for
        settings = settings.model_copy(update={"max_batch": 2000})

    def report(text: str) -> None:
        print(f"frontdesk {text}", file=sys.stderr, flush=True)

    uvloop.run(serve(settings, report, started, scripted(num_tokens, pace_s)))


if __name__ == "__main__":
    main()
