"""An engine on the tiny random model."""

from collections.abc import AsyncIterator

import pytest

from bot.engine.torch_engine import TorchEngine
from prompt_bank.base_model import BaseModel


@pytest.fixture
async def engine(tiny: BaseModel) -> AsyncIterator[TorchEngine]:
    async with TorchEngine(tiny, num_rows=8, max_waiting=16, context_tokens=256) as running:
        yield running
