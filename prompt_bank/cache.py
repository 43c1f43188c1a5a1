"""What the bank keeps in Redis: soft-prompt blobs by digest (with a TTL) and the published pointer table (without).

Only blobs carry a TTL, so under `volatile-lru` a full memory evicts blobs and never the table. Knows nothing of the store but
its id, which keeps installations that share one Redis apart; blobs they may share, as a digest means the same everywhere.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self
from uuid import uuid4

from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError, ResponseError

from prompt_bank.errors import RedisUnavailableError, ServiceError, SoftPromptError
from prompt_bank.pointers import PointerTable
from prompt_bank.soft_prompt import SoftPrompt

log = logging.getLogger(__name__)

_PREFIX = "frontdesk:{}:"
_BLOB_KEY = "frontdesk:blob:{}"
_MAX_CONNECTIONS = 50

# A slower writer must not put an older table over a newer one.
_PUBLISH = """
local pending = redis.call('HGET', KEYS[1], 'pending')
if pending and ARGV[4] ~= '' then
  redis.call('HSET', KEYS[1], 'pending', (string.gsub(pending, ARGV[4] .. ',', '')))
end
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then redis.call('HSET', KEYS[1], 'id', ARGV[1]) end
if not epoch or tonumber(epoch) < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'table', ARGV[3])
end
return {redis.call('HGET', KEYS[1], 'id'), redis.call('HGET', KEYS[1], 'epoch')}
"""

# Tokens of changes that may be in the store and not here yet. In the table's own hash, to be read in the same round trip.
_BEGIN = """
redis.call('HSET', KEYS[1], 'pending', (redis.call('HGET', KEYS[1], 'pending') or '') .. ARGV[1] .. ',')
"""
_FORGET_PENDING = """
local pending = redis.call('HGET', KEYS[1], 'pending')
if not pending then return end
for _, token in ipairs(ARGV) do pending = string.gsub(pending, token .. ',', '') end
redis.call('HSET', KEYS[1], 'pending', pending)
"""

CLAIM_FIELDS = ("id", "epoch", "pending")  # of the table's hash, for `table_claim`


@contextmanager
def asking_redis() -> Iterator[None]:
    """Errors of the server or the network become RedisUnavailableError."""
    try:
        yield
    except RedisError as error:
        raise RedisUnavailableError(f"redis does not answer: {error}") from error


@dataclass(frozen=True, slots=True)
class TableStamp:
    """Which table Redis holds. The id changes when Redis lost its data, the epoch at every change of a pointer."""

    id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class TableClaim:
    """What Redis said of the table in the round trip of a claim: its stamp, None when there is none, and pending changes."""

    stamp: TableStamp | None
    pending: tuple[str, ...] = ()


def table_claim(id_: bytes | None, epoch: bytes | None, pending: bytes | None) -> TableClaim:
    """Of the values of CLAIM_FIELDS, which whoever has a script of its own may read in it, over a RedisCache's client."""
    stamp = TableStamp(id_.decode(), int(epoch)) if id_ and epoch else None
    return TableClaim(stamp, tuple(token for token in (pending or b"").decode().split(",") if token))


@dataclass(frozen=True, slots=True)
class ReadStats:
    """How a tier's reads of soft prompts ended; Redis not answering is an error, and so is a blob that is not its key's."""

    num_hits: int = 0
    num_misses: int = 0
    num_errors: int = 0

    def plus(self, num_hits: int = 0, num_misses: int = 0, num_errors: int = 0) -> "ReadStats":
        return ReadStats(self.num_hits + num_hits, self.num_misses + num_misses, self.num_errors + num_errors)


class RedisCache:
    """Errors of the server or the network become RedisUnavailableError; a blob that cannot be written or deleted is logged."""

    def __init__(self, redis: "Redis", store_id: str, blob_ttl_s: int) -> None:
        self.redis = redis  # for those who keep more of this installation there; its connections are counted below
        self.prefix = _PREFIX.format(store_id)  # of this installation's keys
        self.table_key = f"{self.prefix}pointers"
        self._blob_ttl_s = blob_ttl_s
        self._publish = redis.register_script(_PUBLISH)
        self._begin = redis.register_script(_BEGIN)
        self._forget_pending = redis.register_script(_FORGET_PENDING)
        self.num_connections = 0  # made so far: after a new one, Redis may be another than before
        self.blob_stats = ReadStats()

    @classmethod
    def connect(cls, url: str, store_id: str, blob_ttl_s: int, timeout_s: float) -> Self:
        """Connects at the first command. Raises ServiceError for a malformed URL."""

        async def on_connect(connection: Any) -> None:
            await connection.on_connect()
            cache.num_connections += 1

        pool = redis_pool(url, timeout_s, redis_connect_func=on_connect)
        cache = cls(Redis.from_pool(pool), store_id, blob_ttl_s)
        return cache

    async def aclose(self) -> None:
        await self.redis.aclose()

    async def check_policy(self) -> None:
        """Raises ServiceError when this server may evict keys without a TTL: pointers could vanish."""
        try:
            config: Any = await self.redis.config_get("maxmemory-policy", "append*")
        except ResponseError:
            log.warning("redis forbids CONFIG GET; make sure that maxmemory-policy is volatile-lru or noeviction")
            return
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}; start it or set FRONTDESK_REDIS_URL") from error
        policy = config.get("maxmemory-policy", "noeviction")
        durability = config.get("appendonly"), config.get("appendfsync")
        if durability != ("yes", "always"):
            log.warning(
                "redis may lose the last acknowledged messages when it dies: appendonly and appendfsync are %s, %s; "
                "set them to yes, always",
                *durability,
            )
        if policy.startswith("allkeys"):
            raise ServiceError(f"redis has maxmemory-policy {policy}, which may evict live pointers; set it to volatile-lru")

    async def claim(self) -> TableClaim:
        """One round trip, whatever the number of domains."""
        return table_claim(*await self._table_fields(*CLAIM_FIELDS))

    async def begin_change(self) -> str:
        """Says that the store may soon hold a change that is not here yet; gives the token that publishing it takes back."""
        token = uuid4().hex
        await self._run(self._begin, token)
        return token

    async def forget_pending(self, tokens: Sequence[str]) -> None:
        """Takes back changes whose authors are gone."""
        await self._run(self._forget_pending, *tokens)

    async def _run(self, script: AsyncScript, *arguments: str | int) -> Any:
        with asking_redis():
            return await script(keys=[self.table_key], args=list(arguments))

    async def table(self) -> tuple[TableStamp, PointerTable] | None:
        id_, epoch, table = await self._table_fields("id", "epoch", "table")
        stamp = table_claim(id_, epoch, None).stamp
        if stamp is None or not table:
            return None
        try:
            return stamp, PointerTable.model_validate_json(table)
        except ValidationError as error:
            log.error("the pointer table in redis is broken, the store's is taken instead: %s", error)
            await self.forget_table()
            return None

    async def _table_fields(self, *fields: str) -> list[bytes | None]:
        with asking_redis():
            values = await self.redis.hmget(self.table_key, list(fields))
        return [value.encode() if isinstance(value, str) else value for value in values]

    async def publish_table(self, table: PointerTable, token: str = "") -> TableStamp:
        """Puts `table` into Redis unless a newer one is there, and takes `token` back; gives the stamp of what is there then.

        An empty Redis gets a new table id.
        """
        serialized = table.model_dump_json(exclude_none=True)
        id_, epoch = await self._run(self._publish, uuid4().hex, table.epoch, serialized, token)
        return TableStamp(id_.decode(), int(epoch))

    async def forget_table(self) -> None:
        with asking_redis():
            await self.redis.delete(self.table_key)

    async def get_blob(self, digest: str) -> SoftPrompt | None:
        """None when it is not there, or not what its key says. Raises RedisUnavailableError."""
        try:
            blob = await self.redis.getex(_BLOB_KEY.format(digest), ex=self._blob_ttl_s)
        except RedisError as error:
            self.blob_stats = self.blob_stats.plus(num_errors=1)
            raise RedisUnavailableError(f"blob {digest[:12]} not read from redis: {error}") from error
        if not isinstance(blob, bytes):
            self.blob_stats = self.blob_stats.plus(num_misses=1)
            return None
        try:
            prompt = await asyncio.to_thread(_verified, blob, digest)
        except SoftPromptError as error:
            log.warning("blob %.12s in redis is broken: %s", digest, error)
            self.blob_stats = self.blob_stats.plus(num_errors=1)
            return None
        self.blob_stats = self.blob_stats.plus(num_hits=1)
        return prompt

    async def put_blob(self, prompt: SoftPrompt) -> None:
        blob = await asyncio.to_thread(prompt.to_bytes)
        try:
            await self.redis.set(_BLOB_KEY.format(prompt.digest), blob, ex=self._blob_ttl_s)
        except RedisError as error:
            log.warning("blob %.12s not written to redis: %s", prompt.digest, error)

    async def forget_blob(self, digest: str) -> None:
        try:
            await self.redis.delete(_BLOB_KEY.format(digest))
        except RedisError as error:
            log.warning("blob %.12s not deleted in redis, where it expires: %s", digest, error)


def redis_pool(url: str, timeout_s: float, **more: Any) -> BlockingConnectionPool:
    """Connects at the first command. Raises ServiceError for a malformed URL."""
    try:
        # A claim must fail at once when Redis is away; callers decide what to do then.
        # Who finds all connections taken waits: the ordinary pool would refuse the turn at once.
        return BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_s,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            **more,
        )
    except ValueError as error:
        raise ServiceError(f"setting FRONTDESK_REDIS_URL: {error}") from error


def _verified(blob: bytes, digest: str) -> SoftPrompt:
    """Raises SoftPromptError when `blob` is not the soft prompt of this digest."""
    prompt = SoftPrompt.from_bytes(blob)
    if prompt.digest != digest:
        raise SoftPromptError(f"it has digest {prompt.digest[:12]}, expected {digest[:12]}")
    return prompt
