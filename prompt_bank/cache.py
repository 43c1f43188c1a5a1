"""What the bank keeps in Redis: soft-prompt blobs by digest (with a TTL) and the published pointer table (without).

Only blobs carry a TTL, so under `volatile-lru` a full memory evicts blobs and never the table. Knows nothing of the store but
its id, which keeps installations that share one Redis apart; blobs they may share, as a digest means the same everywhere.
"""

import asyncio
import logging
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
if redis.call('HGET', KEYS[1], 'pending') == ARGV[1] then redis.call('HSET', KEYS[1], 'pending', '') end
"""


@dataclass(frozen=True, slots=True)
class TableStamp:
    """Which table Redis holds. The id changes when Redis lost its data, the epoch at every change of a pointer."""

    id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class TableClaim:
    """What a claim reads in Redis: the table's stamp, None when Redis has none, and changes that may not be there yet."""

    stamp: TableStamp | None
    pending: str


def table_claim(id_: bytes | None, epoch: bytes | None, pending: bytes | None) -> TableClaim:
    """From the three fields of the pointers' hash, as a script returns them."""
    stamp = TableStamp(id_.decode(), int(epoch)) if id_ and epoch else None
    return TableClaim(stamp, pending.decode() if pending else "")


@dataclass(frozen=True, slots=True)
class BlobStats:
    """How reads of blobs ended; an error is a Redis that did not answer or a blob that is not what its key says."""

    num_hits: int = 0
    num_misses: int = 0
    num_errors: int = 0


class RedisCache:
    """Errors of the server or the network become RedisUnavailableError; a blob that cannot be written or deleted is logged."""

    def __init__(self, redis: "Redis", store_id: str, blob_ttl_s: int) -> None:
        self._redis = redis
        self.prefix = _PREFIX.format(store_id)  # of this installation's keys
        self._table_key = f"{self.prefix}pointers"
        self._blob_ttl_s = blob_ttl_s
        self._publish = redis.register_script(_PUBLISH)
        self._begin = redis.register_script(_BEGIN)
        self._forget_pending = redis.register_script(_FORGET_PENDING)
        self.num_connections = 0  # made so far: after a new one, Redis may be another than before
        self.blob_stats = BlobStats()

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
        await self._redis.aclose()

    @property
    def redis(self) -> "Redis":
        """The client, for others who keep things of this installation in the same Redis."""
        return self._redis

    @property
    def table_key(self) -> str:
        return self._table_key

    async def check_policy(self) -> None:
        """Raises ServiceError when this server may evict keys without a TTL: pointers could vanish."""
        try:
            config: Any = await self._redis.config_get("maxmemory-policy", "append*")
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
        id_, epoch, pending = await self._table_fields("id", "epoch", "pending")
        return TableClaim(TableStamp(id_, int(epoch)) if id_ and epoch else None, pending or "")

    async def begin_change(self) -> str:
        """Says that the store may soon hold a change that is not here yet; gives the token that publishing it takes back."""
        token = uuid4().hex
        await self._run(self._begin, token)
        return token

    async def forget_pending(self, pending: str) -> None:
        """Takes back changes whose authors are gone, unless others were added meanwhile."""
        await self._run(self._forget_pending, pending)

    async def _run(self, script: AsyncScript, *arguments: str | int) -> Any:
        try:
            return await script(keys=[self._table_key], args=list(arguments))
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}") from error

    async def table(self) -> tuple[TableStamp, PointerTable] | None:
        id_, epoch, table = await self._table_fields("id", "epoch", "table")
        if not (id_ and epoch and table):
            return None
        try:
            return TableStamp(id_, int(epoch)), PointerTable.model_validate_json(table)
        except ValidationError as error:
            log.error("the pointer table in redis is broken, the store's is taken instead: %s", error)
            await self.forget_table()
            return None

    async def _table_fields(self, *fields: str) -> list[str | None]:
        try:
            values = await self._redis.hmget(self._table_key, list(fields))
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}") from error
        return [value.decode() if isinstance(value, bytes) else value for value in values]

    async def publish_table(self, table: PointerTable, token: str = "") -> TableStamp:
        """Puts `table` into Redis unless a newer one is there, and takes `token` back; gives the stamp of what is there then.

        An empty Redis gets a new table id.
        """
        serialized = table.model_dump_json(exclude_none=True)
        id_, epoch = await self._run(self._publish, uuid4().hex, table.epoch, serialized, token)
        return TableStamp(id_.decode(), int(epoch))

    async def forget_table(self) -> None:
        try:
            await self._redis.delete(self._table_key)
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}") from error

    async def get_blob(self, digest: str) -> SoftPrompt | None:
        """None when it is not there, or not what its key says. Raises RedisUnavailableError."""
        try:
            blob = await self._redis.getex(_BLOB_KEY.format(digest), ex=self._blob_ttl_s)
        except RedisError as error:
            self._count(num_errors=1)
            raise RedisUnavailableError(f"blob {digest[:12]} not read from redis: {error}") from error
        if not isinstance(blob, bytes):
            self._count(num_misses=1)
            return None
        try:
            prompt = await asyncio.to_thread(_verified, blob, digest)
        except SoftPromptError as error:
            log.warning("blob %.12s in redis is broken: %s", digest, error)
            self._count(num_errors=1)
            return None
        self._count(num_hits=1)
        return prompt

    def _count(self, num_hits: int = 0, num_misses: int = 0, num_errors: int = 0) -> None:
        before = self.blob_stats
        self.blob_stats = BlobStats(before.num_hits + num_hits, before.num_misses + num_misses, before.num_errors + num_errors)

    async def put_blob(self, prompt: SoftPrompt) -> None:
        blob = await asyncio.to_thread(prompt.to_bytes)
        try:
            await self._redis.set(_BLOB_KEY.format(prompt.digest), blob, ex=self._blob_ttl_s)
        except RedisError as error:
            log.warning("blob %.12s not written to redis: %s", prompt.digest, error)

    async def forget_blob(self, digest: str) -> None:
        try:
            await self._redis.delete(_BLOB_KEY.format(digest))
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
