"""API keys: made, listed, revoked and found by their secret, in the installation's database.

Only the hash of a secret is kept. A plain SHA-256 is enough: slow hashes are for passwords, which can be guessed, and a secret
here has 256 random bits. It also makes finding a key one look-up by index, which takes as long for any secret presented.
"""

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Row, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from bot.access.roles import Principal, Role
from bot.conversations import audit
from bot.conversations.database import Database
from bot.conversations.records import new_id
from bot.conversations.schema import api_keys
from prompt_bank.errors import ApiKeyError

_PREFIX = "fd-"
_SECRET_BYTES = 32
# A revoked key stops within this time, and a key in use costs the database one look-up in it.
_CACHE_S = 5.0
_MAX_CACHED = 4096


@dataclass(frozen=True, slots=True)
class NewKey:
    """What a key is made of; None as in Principal. `expires_at` None means never."""

    name: str
    role: Role
    domains: frozenset[str] | None = None
    rate_per_minute: int | None = None
    max_concurrent: int | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ApiKey:
    principal: Principal
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None

    @property
    def state(self) -> str:
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= datetime.now(UTC) else "live"


class ApiKeys:
    """Used from one event loop."""

    def __init__(self, database: Database, cache_s: float = _CACHE_S) -> None:
        self._database = database
        self._cache_s = cache_s
        # Hash to what was found and until when that counts; unknown ones too, least recently used first.
        self._found: OrderedDict[str, tuple[ApiKey | None, float]] = OrderedDict()

    async def add(self, new: NewKey, actor: str) -> str:
        """The new key's secret, which is nowhere else. Raises ApiKeyError when the name is taken."""
        secret, id_ = f"{_PREFIX}{secrets.token_urlsafe(_SECRET_BYTES)}", new_id()
        values: dict[str, Any] = {
            "name": new.name,
            "role": new.role,
            "domains": None if new.domains is None else sorted(new.domains),
            "rate_per_minute": new.rate_per_minute,
            "max_concurrent": new.max_concurrent,
        }
        dates = {"created_at": datetime.now(UTC), "created_by": actor, "expires_at": new.expires_at}
        told = {**values, "expires_at": new.expires_at and new.expires_at.isoformat(timespec="seconds")}
        try:
            async with self._database.writing() as connection:
                await connection.execute(insert(api_keys).values(id=id_, hash=_hash(secret), **values, **dates))
                await audit.record(connection, actor, "add key", f"key:{id_}", told)
        except IntegrityError as error:
            raise ApiKeyError(
                f"there is a key {new.name!r} already; choose another name, or revoke it: frontdesk keys revoke {new.name}"
            ) from error
        return secret

    async def list(self) -> list[ApiKey]:
        """Every key there ever was, newest first."""
        async with self._database.reading() as connection:
            rows = await connection.execute(select(api_keys).order_by(api_keys.c.created_at.desc(), api_keys.c.id))
            return [_key(row) for row in rows]

    async def revoke(self, name_or_id: str, actor: str) -> ApiKey:
        """The key as it was. Raises ApiKeyError when there is none, or it is revoked already."""
        named = or_(api_keys.c.id == name_or_id, api_keys.c.name == name_or_id)
        query = select(api_keys).where(named, api_keys.c.revoked_at.is_(None))
        async with self._database.writing() as connection:
            rows = (await connection.execute(query)).all()
            if len(rows) != 1:
                raise ApiKeyError(f"{len(rows)} live keys have the name or id {name_or_id!r}; see frontdesk keys list")
            key = _key(rows[0])
            revoked = {"revoked_at": datetime.now(UTC)}
            await connection.execute(update(api_keys).where(api_keys.c.id == key.principal.id).values(revoked))
            await audit.record(connection, actor, "revoke key", f"key:{key.principal.id}", {"name": key.principal.name})
        return key

    async def has_live(self) -> bool:
        return any(key.state == "live" for key in await self.list())

    async def find(self, secret: str) -> ApiKey | None:
        """The key of this secret, revoked and expired ones too; at most some seconds old."""
        hash_, now = _hash(secret), time.monotonic()
        found, until = self._found.get(hash_, (None, 0.0))
        if until <= now:
            found = await self._read(hash_)
            self._found[hash_] = found, now + self._cache_s
        self._found.move_to_end(hash_)
        while len(self._found) > _MAX_CACHED:
            self._found.popitem(last=False)
        return found

    async def _read(self, hash_: str) -> ApiKey | None:
        async with self._database.reading() as connection:
            row = (await connection.execute(select(api_keys).where(api_keys.c.hash == hash_))).one_or_none()
        return None if row is None else _key(row)


def expiry(days: int | None) -> datetime | None:
    return None if days is None else datetime.now(UTC) + timedelta(days=days)


def domains_of(names: Iterable[str]) -> frozenset[str] | None:
    """No names are all domains."""
    return frozenset(names) or None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _key(row: Row[Any]) -> ApiKey:
    return ApiKey(
        principal=Principal(
            id=row.id,
            name=row.name,
            role=row.role,
            domains=None if row.domains is None else frozenset(row.domains),
            rate_per_minute=row.rate_per_minute,
            max_concurrent=row.max_concurrent,
        ),
        created_at=row.created_at,
        created_by=row.created_by,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
