"""Parameters that many routes share."""

from typing import Annotated, Literal

from fastapi import Path, Query

ConversationId = Annotated[str, Path(min_length=1, max_length=64)]
DomainPath = Annotated[str, Path(min_length=1, max_length=48)]
VersionNumber = Annotated[int, Path(ge=1, lt=2**31)]
Limit = Annotated[int, Query(ge=1, le=100, description="most items of a page")]
Order = Annotated[Literal["asc", "desc"], Query(description="oldest or newest first")]
