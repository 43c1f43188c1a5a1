"""What the HTTP API takes and gives, but for chat completions, which have modules of their own."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_ID_CHARS = 64
MAX_PERSON_CHARS = 256


def _storable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair; send the whole character") from error
    if (position := text.find("\0")) >= 0:
        raise ValueError(f"character {position} is U+0000, which cannot be stored; leave it out")
    return text


# JSON can name half a character, which neither the tokenizer nor the log takes, and U+0000, which PostgreSQL does not store.
Text = Annotated[str, AfterValidator(_storable)]
PersonName = Annotated[Text, Field(min_length=1, max_length=MAX_PERSON_CHARS)]


class FeedbackRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    turn_id: Text = Field(min_length=1, max_length=MAX_ID_CHARS)
    vote: Literal["up", "down"]
    reason: Text | None = Field(default=None, max_length=2000)
    correction: Text | None = Field(default=None, max_length=20_000, description="the answer it should have been")


class ApiError(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's error shape."""

    error: ApiError
