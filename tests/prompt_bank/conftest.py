"""What most tests of the bank need: a card, soft prompts of the tiny model, and banks over a real Valkey."""

import asyncio
import os
import select
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from redis.asyncio import Redis

from prompt_bank.bank import Bank
from prompt_bank.base_model import ModelShape
from prompt_bank.cache import RedisCache
from prompt_bank.card import Card
from prompt_bank.settings import WhenRedisIsDown
from prompt_bank.soft_prompt import Kind, SoftPrompt, expected_shape
from prompt_bank.store import FolderStore
from prompt_bank.valkey import embedded_valkey
from prompt_bank.version import Draft, ServedModel, Version


def make_card(name: str = "banking", brief: str = "You answer questions about accounts.") -> Card:
    examples = ("What is my balance?", "Block my card", "How do I open an account?")
    return Card(name=name, title=name.title(), description=f"Questions about {name}.", brief=brief, examples=examples)


def make_prompt(shape: ModelShape, kind: Kind = "prefix_kv", num_virtual_tokens: int = 4, seed: int = 0) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    return SoftPrompt(kind, torch.randn(expected_shape(kind, num_virtual_tokens, shape), generator=generator))


async def publish(bank: Bank, model: ServedModel, seed: int | None = 0, domain: str = "banking") -> Version:
    prompt = None if seed is None else make_prompt(model.shape, seed=seed)
    return await bank.publish(Draft(make_card(domain), model, prompt), "ann", "test")


async def server_pid(url: str) -> int:
    async with Redis.from_url(url) as client:
        return int((await client.info("server"))["process_id"])


async def kill_server(url: str) -> None:
    pid = await server_pid(url)
    ended = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(select.select, [ended], [], [], 10)
    os.close(ended)


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

        def open_at(url: str, when_redis_is_down: WhenRedisIsDown = "refuse", timeout_s: float = 2) -> Bank:
            cache = RedisCache.connect(url, store.id, blob_ttl_s=3600, timeout_s=timeout_s)
            stack.push_async_callback(cache.aclose)
            return Bank(store, cache, when_redis_is_down)

        yield open_at


@pytest.fixture
async def bank(open_bank_at: BankOpener, redis_url: str) -> Bank:
    started = open_bank_at(redis_url)
    await started.start()
    return started


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator["Redis"]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Starts a Valkey that a test may kill; its data stays in one folder."""
    contexts = []

    def start() -> str:
        context = embedded_valkey(tmp_path / "own_valkey")
        contexts.append(context)
        return context.__enter__()

    yield start
    for context in contexts:
        context.__exit__(None, None, None)
