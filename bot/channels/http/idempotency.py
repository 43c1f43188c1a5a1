"""The Idempotency-Key header."""

from typing import Annotated

from fastapi import Header
from pydantic import BaseModel

from bot.access.roles import Principal
from bot.conversations.idempotency import RequestKey

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="any text of your choice: a request that is sent again with it does nothing twice and gets the same answer",
    ),
]


def request_key(principal: Principal, key: str | None, route: str, body: BaseModel) -> RequestKey | None:
    """Of a request that carries one; keys of different callers have nothing to do with each other."""
    return RequestKey.of(principal.id, key, route, body.model_dump(mode="json")) if key is not None else None
