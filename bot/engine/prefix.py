"""Prefix KV of soft prompts on the device: had once for each digest, shared by every sequence of that version.

The digest is the only key, so a version that is republished under the same name can never meet the KV of the old one. One
store belongs to one engine, so base model and dtype are given. Used from the event loop; the tensors are read on any thread.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from bot.engine.request import PrefixStats, PromptRef
from prompt_bank.base_model import BaseModel
from prompt_bank.errors import EngineStoppedError, SoftPromptError


@dataclass(slots=True, eq=False)
class _Entry:
    """One digest's prefix KV, there or on its way. While it is on its way its waiters are its pins."""

    digest: str
    prefix_kv: "asyncio.Future[Tensor]"
    num_pins: int = 0


class Pin:
    """Keeps `prefix_kv` [L, 2, H_kv, P, D] in the store until it is released; a second release does nothing."""

    def __init__(self, prefix_kv: Tensor, unpin: Callable[[], None]) -> None:
        self.prefix_kv = prefix_kv
        self._unpin: Callable[[], None] | None = unpin

    def release(self) -> None:
        unpin, self._unpin = self._unpin, None
        if unpin is not None:
            unpin()


class PrefixStore:
    """The least recently used entry that nobody uses goes when the budget in bytes is exceeded.

    So the store is over its budget by what is pinned at most. `convert` makes prefix KV of embeddings [P, H].
    """

    def __init__(self, base: BaseModel, budget_bytes: int, convert: Callable[[Tensor], Awaitable[Tensor]]) -> None:
        self._base = base
        self._budget_bytes = budget_bytes
        self._convert = convert
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._loads: dict[_Entry, asyncio.Task[None]] = {}
        self._num_hits = self._num_misses = self._num_errors = self._num_evictions = self._num_bytes = 0

    async def acquire(self, ref: PromptRef) -> Pin:
        """The prefix KV in the serving dtype, on the device; whoever asks while it is loaded waits for the same load.

        Raises SoftPromptError when another soft prompt was loaded or it overflows, EngineStoppedError, or the error of loading
        or converting, after which the next request tries again.
        """
        entry = self._entries.get(ref.digest)
        is_cold = entry is None
        if entry is None:
            entry = self._entries[ref.digest] = _Entry(ref.digest, asyncio.get_running_loop().create_future())
            load = self._loads[entry] = asyncio.create_task(self._load(entry, ref))
            load.add_done_callback(partial(self._forget_load, entry))
        self._entries.move_to_end(ref.digest)
        entry.num_pins += 1
        try:
            prefix_kv = await asyncio.shield(entry.prefix_kv)
            if prefix_kv.shape[3] != ref.num_virtual_tokens:
                raise SoftPromptError(
                    f"soft prompt {ref.digest[:12]} has {prefix_kv.shape[3]} virtual tokens, its reference says "
                    f"{ref.num_virtual_tokens}; publish the version again"
                )
        except BaseException as error:
            self._num_errors += isinstance(error, Exception)
            self._unpin(entry)
            raise
        self._num_misses += is_cold
        self._num_hits += not is_cold
        return Pin(prefix_kv, lambda: self._unpin(entry))

    def stats(self) -> PrefixStats:
        held = [entry for entry in tuple(self._entries.values()) if entry.prefix_kv.done()]
        return PrefixStats(
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            num_errors=self._num_errors,
            num_evictions=self._num_evictions,
            num_entries=len(held),
            num_bytes=self._num_bytes,
            num_pinned_bytes=sum(entry.prefix_kv.result().nbytes for entry in held if entry.num_pins),
        )

    async def close(self) -> None:
        """Ends the loads under way; whoever waits for one gets EngineStoppedError."""
        loads = dict(self._loads)
        for task in loads.values():
            task.cancel()
        await asyncio.gather(*loads.values(), return_exceptions=True)
        for entry in loads:
            self._fail(entry, EngineStoppedError("the engine was stopped while the soft prompt was loaded"))

    async def _load(self, entry: _Entry, ref: PromptRef) -> None:
        """A task of its own, because a waiter that goes away must not end the load for the others."""
        try:
            prefix_kv = await self._prefix_kv(ref)
        except Exception as error:  # noqa: BLE001  boundary: every waiter gets it
            self._fail(entry, error)
            return
        if not entry.prefix_kv.done():  # else the last waiter has gone, and this was too busy to notice
            entry.prefix_kv.set_result(prefix_kv)
            self._num_bytes += prefix_kv.nbytes
            self._evict()

    async def _prefix_kv(self, ref: PromptRef) -> Tensor:
        prompt = await ref.load()
        digest = await asyncio.to_thread(lambda: prompt.digest)
        if digest != ref.digest:
            raise SoftPromptError(
                f"soft prompt {ref.digest[:12]} was asked for and {digest[:12]} was loaded; publish the version again"
            )
        if prompt.kind == "embeds":
            prefix_kv = await self._convert(prompt.tensor)
        else:
            prefix_kv = await asyncio.to_thread(prompt.tensor.to, self._base.device, self._base.dtype)
        if not await asyncio.to_thread(lambda: bool(prefix_kv.isfinite().all())):
            dtype = str(self._base.dtype).removeprefix("torch.")
            raise SoftPromptError(
                f"the prefix KV of soft prompt {ref.digest[:12]} is not finite in {dtype}; set FRONTDESK_DTYPE to a wider one "
                "(bfloat16, float32), or train the version again"
            )
        return prefix_kv

    def _fail(self, entry: _Entry, error: Exception) -> None:
        if not entry.prefix_kv.done():
            self._forget(entry)
            entry.prefix_kv.set_exception(error)
            entry.prefix_kv.exception()  # seen, even when the last waiter has just gone

    def _unpin(self, entry: _Entry) -> None:
        entry.num_pins -= 1
        if entry.num_pins == 0 and not entry.prefix_kv.done():  # nobody waits for it any more
            self._forget(entry)
            entry.prefix_kv.cancel()
            if load := self._loads.get(entry):
                load.cancel()
        self._evict()

    def _forget_load(self, entry: _Entry, task: "asyncio.Task[None]") -> None:
        del self._loads[entry]

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.digest]

    def _evict(self) -> None:
        for entry in list(self._entries.values()):
            if self._num_bytes <= self._budget_bytes:
                return
            if entry.num_pins == 0:
                self._forget(entry)
                self._num_bytes -= entry.prefix_kv.result().nbytes
                self._num_evictions += 1
