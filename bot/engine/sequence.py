"""One request inside the engine. Owned by the engine thread, but for `pin` and `cancelled`, which the event loop sets."""

import asyncio
import secrets
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bot.engine.prefix import Pin
from bot.engine.request import FinishReason, GeneratedToken, GenerationRequest
from bot.engine.sampling import likeliest

# What a consumer receives: a token, or the error that ended its request.
Outcome = GeneratedToken | Exception


@dataclass(slots=True, eq=False)
class Sequence:
    """KV length is always P + text tokens - 1 between steps: the newest token's KV is written by the step that reads it."""

    request: GenerationRequest
    max_tokens: int
    outcomes: "asyncio.Queue[Outcome]" = field(default_factory=asyncio.Queue)
    generated: list[int] = field(default_factory=list)
    cancelled: bool = False
    pin: Pin | None = None  # of the soft prompt's prefix KV, once it is there
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        seed = self.request.sampling.seed
        self.generator.manual_seed(secrets.randbits(63) if seed is None else seed)

    @property
    def is_ready(self) -> bool:
        return self.pin is not None or self.request.prompt is None

    def release(self) -> None:
        if self.pin is not None:
            self.pin.release()

    @property
    def text_ids(self) -> list[int]:
        return [*self.request.token_ids, *self.generated]

    @property
    def next_position(self) -> int:
        """The position of the newest token, whose KV is not written yet."""
        return self.request.num_virtual_tokens + len(self.request.token_ids) + len(self.generated) - 1

    def append(self, token_id: int, logprobs: Tensor | None = None) -> GeneratedToken:
        """`logprobs` [V] are the model's for this token, where the request asks for them."""
        self.generated.append(token_id)
        finish_reason, num_top = self._finish_reason(token_id), self.request.sampling.top_logprobs
        if logprobs is None or num_top is None:
            return GeneratedToken(token_id, finish_reason)
        return GeneratedToken(token_id, finish_reason, float(logprobs[token_id]), likeliest(logprobs, num_top))

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        if token_id in self.request.stop_token_ids:
            return "stop"
        if self.request.stop is not None and self.request.stop(self.generated):
            return "stop"
        return "length" if len(self.generated) >= self.max_tokens else None
