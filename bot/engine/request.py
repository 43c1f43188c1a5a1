"""What the engine is asked for and what it gives: the seam between it and everything above."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from prompt_bank.soft_prompt import SoftPrompt

FinishReason = Literal["stop", "length"]

# Logits [V] of one row, with all its text ids so far, to logits [V].
LogitsProcessor = Callable[[Sequence[int], Tensor], Tensor]
# Whether generation ends, given the generated ids so far.
StopCondition = Callable[[Sequence[int]], bool]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """`temperature` 0 is greedy; `top_k` 0 is off; a `seed` makes the draws repeatable whatever else is in the batch.

    `top_logprobs` asks for each token's log probability and those of the so many likeliest ones, 0 or more; None is off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class PromptRef:
    """A soft prompt by its digest. `load` is called on the event loop, and only when the engine has no prefix KV of it."""

    digest: str
    num_virtual_tokens: int
    load: Callable[[], Awaitable[SoftPrompt]]

    @classmethod
    def of(cls, prompt: SoftPrompt) -> "PromptRef":
        """Of a soft prompt that is in hand."""

        async def load() -> SoftPrompt:
            return prompt

        return cls(prompt.digest, prompt.num_virtual_tokens, load)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`token_ids` [T] is the text; the soft prompt's P virtual tokens stand before it."""

    token_ids: Sequence[int]
    max_tokens: int
    prompt: PromptRef | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    stop: StopCondition | None = None
    logits_processors: Sequence[LogitsProcessor] = ()

    @property
    def num_virtual_tokens(self) -> int:
        return self.prompt.num_virtual_tokens if self.prompt else 0


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of an answer; the last one carries the reason. A stop token is given too, with reason `stop`.

    Log probabilities are the model's own, before penalties, processors, temperature, top-k and top-p; None and () unless the
    request asks for them. `top_logprobs` are (token id, log probability), likeliest first.
    """

    token_id: int
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """Requests for prefix KV by how they ended, and what is held. Joining a computation that is under way is a hit."""

    num_hits: int
    num_misses: int
    num_errors: int
    num_evictions: int
    num_entries: int
    num_bytes: int
    num_pinned_bytes: int


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A request whose soft prompt is being loaded is waiting."""

    num_active: int
    num_waiting: int
    num_generated_tokens: int
    prefix: PrefixStats


class Engine(Protocol):
    @property
    def context_tokens(self) -> int:
        """The most virtual, text and generated tokens one sequence may have together."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedToken, None]:
        """Tokens as they are generated. Closing the generator cancels the request and frees its slot at the next step.

        Raises MessageTooLongError or EngineBusyError at once, before the soft prompt is loaded; later EngineStoppedError,
        EngineFailedError, SoftPromptError when what was loaded is another soft prompt, or the error of loading it.
        """
        ...

    def stats(self) -> EngineStats: ...

    @property
    def is_running(self) -> bool: ...

    def is_half_idle(self) -> bool:
        """Whether there is room for work that can be left out."""
        ...
