"""From a version and a conversation to an answer, as served: for people, for shadows and for comparing versions alike."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from bot.conversations.records import FinishReason
from bot.engine.request import Engine, GeneratedToken, GenerationRequest, LogitsProcessor, PromptRef, SamplingParams
from bot.interleaving import interleaved
from bot.structured_output import StructuredOutput
from bot.text_stream import TextStream, contains_any
from prompt_bank.bank import Bank
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Message
from prompt_bank.version import ServedModel, Version, check_served_model

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Overrides:
    """What a caller sets instead of the card's sampling defaults; None leaves the default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: str | None = None  # what the answer is to be valid against, as text


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token with its log probability. Its bytes may be a part of a character; `text` then has U+FFFD in their place."""

    bytes: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.bytes.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class ShownToken(TokenText):
    """A token of an answer, with the likeliest ones in its place."""

    likeliest: tuple[TokenText, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """The next text of the answer with this index; where log probabilities are asked for, with the tokens that begin in it."""

    text: str
    index: int = 0
    tokens: tuple[ShownToken, ...] = ()


@dataclass(slots=True)
class Answer:
    """What is known of an answer so far; times are from `started` (time.monotonic)."""

    started: float = field(default_factory=time.monotonic)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    shown_tokens: list[ShownToken] = field(default_factory=list)  # empty unless log probabilities are asked for
    num_prompt_tokens: int = 0
    first_token_ms: float | None = None
    finish_reason: FinishReason | None = None  # None until the answer is whole

    def elapsed_ms(self) -> float:
        return (time.monotonic() - self.started) * 1000


class Answerer:
    """Used from one event loop. Model work runs on the engine's thread, rendering on worker threads."""

    def __init__(
        self, bank: Bank, engine: Engine, model: ServedModel, chat_format: ChatFormat, stop_token_ids: frozenset[int]
    ) -> None:
        self._bank = bank
        self._engine = engine
        self._model = model
        self._chat_format = chat_format
        self._stop_token_ids = stop_token_ids
        self._structured_output = StructuredOutput(chat_format.tokenizer, stop_token_ids)

    async def generate(
        self,
        version: Version,
        messages: Sequence[Message],
        overrides: Overrides,
        answers: Sequence[Answer],
        top_logprobs: int | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of `version`'s answers, one for each of `answers`, which are kept there as they grow.

        They are decoded together; the i-th draws with the i-th seed from the one given. Closing this cancels them all, and so
        does the refusal or error of one. An answer's first piece may be empty: it tells that the answer has begun. Raises
        BankError, BadRequestError or UnavailableError.
        """
        request = await self._request(version, messages, overrides, top_logprobs)
        requests = await self._one_each(request, overrides.json_schema, len(answers))
        generations = [self._pieces(*one, overrides.stop) for one in zip(requests, answers, range(len(answers)), strict=True)]
        # A task for each token is spared where there is nothing to wait for beside it.
        pieces = generations[0] if len(generations) == 1 else interleaved(generations)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def _one_each(self, request: GenerationRequest, json_schema: str | None, num_answers: int) -> list[GenerationRequest]:
        """The same request for each answer, with a seed and a grammar of its own. Raises BadRequestError."""
        processors: list[tuple[LogitsProcessor, ...]] = [()] * num_answers
        if json_schema is not None:
            grammar = await asyncio.to_thread(self._structured_output.grammar, json_schema)
            processors = [(grammar.processor(),) for _ in range(num_answers)]
        return [
            replace(request, sampling=_with_seed(request.sampling, index), logits_processors=own)
            for index, own in enumerate(processors)
        ]

    async def _pieces(
        self, request: GenerationRequest, answer: Answer, index: int, stop: Sequence[str]
    ) -> AsyncGenerator[Piece, None]:
        stream = TextStream(self._chat_format.decode, stop)
        answer.num_prompt_tokens = len(request.token_ids)
        told: list[GeneratedToken] = []  # those whose log probability is known
        async with aclosing(self._engine.generate(request)) as tokens:
            async for token in tokens:
                answer.token_ids.append(token.token_id)
                answer.first_token_ms = answer.first_token_ms or answer.elapsed_ms()
                answer.finish_reason = token.finish_reason
                text = stream.push(answer.token_ids, is_last=token.finish_reason is not None)
                answer.text = stream.text
                if token.logprob is not None and token.token_id not in self._stop_token_ids:
                    told.append(token)
                num_shown = len(answer.shown_tokens)
                answer.shown_tokens += map(self._shown_token, told[num_shown : stream.num_shown_tokens])
                if text or len(answer.token_ids) == 1:
                    yield Piece(text, index, tuple(answer.shown_tokens[num_shown:]))

    def _shown_token(self, token: GeneratedToken) -> ShownToken:
        assert token.logprob is not None
        bytes_of = self._chat_format.token_bytes
        likeliest = tuple(TokenText(bytes_of(token_id), logprob) for token_id, logprob in token.top_logprobs)
        return ShownToken(bytes_of(token.token_id), token.logprob, likeliest)

    async def _request(
        self, version: Version, messages: Sequence[Message], overrides: Overrides, top_logprobs: int | None
    ) -> GenerationRequest:
        prompt = self._prompt_of(version)
        defaults = version.card.sampling
        max_tokens = overrides.max_tokens or defaults.max_tokens
        context_tokens = self._engine.context_tokens - (prompt.num_virtual_tokens if prompt else 0)
        room = max(context_tokens - max_tokens, context_tokens // 2)
        served = messages if prompt else with_brief(messages, version.card.brief)
        rendered = await asyncio.to_thread(self._chat_format.render, served, room)
        if rendered.num_dropped_messages:
            log.info("%d old messages left out of the context", rendered.num_dropped_messages)
        return GenerationRequest(
            token_ids=rendered.token_ids,
            max_tokens=max_tokens,
            prompt=prompt,
            sampling=SamplingParams(
                temperature=_first(overrides.temperature, defaults.temperature),
                top_p=_first(overrides.top_p, defaults.top_p),
                top_k=_first(overrides.top_k, defaults.top_k),
                repetition_penalty=_first(overrides.repetition_penalty, defaults.repetition_penalty),
                seed=overrides.seed,
                top_logprobs=top_logprobs,
            ),
            stop_token_ids=self._stop_token_ids,
            stop=contains_any(self._chat_format.decode, overrides.stop) if overrides.stop else None,
        )

    def _prompt_of(self, version: Version) -> PromptRef | None:
        record = version.manifest.soft_prompt
        if record is None:
            return None
        check_served_model(version, self._model)  # also when the engine has its KV already
        return PromptRef(record.digest, record.num_virtual_tokens, partial(self._bank.soft_prompt, version, self._model))


def _with_seed(sampling: SamplingParams, index: int) -> SamplingParams:
    """Of the answer with this index: with one seed for all they would be the same answer."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)


def _first(override: T | None, default: T) -> T:
    return default if override is None else override


def with_brief(messages: Sequence[Message], brief: str) -> list[Message]:
    """A domain without a soft prompt is served with its brief as system message, before the caller's own."""
    if messages[0].role == "system":
        own = messages[0].content
        return [Message(role="system", content=f"{brief}\n\n{own}"), *messages[1:]]
    return [Message(role="system", content=brief), *messages]
