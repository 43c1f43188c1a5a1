"""A process that answers messages beside a service, and whose engine thread dies when it has generated so many tokens.

`doomed_worker.py NUM_TOKENS`, with a service's environment: prints `ready`, and ends in good order when its stdin does.
"""

import asyncio
import logging
import sys

from bot.app import open_service
from bot.engine.torch_engine import TorchEngine
from bot.log_format import LineFormatter
from bot.settings import Settings
from prompt_bank.opening import LoadedModel


class DoomedEngine(TorchEngine):
    num_left = int(sys.argv[1])

    def _step(self) -> None:
        super()._step()
        if self._num_generated_tokens >= self.num_left:
            raise RuntimeError("the engine thread dies")


def doomed_engine(loaded: LoadedModel, settings: Settings) -> DoomedEngine:
    return DoomedEngine(loaded.base, num_rows=settings.max_batch, context_tokens=settings.context_tokens)


async def run() -> None:
    async with open_service(Settings.load(), make_engine=doomed_engine):
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level="INFO", handlers=[handler])
    asyncio.run(run())


if __name__ == "__main__":
    main()
