"""What POST /v1/chat/completions takes, after OpenAI's API reference."""

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from bot.answering import Overrides
from bot.channels.http.schema import MAX_ID_CHARS, Body, PersonName, Seed, StopString, Text
from bot.structured_output import ANY_OBJECT
from bot.turn import ChatRequest
from prompt_bank.card import ROUTED
from prompt_bank.conversation import Message
from prompt_bank.errors import BadRequestError

MAX_MESSAGES = 1000
MAX_CHOICES = 8  # of one request; OpenAI takes more, a batch here has a few rows
MAX_TOP_LOGPROBS = 20

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role=_ROLES[self.role], content=text)


class StreamOptions(Body):
    include_usage: bool = False


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    """Held to in any case, whether `strict` or not: an answer that ends is valid."""

    model_config = ConfigDict(extra="forbid")

    name: Text = Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")
    description: Text | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]

# What is not served may be named, as many clients do, with the value that asks for nothing.
_Zero = Annotated[float, Field(ge=0, le=0)]
_NoTools = Annotated[list[Any], Field(max_length=0)] | None


class ChatCompletionRequest(Body):
    """Fields that would change the answer and are not served are refused, not ignored; unknown ones are ignored."""

    model_config = ConfigDict(json_schema_extra={"example": {"model": ROUTED, "messages": [{"role": "user", "content": "Hi"}]}})

    model: Text = Field(default=ROUTED, description=f"a domain, or {ROUTED} to have the router choose")
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = Field(default=None, description="choice i draws with seed + i")
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: bool | None = Field(default=None, description="the model's own, before temperature, penalties and formats")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    metadata: dict[str, Text] | None = None
    safety_identifier: PersonName | None = Field(default=None, description="the caller's name for the person who asks")
    user: PersonName | None = Field(default=None, description="the older name of safety_identifier")
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    tools: _NoTools = None
    functions: _NoTools = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _logprobs_asked_for(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given without logprobs; set logprobs to true, or leave top_logprobs out")
        return self

    @property
    def is_json(self) -> bool:
        return self.response_format is not None and not isinstance(self.response_format, TextFormat)

    @property
    def person(self) -> str | None:
        return self.safety_identifier or self.user

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
                json_schema=_json_schema(self.response_format),
            ),
            num_answers=self.n or 1,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def _json_schema(response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> str | None:
    if isinstance(response_format, JsonObjectFormat):
        return ANY_OBJECT
    if isinstance(response_format, JsonSchemaFormat):
        try:
            return json.dumps(response_format.json_schema.schema_)
        except RecursionError as error:
            raise BadRequestError("response_format: the schema is nested too deeply; send a flatter one") from error
    return None


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
