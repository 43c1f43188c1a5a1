"""The audit: who did what to what, and when. A row is written in the transaction of the change that it tells of."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from bot.conversations.schema import audit


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """`object` is what was changed, as `kind:id`; `detail` holds no secret and no text of a person."""

    at: datetime
    actor: str
    action: str
    object: str
    detail: dict[str, Any]


async def record(connection: AsyncConnection, actor: str, action: str, object_: str, detail: dict[str, Any]) -> None:
    values = {"at": datetime.now(UTC), "actor": actor, "action": action, "object": object_, "detail": detail}
    await connection.execute(insert(audit).values(values))


async def read(connection: AsyncConnection, num_entries: int = 100) -> list[AuditEntry]:
    """The newest entries, newest first."""
    rows = await connection.execute(select(audit).order_by(audit.c.id.desc()).limit(num_entries))
    return [AuditEntry(row.at, row.actor, row.action, row.object, row.detail) for row in rows]
