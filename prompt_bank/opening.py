"""Opens what an installation's settings name: its bank (store, and Redis, embedded unless a URL is set) and its base model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass

from prompt_bank.bank import Bank
from prompt_bank.base_model import BaseModel, load_base_model
from prompt_bank.cache import RedisCache
from prompt_bank.chat_format import ChatFormat
from prompt_bank.model_files import Report, find_model
from prompt_bank.settings import BankSettings
from prompt_bank.store import open_store
from prompt_bank.valkey import embedded_valkey
from prompt_bank.version import ServedModel


@asynccontextmanager
async def open_redis(settings: BankSettings) -> AsyncIterator[str]:
    """The URL of the installation's Redis, embedded unless one is set. Raises ServiceError when that does not start."""
    with ExitStack() as stack:
        url = settings.redis_url
        if url is None:
            url = await _entered(stack, embedded_valkey(settings.data_dir / "valkey", settings.redis_memory_mb))
        yield url


@asynccontextmanager
async def open_bank(settings: BankSettings, redis_url: str | None = None) -> AsyncIterator[Bank]:
    """Of the Redis at `redis_url`, or else of one that is open as long as the bank.

    Raises ServiceError or RedisUnavailableError when Redis cannot be used.
    """
    if redis_url is None:
        async with open_redis(settings) as url, open_bank(settings, url) as bank:
            yield bank
        return
    store = open_store(settings)
    cache = RedisCache.connect(redis_url, store.id, settings.blob_ttl_s, settings.redis_timeout_s)
    try:
        bank = Bank(store, cache, settings.when_redis_is_down)
        await bank.start()
        yield bank
    finally:
        await cache.aclose()


async def _entered(stack: ExitStack, context: AbstractContextManager[str]) -> str:
    """Enters a blocking context off the loop. Cancelled meanwhile, it waits until the stack knows how to leave it."""
    entering = asyncio.ensure_future(asyncio.to_thread(stack.enter_context, context))
    try:
        return await asyncio.shield(entering)
    except asyncio.CancelledError:
        await asyncio.wait({entering})
        raise


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """The base model of an installation, how conversations are rendered for it, and what versions made for it say."""

    base: BaseModel
    chat_format: ChatFormat
    served: ServedModel


def load_model(settings: BankSettings, report: Report = lambda _: None) -> LoadedModel:
    """Finds, loads and freezes the settings' base model. Blocking. Raises ModelError."""
    folder = find_model(settings.base_model, settings.models_dir, report)
    base = load_base_model(settings.base_model, folder, settings.device, settings.dtype)
    chat_format = ChatFormat(base.tokenizer)
    return LoadedModel(base, chat_format, ServedModel.of(base, chat_format))
