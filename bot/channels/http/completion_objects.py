"""What POST /v1/chat/completions gives: the objects of OpenAI's API reference, each with `frontdesk`, which is ours."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from bot.answering import Answer, ShownToken, TokenText
from bot.channels.http.schema import Routing, Usage
from bot.turn import TurnFinished, TurnStarted


class TopLogprob(BaseModel):
    """`token` has U+FFFD where its bytes are a part of a character; `bytes` are exact."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    """`refusal` instead of `content` is a clarifying question to a caller who asked for JSON."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChoiceLogprobs | None


class Started(BaseModel):
    """Who answers, and why. Domain, version and digest are null for a clarifying question."""

    conversation_id: str
    turn_id: str
    domain: str | None
    version: int | None
    digest: str | None
    disclaimer: str
    routing: Routing


class Finished(Started):
    first_token_ms: float | None
    total_ms: float


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    frontdesk: Finished


class Delta(BaseModel):
    """What is new in a choice; a field that is left out has nothing new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None
    logprobs: ChoiceLogprobs | None


class ChatCompletionChunk(BaseModel):
    """`frontdesk` is in the first chunk and in the last that has choices; `usage`, if asked for, is null but in the last."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    frontdesk: Finished | Started | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """Makes the objects of one answer to `body.model`, which share id and time."""

    model: str
    started: TurnStarted
    is_json: bool
    has_logprobs: bool
    has_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, finished: TurnFinished) -> dict[str, Any]:
        choices = [
            Choice(
                index=index,
                message=AnswerMessage(role="assistant", **{"content": None, "refusal": None, **self._said(answer.text)}),
                finish_reason=_finish_reason(answer),
                logprobs=self._logprobs(answer.shown_tokens),
            )
            for index, answer in enumerate(finished.answers)
        ]
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage_of(finished),
            frontdesk=finished_record(self.started, finished),
        ).model_dump()

    def first_chunk(self, index: int) -> dict[str, Any]:
        choice = self._choice(index, Delta(role="assistant", content=""))
        return self._chunk([choice], **({"frontdesk": started_record(self.started)} if index == 0 else {}))

    def text_chunk(self, text: str, index: int, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        return self._chunk([self._choice(index, Delta(**self._said(text)), logprobs=self._logprobs(tokens))])

    def last_chunk(self, index: int, finished: TurnFinished) -> dict[str, Any]:
        choice = self._choice(index, Delta(), _finish_reason(finished.answers[index]))
        is_last = index + 1 == len(finished.answers)
        return self._chunk([choice], **({"frontdesk": finished_record(self.started, finished)} if is_last else {}))

    def usage_chunk(self, finished: TurnFinished) -> dict[str, Any]:
        return self._chunk([], usage=usage_of(finished))

    @property
    def _id(self) -> str:
        return f"chatcmpl-{self.started.turn_id}"

    def _said(self, text: str) -> dict[str, str]:
        """A clarifying question is no JSON: a client that parses the content must not take it for the answer."""
        return {"refusal" if self.is_json and self.started.version is None else "content": text}

    def _logprobs(self, tokens: Sequence[ShownToken]) -> ChoiceLogprobs | None:
        return ChoiceLogprobs(content=[_token_logprob(token) for token in tokens], refusal=None) if self.has_logprobs else None

    def _choice(
        self,
        index: int,
        delta: Delta,
        finish_reason: Literal["stop", "length"] | None = None,
        logprobs: ChoiceLogprobs | None = None,
    ) -> ChunkChoice:
        return ChunkChoice(index=index, delta=delta, finish_reason=finish_reason, logprobs=logprobs)

    def _chunk(self, choices: list[ChunkChoice], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if self.has_usage else {}
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self.created,
            model=self.model,
            choices=choices,
            **{**usage, **more},
        )
        return chunk.model_dump(exclude_unset=True)


def repeated_chunks(completion: dict[str, Any], has_usage: bool) -> Iterator[dict[str, Any]]:
    """A whole answer that was given before, as the chunks of a stream: each choice's text in one."""
    common = {name: completion[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for choice in completion["choices"]:
        said = {name: choice["message"][name] for name in ("content", "refusal") if choice["message"][name] is not None}
        delta = {"role": "assistant", "content": "", **said}
        first = {"index": choice["index"], "delta": delta, "finish_reason": None, "logprobs": choice["logprobs"]}
        yield {**common, "choices": [first], "frontdesk": completion["frontdesk"]}
        yield {**common, "choices": [{**first, "delta": {}, "finish_reason": choice["finish_reason"], "logprobs": None}]}
    if has_usage:
        yield {**common, "choices": [], "usage": completion["usage"]}


def started_record(event: TurnStarted) -> Started:
    version, decision = event.version, event.decision
    return Started(
        conversation_id=event.conversation_id,
        turn_id=event.turn_id,
        domain=version.manifest.domain if version else None,
        version=version.manifest.version if version else None,
        digest=version.digest if version else None,
        disclaimer=version.card.disclaimer if version else "",
        routing=Routing(reason=decision.reason, score=decision.score, scores=decision.scores),
    )


def finished_record(started: TurnStarted, finished: TurnFinished) -> Finished:
    turn = finished.turn
    return Finished(**started_record(started).model_dump(), first_token_ms=turn.first_token_ms, total_ms=turn.total_ms)


def usage_of(finished: TurnFinished) -> Usage:
    num_prompt = finished.turn.num_prompt_tokens
    num_completion = sum(len(answer.token_ids) for answer in finished.answers)
    return Usage(prompt_tokens=num_prompt, completion_tokens=num_completion, total_tokens=num_prompt + num_completion)


def _finish_reason(answer: Answer) -> Literal["stop", "length"]:
    return "length" if answer.finish_reason == "length" else "stop"


def _token_logprob(token: ShownToken) -> TokenLogprob:
    likeliest = [TopLogprob(**_token_text(other)) for other in token.likeliest]
    return TokenLogprob(**_token_text(token), top_logprobs=likeliest)


def _token_text(token: TokenText) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.bytes)}
