"""Answers that are JSON of a given schema: logits processors for the engine, which itself knows no JSON.

llguidance (https://github.com/guidance-ai/llguidance) turns a schema into a grammar and tells at every step which tokens may
come. It refuses what it cannot hold an answer to, so an answer that ends is valid. Used from any thread.
"""

import threading
from collections.abc import Sequence
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from prompt_bank.errors import BadRequestError

ANY_OBJECT = '{"type": "object"}'

MAX_SCHEMA_BYTES = 64 * 1024

_MAX_REASON_CHARS = 300

# A grammar's step runs between two steps of the model, for which everybody in the batch waits: one that takes more than some
# ten milliseconds is given up. Ordinary schemas take a tenth of one. Errors must not quote an answer, which goes to no log.
_LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=10_000, max_lexer_states=20_000, verbose_errors=False)

# Over what a schema itself may set as `x-guidance`: nothing in it may be passed over, and the text must be JSON.
_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
    # Bounded, or a small model may fill a whole answer with blanks between two tokens of JSON.
    "whitespace_pattern": r"[\x20\n\r\t]{1,20}",
}

# A schema may be too ambiguous only after its first bracket.
_NUM_TRIED_STEPS = 2


class JsonGrammar:
    """A schema that can be served; makes the processor of one generation each time."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def processor(self) -> "JsonProcessor":
        return JsonProcessor(self._matcher.deep_copy())


class JsonProcessor:
    """Leaves of the logits [V] those tokens with which the text can still become valid; once it is, only a stop token."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._num_seen: int | None = None  # text ids so far; those before the first step are no part of the answer

    def __call__(self, text_ids: Sequence[int], logits: Tensor) -> Tensor:
        if self._num_seen is not None:
            self._matcher.consume_tokens(list(text_ids[self._num_seen :]))
        self._num_seen = len(text_ids)
        forbidden = torch.from_numpy(_allowed(self._matcher) == 0)
        _check(self._matcher)
        num_known = min(len(forbidden), logits.shape[0])  # a model's vocabulary may be larger than its tokenizer's
        masked = torch.full_like(logits, -torch.inf)
        masked[:num_known] = logits[:num_known].masked_fill(forbidden[:num_known].to(logits.device), -torch.inf)
        return masked


class StructuredOutput:
    """Of one base model. The tokenizer's table of bytes is made when it is first needed: it takes about a second."""

    def __init__(self, tokenizer: Any, stop_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_token_ids = stop_token_ids
        self._lock = threading.Lock()
        self._table: LLTokenizer | None = None  # guarded by _lock

    def grammar(self, schema: str) -> JsonGrammar:
        """Of a JSON schema as text. Blocks for up to a second or so. Raises BadRequestError naming the library's reason."""
        if len(schema) > MAX_SCHEMA_BYTES:
            raise BadRequestError(
                f"response_format: the schema has {len(schema)} bytes, at most {MAX_SCHEMA_BYTES} are taken; send a smaller one"
            )
        try:
            matcher = LLMatcher(
                self._byte_table(),
                LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS),  # type: ignore[arg-type]
                log_level=0,
                limits=_LIMITS,
            )
            _check(matcher)
            _try(matcher.deep_copy())
        except ValueError as error:
            reason = " ".join(str(error).split())[:_MAX_REASON_CHARS]
            raise BadRequestError(f"response_format: the schema cannot be served: {reason}; send another one") from error
        return JsonGrammar(matcher)

    def _byte_table(self) -> LLTokenizer:
        with self._lock:
            if self._table is None:
                self._table = llguidance.hf.from_tokenizer(self._tokenizer, eos_token=sorted(self._stop_token_ids))
            return self._table


def _try(matcher: LLMatcher) -> None:
    """The first steps of an answer, so that a schema whose steps cost too much is refused before there is one."""
    for _ in range(_NUM_TRIED_STEPS):
        token_id = int(_allowed(matcher).argmax())
        _check(matcher)
        matcher.consume_token(token_id)


def _allowed(matcher: LLMatcher) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """[V], 0 for each token that may not come next."""
    return np.frombuffer(matcher.compute_logit_bias(), dtype=np.uint8)


def _check(matcher: LLMatcher) -> None:
    """Raises ValueError. A matcher itself raises nothing: in its error state it allows the stop token alone."""
    if matcher.is_error():
        raise ValueError(matcher.get_error().removesuffix("<non-verbose/>").strip())
