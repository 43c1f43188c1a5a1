"""What the HTTP API takes and gives. The chat completion objects follow OpenAI's API reference; `frontdesk` is ours."""

import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from bot.answering import Overrides
from bot.chat import ChatRequest, TurnStarted
from bot.conversations.records import LoggedTurn
from prompt_bank.card import ROUTED
from prompt_bank.conversation import Message
from prompt_bank.errors import BadRequestError

MAX_MESSAGES = 1000
MAX_ID_CHARS = 64
MAX_PERSON_CHARS = 256

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair; send the whole character") from error
    return text


# JSON can name half a character, which neither the tokenizer nor the log takes.
Text = Annotated[str, AfterValidator(_whole_characters)]
PersonName = Annotated[Text, Field(min_length=1, max_length=MAX_PERSON_CHARS)]
StopString = Annotated[Text, Field(min_length=1)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ChatMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=_ROLES[self.role], content=text)


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatCompletionRequest(BaseModel):
    """Fields that would change the answer and are not served are refused, not ignored; unknown ones are ignored."""

    model_config = ConfigDict(json_schema_extra={"example": {"model": ROUTED, "messages": [{"role": "user", "content": "Hi"}]}})

    model: str = Field(default=ROUTED, description=f"a domain, or {ROUTED} to have the router choose")
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: dict[str, Any] | None = None
    metadata: dict[str, Text] | None = None
    safety_identifier: PersonName | None = Field(default=None, description="the caller's name for the person who asks")
    user: PersonName | None = Field(default=None, description="the older name of safety_identifier")

    @property
    def person(self) -> str | None:
        return self.safety_identifier or self.user

    @field_validator("response_format")
    @classmethod
    def _text_only(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and value.get("type") != "text":
            raise ValueError('only {"type": "text"} is served')
        return value

    def to_chat_request(self, domains: frozenset[str] | None = None) -> ChatRequest:
        """`domains` are those the caller may use, None for all. Raises BadRequestError when the roles are out of order."""
        messages = [message.to_message() for message in self.messages]
        # Many clients send their system message even when it is empty.
        messages = [message for message in messages if message.role != "system" or message.content.strip()]
        _check_order(messages)
        return ChatRequest(
            messages=messages,
            domain=None if self.model == ROUTED else self.model,
            domains=domains,
            conversation_id=_conversation_id(self.metadata or {}),
            overrides=Overrides(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                repetition_penalty=self.repetition_penalty,
                max_tokens=self.max_completion_tokens or self.max_tokens,
                seed=self.seed,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ),
        )


def _conversation_id(metadata: dict[str, str]) -> str | None:
    given = metadata.get("conversation_id")
    if given is not None and not 0 < len(given) <= MAX_ID_CHARS:
        raise BadRequestError(
            f"metadata.conversation_id has {len(given)} characters; give 1 to {MAX_ID_CHARS}, or leave it out"
        )
    return given


def _check_order(messages: list[Message]) -> None:
    spoken = [message for message in messages if message.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise BadRequestError("a system message must be the first; move it to the front")
    for index, message in enumerate(spoken):
        expected = ("user", "assistant")[index % 2]
        if message.role != expected:
            raise BadRequestError(f"messages must alternate, user first: message {index + 1} is the {message.role}'s")


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


def started_record(event: TurnStarted) -> dict[str, Any]:
    """The `frontdesk` object at the start of an answer: who answers, and why."""
    version, decision = event.version, event.decision
    return {
        "conversation_id": event.conversation_id,
        "turn_id": event.turn_id,
        "domain": version.manifest.domain if version else None,
        "version": version.manifest.version if version else None,
        "digest": version.digest if version else None,
        "disclaimer": version.card.disclaimer if version else "",
        "routing": {"reason": decision.reason, "score": decision.score, "scores": decision.scores},
    }


def finished_record(started: dict[str, Any], turn: LoggedTurn) -> dict[str, Any]:
    """The `frontdesk` object at the end of an answer."""
    return {**started, "first_token_ms": turn.first_token_ms, "total_ms": turn.total_ms}


def usage_record(turn: LoggedTurn) -> dict[str, int]:
    num_completion = len(turn.token_ids)
    return {
        "prompt_tokens": turn.num_prompt_tokens,
        "completion_tokens": num_completion,
        "total_tokens": turn.num_prompt_tokens + num_completion,
    }


def completion_record(model: str, text: str, turn: LoggedTurn, frontdesk: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    return {
        "id": f"chatcmpl-{turn.id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": turn.finish_reason, "logprobs": None}],
        "usage": usage_record(turn),
        "frontdesk": frontdesk,
    }


def chunk_record(
    model: str, turn_id: str, delta: dict[str, str], finish_reason: str | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{turn_id}",
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}],
        **more,
    }
