"""What the HTTP API takes and gives, but for completions and conversations, which have modules of their own."""

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
# Below 2**63, in which the log and the engine count, by what a float of the OpenAPI page can say exactly.
MAX_NUMBER = 9 * 10**18
Seed = Annotated[int, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
PersonName = Annotated[Text, Field(min_length=1, max_length=MAX_PERSON_CHARS)]


StopString = Annotated[Text, Field(min_length=1, max_length=256)]  # the inbox keeps them


class Body(BaseModel):
    """What a client sends: "3" is no number and 0 is not false, as in OpenAI's API."""

    model_config = ConfigDict(strict=True)


class OwnBody(Body):
    """Of a route that is not OpenAI's: what it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid")


class FeedbackRequest(OwnBody):
    turn_id: Text = Field(min_length=1, max_length=MAX_ID_CHARS)
    vote: Literal["up", "down"]
    reason: Text | None = Field(default=None, max_length=2000)
    correction: Text | None = Field(default=None, max_length=20_000, description="the answer it should have been")


class Usage(BaseModel):
    """Completion tokens are those of all choices; their prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Routing(BaseModel):
    """How the domain was chosen; `score` is null where nothing was."""

    reason: str
    score: float | None
    scores: dict[str, float]


class ApiError(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's error shape."""

    error: ApiError
