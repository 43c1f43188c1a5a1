"""From a version and a conversation to an answer, as served: for people, for shadows and for comparing versions alike."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from bot.conversations.records import FinishReason
from bot.engine.request import Engine, GenerationRequest, PromptRef, SamplingParams
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


@dataclass(slots=True)
class Answer:
    """What is known of an answer so far; times are from `started` (time.monotonic)."""

    started: float = field(default_factory=time.monotonic)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
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

    async def generate(
        self, version: Version, messages: Sequence[Message], overrides: Overrides, answer: Answer
    ) -> AsyncGenerator[str, None]:
        """The pieces of `version`'s answer, which is kept in `answer` as it grows; closing this cancels the generation.

        The first piece may be empty: it tells that the answer has begun. Raises BankError, BadRequestError or UnavailableError.
        """
        request = await self._request(version, messages, overrides)
        answer.num_prompt_tokens = len(request.token_ids)
        stream = TextStream(self._chat_format.decode, overrides.stop)
        async with aclosing(self._engine.generate(request)) as tokens:
            async for token in tokens:
                answer.token_ids.append(token.token_id)
                answer.first_token_ms = answer.first_token_ms or answer.elapsed_ms()
                answer.finish_reason = token.finish_reason
                piece = stream.push(answer.token_ids, is_last=token.finish_reason is not None)
                answer.text = stream.text
                if piece or len(answer.token_ids) == 1:
                    yield piece

    async def _request(self, version: Version, messages: Sequence[Message], overrides: Overrides) -> GenerationRequest:
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


def _first(override: T | None, default: T) -> T:
    return default if override is None else override


def with_brief(messages: Sequence[Message], brief: str) -> list[Message]:
    """A domain without a soft prompt is served with its brief as system message, before the caller's own."""
    if messages[0].role == "system":
        own = messages[0].content
        return [Message(role="system", content=f"{brief}\n\n{own}"), *messages[1:]]
    return [Message(role="system", content=brief), *messages]
