"""Parameters that many routes share."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import Path, Query
from pydantic import AfterValidator, AwareDatetime, BeforeValidator

from bot.channels.http.schema import MAX_NUMBER, Text

ConversationId = Annotated[Text, Path(min_length=1, max_length=64)]
DomainPath = Annotated[Text, Path(min_length=1, max_length=48)]
DomainQuery = Annotated[Text | None, Query(max_length=48)]
TurnNumber = Annotated[int | None, Query(ge=0, le=MAX_NUMBER, description="a turn's number")]
VersionNumber = Annotated[int, Path(ge=1, lt=2**31)]
Limit = Annotated[int, Query(ge=1, le=100, description="most items of a page")]
Order = Annotated[Literal["asc", "desc"], Query(description="oldest or newest first")]


def _no_number(given: Any) -> Any:
    if isinstance(given, str) and not given[:5].endswith("-"):
        raise ValueError("not a time; send it as in 2026-01-31T12:00:00Z")
    return given


def _in_utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("this time is not in the years 1 to 9999 of UTC; send one that is") from error


# With its offset: the service's own time zone is nobody's business.
Moment = Annotated[AwareDatetime, BeforeValidator(_no_number), AfterValidator(_in_utc)]
