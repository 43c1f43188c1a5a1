"""What most tests of the bank need: a card, soft prompts of the tiny model, and banks over a real Valkey."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from prompt_bank.bank import Bank, WhenRedisIsDown
from prompt_bank.base_model import ModelShape
from prompt_bank.cache import RedisCache
from prompt_bank.card import Card
from prompt_bank.soft_prompt import Kind, SoftPrompt, expected_shape
from prompt_bank.store import FolderStore


def make_card(name: str = "banking", brief: str = "You answer questions about accounts.") -> Card:
    examples = ("What is my balance?", "Block my card", "How do I open an account?")
    return Card(name=name, title=name.title(), description=f"Questions about {name}.", brief=brief, examples=examples)


def make_prompt(shape: ModelShape, kind: Kind = "prefix_kv", num_virtual_tokens: int = 4, seed: int = 0) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    return SoftPrompt(kind, torch.randn(expected_shape(kind, num_virtual_tokens, shape), generator=generator))


@pytest.fixture
def card() -> Card:
    return make_card()


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "bank")


BankOpener = Callable[..., "Bank"]


@pytest.fixture
async def open_bank_at(store: FolderStore) -> AsyncIterator[BankOpener]:
    """Opens banks over one store, each with its own connections, as separate services have."""
    async with AsyncExitStack() as stack:

        def open_at(url: str, when_redis_is_down: WhenRedisIsDown = "refuse") -> Bank:
            redis = Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0))
            stack.push_async_callback(redis.aclose)
            return Bank(store, RedisCache(redis, blob_ttl_s=3600), when_redis_is_down)

        yield open_at


@pytest.fixture
async def bank(open_bank_at: BankOpener, redis_url: str) -> Bank:
    started = open_bank_at(redis_url)
    await started.start()
    return started
