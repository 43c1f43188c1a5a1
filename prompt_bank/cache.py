"""What the bank keeps in Redis: soft-prompt blobs by digest (with a TTL) and the published pointer table (without).

Only blobs carry a TTL, so under `volatile-lru` a full memory evicts blobs and never the table. Knows nothing of the store.
"""

import logging
from dataclasses import dataclass
from uuid import uuid4

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from prompt_bank.errors import RedisUnavailableError, ServiceError, SoftPromptError
from prompt_bank.soft_prompt import SoftPrompt
from prompt_bank.store import PointerTable

log = logging.getLogger(__name__)

_TABLE_KEY = "frontdesk:pointers"
_BLOB_KEY = "frontdesk:blob:{}"

# A slower writer must not put an older table over a newer one.
_PUBLISH = """
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then redis.call('HSET', KEYS[1], 'id', ARGV[1]) end
if not epoch or tonumber(epoch) < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], 'epoch', ARGV[2], 'table', ARGV[3])
end
return redis.call('HGET', KEYS[1], 'id')
"""


@dataclass(frozen=True, slots=True)
class TableStamp:
    """Which table Redis holds. The id changes when Redis lost its data, the epoch at every change of a pointer."""

    id: str
    epoch: int


class RedisCache:
    """Errors of the server or the network become RedisUnavailableError for the table; blobs fall back to a miss."""

    def __init__(self, redis: "Redis", blob_ttl_s: int) -> None:
        self._redis = redis
        self._blob_ttl_s = blob_ttl_s
        self._publish = redis.register_script(_PUBLISH)

    async def check_policy(self) -> None:
        """Raises ServiceError when this server may evict keys without a TTL: pointers could vanish."""
        try:
            policy = (await self._redis.config_get("maxmemory-policy")).get("maxmemory-policy", "noeviction")
        except ResponseError:
            log.warning("redis forbids CONFIG GET; make sure that maxmemory-policy is volatile-lru or noeviction")
            return
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}; start it or set FRONTDESK_REDIS_URL") from error
        if str(policy).startswith("allkeys"):
            raise ServiceError(f"redis has maxmemory-policy {policy}, which may evict live pointers; set it to volatile-lru")

    async def table_stamp(self) -> TableStamp | None:
        """One round trip, whatever the number of domains; None when Redis has no table."""
        id_, epoch = await self._table_fields("id", "epoch")
        return TableStamp(id_, int(epoch)) if id_ and epoch else None

    async def table(self) -> tuple[TableStamp, PointerTable] | None:
        id_, epoch, table = await self._table_fields("id", "epoch", "table")
        if not (id_ and epoch and table):
            return None
        return TableStamp(id_, int(epoch)), PointerTable.model_validate_json(table)

    async def _table_fields(self, *fields: str) -> list[str | None]:
        try:
            values = await self._redis.hmget(_TABLE_KEY, list(fields))
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}") from error
        return [value.decode() if isinstance(value, bytes) else value for value in values]

    async def publish_table(self, table: PointerTable) -> TableStamp:
        """Puts `table` into Redis unless a newer one is there; an empty Redis gets a new table id."""
        try:
            id_ = await self._publish(keys=[_TABLE_KEY], args=[uuid4().hex, table.epoch, table.model_dump_json()])
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}") from error
        return TableStamp(id_.decode(), table.epoch)

    async def forget_table(self) -> None:
        try:
            await self._redis.delete(_TABLE_KEY)
        except RedisError as error:
            raise RedisUnavailableError(f"redis does not answer: {error}") from error

    async def get_blob(self, digest: str) -> SoftPrompt | None:
        try:
            blob = await self._redis.getex(_BLOB_KEY.format(digest), ex=self._blob_ttl_s)
        except RedisError as error:
            log.warning("blob %.12s not read from redis: %s", digest, error)
            return None
        if not isinstance(blob, bytes):
            return None
        try:
            prompt = SoftPrompt.from_bytes(blob)
        except SoftPromptError as error:
            log.warning("blob %.12s in redis is broken: %s", digest, error)
            return None
        return prompt if prompt.digest == digest else None

    async def put_blob(self, prompt: SoftPrompt) -> None:
        try:
            await self._redis.set(_BLOB_KEY.format(prompt.digest), prompt.to_bytes(), ex=self._blob_ttl_s)
        except RedisError as error:
            log.warning("blob %.12s not written to redis: %s", prompt.digest, error)
