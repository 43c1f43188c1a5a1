"""Opens the bank of an installation: its store, its Redis (embedded unless a URL is set), and its starter domains."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from prompt_bank.bank import Bank
from prompt_bank.cache import RedisCache
from prompt_bank.errors import ServiceError
from prompt_bank.settings import BankSettings
from prompt_bank.store import FolderStore
from prompt_bank.valkey import embedded_valkey

_REDIS_TIMEOUT_S = 2.0


@asynccontextmanager
async def open_bank(settings: BankSettings) -> AsyncIterator[Bank]:
    """Raises ServiceError or RedisUnavailableError when Redis cannot be used."""
    with ExitStack() as stack:
        url = settings.redis_url
        if url is None:
            url = await asyncio.to_thread(stack.enter_context, embedded_valkey(settings.data_dir / "valkey"))
        # A claim must fail at once when Redis is away; callers decide what to do then.
        try:
            redis = Redis.from_url(
                url,
                socket_timeout=_REDIS_TIMEOUT_S,
                socket_connect_timeout=_REDIS_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            raise ServiceError(f"setting FRONTDESK_REDIS_URL: {error}") from error
        try:
            bank = Bank(
                FolderStore(settings.data_dir / "bank"),
                RedisCache(redis, settings.blob_ttl_s),
                settings.when_redis_is_down,
            )
            await bank.start()
            yield bank
        finally:
            await redis.aclose()
