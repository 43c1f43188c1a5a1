"""Idempotency keys: a request that is sent again with the same key gets the first one's answer and does nothing twice.

After the IETF's draft-ietf-httpapi-idempotency-key-header. Kept for a day, in SQL: a key must outlive a Redis that is full.
Only what succeeded is kept; a request that failed may be tried again with its key.
"""

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Delete, Row, Update, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from bot.conversations.database import Database
from bot.conversations.ending import Endings
from bot.conversations.records import new_id
from bot.conversations.schema import idempotent_requests as requests
from prompt_bank.errors import IdempotencyMismatchError, RequestUnderWayError

_KEPT = timedelta(days=1)
_ABANDONED = timedelta(minutes=10)  # no answer takes as long: whoever began it has died


@dataclass(frozen=True, slots=True)
class RequestKey:
    """`digest` is of everything that was asked for."""

    scope: str
    key: str
    digest: str

    @classmethod
    def of(cls, scope: str, key: str, route: str, body: Any) -> "RequestKey":
        asked = json.dumps([route, body], sort_keys=True, default=str)
        return cls(scope, key, hashlib.sha256(asked.encode()).hexdigest())


class IdempotentRequests:
    """Safe to use from many tasks of one event loop. Every method raises LogUnavailableError."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._endings = Endings()
        self._insert = database.insert_if_new(requests)

    async def once(self, key: RequestKey | None, work: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        """What `work` gave the first time. Without a key it is done each time.

        Raises IdempotencyMismatchError when the key came with another request, RequestUnderWayError while the first one runs.
        """
        if key is None:
            return await work()
        attempt, stored = await self.begin(key)
        if stored is not None:
            return stored
        try:
            response = await work()
        except BaseException:
            await self.forget(key, attempt)
            raise
        await self.finish(key, attempt, response)
        return response

    async def begin(self, key: RequestKey) -> tuple[str, dict[str, Any] | None]:
        """Names this attempt, and gives the answer if there is one. Raises as `once` does."""
        now, attempt = datetime.now(UTC), new_id()
        async with self._database.writing() as connection:
            first = await self._first(connection, key, attempt, now)
            if first.attempt == attempt:
                return attempt, None
            if first.response is not None:
                return first.attempt, first.response
            if first.created_at > now - _ABANDONED:
                raise RequestUnderWayError(f"the first request with idempotency key {key.key!r} is under way; wait for it")
            await connection.execute(update(requests).where(*_of(key, first.attempt)).values(attempt=attempt, created_at=now))
        return attempt, None

    async def id_for(self, key: RequestKey) -> str:
        """The same id each time, for what this request makes. Raises IdempotencyMismatchError."""
        async with self._database.writing() as connection:
            first = await self._first(connection, key, new_id(), datetime.now(UTC))
        id_: str = first.attempt
        return id_

    async def _first(self, connection: AsyncConnection, key: RequestKey, attempt: str, now: datetime) -> Row[Any]:
        """The first request with this key, which is this one if there is none before. Raises IdempotencyMismatchError."""
        values = {"scope": key.scope, "key": key.key, "request_digest": key.digest, "attempt": attempt, "created_at": now}
        is_it = (requests.c.scope == key.scope) & (requests.c.key == key.key)
        await connection.execute(delete(requests).where(requests.c.created_at < now - _KEPT))
        await connection.execute(self._insert, values)
        row = (await connection.execute(select(requests).where(is_it).with_for_update())).one()
        if row.request_digest != key.digest:
            raise IdempotencyMismatchError(f"idempotency key {key.key!r} came with another request before; take a new key")
        return row

    async def finish(self, key: RequestKey, attempt: str, response: dict[str, Any]) -> None:
        await self._end(update(requests).where(*_of(key, attempt)).values(response=response))

    async def forget(self, key: RequestKey, attempt: str) -> None:
        await self._end(delete(requests).where(*_of(key, attempt)))

    async def _end(self, statement: Update | Delete) -> None:
        await self._endings.finish(self._execute(statement))  # else the key would be taken

    async def _execute(self, statement: Update | Delete) -> None:
        async with self._database.writing() as connection:
            await connection.execute(statement)

    async def close(self) -> None:
        """Waits for what is being written; called before the database is closed."""
        await self._endings.wait()


def _of(key: RequestKey, attempt: str) -> tuple[Any, ...]:
    return requests.c.scope == key.scope, requests.c.key == key.key, requests.c.attempt == attempt
