"""The embedded engine: one thread owns the frozen model and decodes sequences of all domains in one batch.

A step is: drop what was cancelled, decode one token for every active row, admit one waiting sequence (prefill), hand the
tokens to the event loop, and run a few virtual tokens of a soft prompt that is on its way to its prefix KV. Sequences of
different domains, kinds and P share a batch because a soft prompt is nothing but KV at the front of a row. A sequence waits
until its prefix KV is there; others pass it. Text goes in and out as token ids.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType

import torch
from torch import Tensor

from bot.engine.architectures import adapt
from bot.engine.kv import EmbedsConversion, RowCache, attention_mask, positions_tensor
from bot.engine.prefix import PrefixStore
from bot.engine.request import EngineStats, GeneratedToken, GenerationRequest
from bot.engine.sampling import penalize_repetition, sample
from bot.engine.sequence import Outcome, Sequence
from prompt_bank.base_model import BaseModel
from prompt_bank.errors import (
    EngineBusyError,
    EngineFailedError,
    EngineStoppedError,
    MessageTooLongError,
    ModelNotServedError,
)

log = logging.getLogger(__name__)

# Of the logits' norm. Rounding in bfloat16 stays under a hundredth; another mask or position shows in tenths.
_LARGEST_SELF_CHECK_ERROR = 0.05

# Virtual tokens converted between two steps of decoding: a conversion stalls the others by no more than a short prefill.
_CONVERTED_PER_STEP = 32


class TorchEngine:
    """An async context manager: the thread lives inside it. `generate` is called from the event loop that entered it."""

    def __init__(
        self,
        base: BaseModel,
        *,
        num_rows: int = 16,
        max_waiting: int = 64,
        context_tokens: int = 2048,
        prefix_budget_bytes: int = 512 * 1024 * 1024,
        drain_s: float = 10.0,
    ) -> None:
        self._base = base
        self._num_rows = num_rows
        self._max_waiting = max_waiting
        self._context_tokens = min(context_tokens, base.context_tokens)
        self._drain_s = drain_s
        self._cache = RowCache(base, num_rows, self._context_tokens)
        self._prefixes = PrefixStore(base, prefix_budget_bytes, self._convert)
        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()  # guarded by _changed
        self._conversions: deque[tuple[EmbedsConversion, Future[Tensor]]] = deque()  # guarded by _changed
        self._is_open = False  # guarded by _changed
        self._is_stopping = False  # guarded by _changed
        self._active: list[Sequence] = []  # row i of the cache belongs to _active[i]
        self._num_generated_tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped: Future[int] = Future()
        adapt(base.model)
        self._check_servable()

    @property
    def context_tokens(self) -> int:
        return self._context_tokens

    def _check_servable(self) -> None:
        """Raises ModelNotServedError when the model does not give through our cache and masks what it gives by itself."""
        base, ids = self._base, [3, 4, 5, 6, 7, 8]
        name = f"{base.name} ({base.model.config.model_type})"
        try:
            with torch.inference_mode():
                expected = base.model(input_ids=torch.tensor([ids], device=base.device)).logits[0, -1].float()
                self._forward(slice(0, 1), [ids[:4]], [[0, 1, 2, 3]])
                got = self._forward(slice(0, 1), [ids[4:]], [[4, 5]])[0]
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ModelNotServedError(
                f"{name} does not take this engine's cache and masks: {error}; use another model"
            ) from error
        if not (got - expected).norm() <= _LARGEST_SELF_CHECK_ERROR * expected.norm():
            raise ModelNotServedError(f"{name} computes something else with this engine's cache and masks; use another model")

    @property
    def is_running(self) -> bool:
        return self._is_open

    async def __aenter__(self) -> "TorchEngine":
        self._loop = asyncio.get_running_loop()
        self._is_open = True
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Refuses new requests, lets the old ones finish for `drain_s`, cancels what is left, and ends the thread."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        stopped = asyncio.wrap_future(self._stopped)
        done, _ = await asyncio.wait([stopped], timeout=self._drain_s)
        if not done:
            with self._changed:
                self._is_stopping = True
                self._changed.notify()
        num_cancelled = await stopped
        await self._prefixes.close()
        if num_cancelled:
            log.warning("engine stopped with %d requests cancelled after %.0f s of draining", num_cancelled, self._drain_s)

    def is_half_idle(self) -> bool:
        """Whether nobody waits and half of the rows are free: room for work that can be left out."""
        return not self._waiting and 2 * len(self._active) <= self._num_rows

    def stats(self) -> EngineStats:
        return EngineStats(
            num_active=len(self._active),
            num_waiting=len(self._waiting),
            num_generated_tokens=self._num_generated_tokens,
            prefix=self._prefixes.stats(),
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedToken, None]:
        sequence = self._submit(request)
        try:
            if request.prompt is not None:
                pin = await self._prefixes.acquire(request.prompt)
                with self._changed:
                    sequence.pin = pin
                    self._changed.notify()
            while True:
                outcome = await sequence.outcomes.get()
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
                if outcome.finish_reason:
                    return
        finally:
            sequence.release()
            with self._changed:
                sequence.cancelled = True  # a finished one is gone already
                if sequence in self._waiting:
                    self._waiting.remove(sequence)
                self._changed.notify()

    def _submit(self, request: GenerationRequest) -> Sequence:
        num_tokens = request.num_virtual_tokens + len(request.token_ids)
        if num_tokens >= self._context_tokens:
            raise MessageTooLongError(
                f"{request.num_virtual_tokens} virtual and {len(request.token_ids)} text tokens leave no room in a context "
                f"of {self._context_tokens}; send a shorter message"
            )
        sequence = Sequence(request, min(request.max_tokens, self._context_tokens - num_tokens))
        with self._changed:
            if not self._is_open:
                raise EngineStoppedError("the engine is stopped; start the service again")
            if len(self._waiting) >= self._max_waiting:
                raise EngineBusyError(f"{len(self._waiting)} requests are waiting, at most {self._max_waiting} may; try later")
            self._waiting.append(sequence)
            self._changed.notify()
        return sequence

    async def _convert(self, embeds: Tensor) -> Tensor:
        """The prefix KV [L, 2, H_kv, P, D] of embeddings [P, H], from the engine thread. Raises Engine{Stopped,Failed}Error."""
        prefix_kv: Future[Tensor] = Future()
        with self._changed:
            if self._is_stopping:
                raise EngineStoppedError("the engine was stopped")
            self._conversions.append((EmbedsConversion(self._base, embeds, _CONVERTED_PER_STEP), prefix_kv))
            self._changed.notify()
        return await asyncio.wrap_future(prefix_kv)

    # Everything below runs on the engine thread.

    def _run(self) -> None:
        num_cancelled = 0
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._step()
        finally:
            with self._changed:
                self._is_open, self._is_stopping = False, True
                left = [*self._active, *self._waiting]
                self._waiting.clear()
                unconverted = list(self._conversions)
                self._conversions.clear()
            self._active.clear()
            for _, prefix_kv in unconverted:
                _resolve(prefix_kv, EngineStoppedError("the engine was stopped"))
            num_cancelled = len(left)
            self._deliver([(sequence, EngineStoppedError("the engine was stopped")) for sequence in left])
            self._stopped.set_result(num_cancelled)

    def _wait_for_work(self) -> bool:
        """Blocks while idle. False once the engine is to stop: at once, or when it is closed and nothing is left to do."""
        with self._changed:
            while not (self._has_work() or self._is_stopping or not (self._is_open or self._waiting)):
                self._changed.wait()
            return not self._is_stopping and self._has_work()

    def _has_work(self) -> bool:
        return bool(self._active or self._conversions) or any(sequence.is_ready for sequence in self._waiting)

    def _step(self) -> None:
        self._drop_cancelled()
        outcomes: list[tuple[Sequence, Outcome]] = []
        decoding = list(self._active)
        if decoding:
            outcomes += self._decode(decoding)
        admitted = self._next_waiting()
        if admitted is not None:
            outcomes += self._admit(admitted)
        self._num_generated_tokens += sum(isinstance(outcome, GeneratedToken) for _, outcome in outcomes)
        for sequence, outcome in outcomes:
            if isinstance(outcome, Exception) or outcome.finish_reason:
                self._retire(sequence)
        self._deliver(outcomes)
        self._convert_some()

    def _drop_cancelled(self) -> None:
        for sequence in [sequence for sequence in self._active if sequence.cancelled]:
            self._retire(sequence)

    def _next_waiting(self) -> Sequence | None:
        """The first whose prefix KV is there, while a row is free."""
        with self._changed:
            ready = next((sequence for sequence in self._waiting if sequence.is_ready), None)
            if ready is None or len(self._active) >= self._num_rows:
                return None
            self._waiting.remove(ready)
        return ready

    def _convert_some(self) -> None:
        """A few virtual tokens of the oldest conversion that is still wanted."""
        with self._changed:
            while self._conversions and self._conversions[0][1].cancelled():
                self._conversions.popleft()
            if not self._conversions:
                return
            conversion, prefix_kv = self._conversions[0]
        try:
            outcome: Tensor | Exception | None = conversion.step()
        except Exception as error:  # noqa: BLE001  boundary: see _admit
            outcome = _failed(error)
        if outcome is not None:
            with self._changed:
                self._conversions.popleft()
            _resolve(prefix_kv, outcome)

    def _admit(self, sequence: Sequence) -> list[tuple[Sequence, Outcome]]:
        """Takes the next row, puts the prefix KV at its front, and runs the text through the model."""
        row = len(self._active)
        self._active.append(sequence)
        request = sequence.request
        num_virtual_tokens = request.num_virtual_tokens
        try:
            if sequence.pin is not None:
                self._cache.write_prefix(row, sequence.pin.prefix_kv)
            positions = list(range(num_virtual_tokens, num_virtual_tokens + len(request.token_ids)))
            logits = self._forward(slice(row, row + 1), [list(request.token_ids)], [positions])
        except Exception as error:  # noqa: BLE001  boundary: a request that breaks must not end the thread
            return [(sequence, _failed(error))]
        return [(sequence, self._next_outcome(sequence, logits[0]))]

    def _decode(self, sequences: list[Sequence]) -> list[tuple[Sequence, Outcome]]:
        """One token for each of the rows [0, n)."""
        tokens = [[sequence.generated[-1]] for sequence in sequences]
        positions = [[sequence.next_position] for sequence in sequences]
        try:
            logits = self._forward(slice(0, len(sequences)), tokens, positions)
        except Exception as error:  # noqa: BLE001  boundary: see _admit
            return [(sequence, _failed(error)) for sequence in sequences]
        return [(sequence, self._next_outcome(sequence, row)) for sequence, row in zip(sequences, logits, strict=True)]

    def _forward(self, rows: slice, token_ids: list[list[int]], positions: list[list[int]]) -> Tensor:
        """Logits [B, V] after the last of `token_ids` [B, T] at `positions` [B, T]."""
        base = self._base
        position_ids = positions_tensor(base, positions)
        kv_length = max(row[-1] for row in positions) + 1
        self._cache.aim(rows, position_ids, kv_length)
        output = base.model(
            input_ids=torch.tensor(token_ids, device=base.device),
            position_ids=position_ids,
            attention_mask=attention_mask(position_ids, kv_length, base.dtype),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _next_outcome(self, sequence: Sequence, logits: Tensor) -> Outcome:
        """The row's next token, or the error of its own processors, sampling or stop condition."""
        request = sequence.request
        text_ids = sequence.text_ids
        try:
            _check_finite(logits)
            # First: a processor may write into the logits it is given.
            logprobs = logits.log_softmax(dim=0) if request.sampling.top_logprobs is not None else None
            logits = penalize_repetition(logits, text_ids, request.sampling.repetition_penalty, request.stop_token_ids)
            for process in request.logits_processors:
                logits = process(text_ids, logits)
            return sequence.append(sample(logits, request.sampling, sequence.generator), logprobs)
        except Exception as error:  # noqa: BLE001  boundary: see _admit
            return _failed(error)

    def _retire(self, sequence: Sequence) -> None:
        """Frees the row; the last active row moves into it, so that the active ones stay together at the front."""
        row = self._active.index(sequence)
        last = self._active.pop()
        self._cache.clear_row(row, sequence.next_position + 1)  # a step that failed may have written the newest token's
        if last is not sequence:
            self._active[row] = last
            self._cache.move_row(len(self._active), row, last.next_position + 1)

    def _deliver(self, outcomes: list[tuple[Sequence, Outcome]]) -> None:
        """One wake-up of the event loop for all tokens of a step."""

        def put() -> None:
            for sequence, outcome in outcomes:
                sequence.outcomes.put_nowait(outcome)
                if isinstance(outcome, Exception) or outcome.finish_reason:
                    sequence.release()  # now: a consumer may be slow to take what is there

        if outcomes:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(put)


def _check_finite(logits: Tensor) -> None:
    """Of one row, before its processors: a model overflows where its dtype is too narrow, and what is sampled then is noise."""
    if not logits.max().isfinite():  # one look; a NaN is the largest, and -inf a model may mean
        raise ArithmeticError(f"the model gives {logits.max()} as logit; set FRONTDESK_DTYPE to bfloat16 or float32")


def _failed(error: Exception) -> EngineFailedError:
    log.error("a step failed", exc_info=error)
    return EngineFailedError(f"a step failed: {type(error).__name__}: {error}")


def _resolve(future: "Future[Tensor]", outcome: Tensor | Exception) -> None:
    if not future.set_running_or_notify_cancel():
        return  # nobody wants it any more
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
