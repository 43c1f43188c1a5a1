"""The prefix KV tier: what it holds, who loads what, and that a cold soft prompt stalls nobody."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bot.engine.kv import EmbedsConversion, kv_of_embeds
from bot.engine.prefix import PrefixStore
from bot.engine.request import GenerationRequest, PromptRef, SamplingParams
from bot.engine.torch_engine import TorchEngine
from prompt_bank.base_model import BaseModel
from prompt_bank.errors import (
    EngineBusyError,
    EngineFailedError,
    EngineStoppedError,
    MessageTooLongError,
    RedisUnavailableError,
    SoftPromptError,
)
from prompt_bank.soft_prompt import SoftPrompt
from tests.bot.engine.tools import TOLERANCE, Recorder, plain_logits, random_prompt, request, text, tokens_of

CHUNK = 32  # virtual tokens converted between two steps


def refers(ref: PromptRef, max_tokens: int = 2, recorder: Recorder | None = None) -> GenerationRequest:
    processors = [recorder] if recorder else []
    greedy = SamplingParams(temperature=0)
    return GenerationRequest(text(5, 1), max_tokens, ref, sampling=greedy, logits_processors=processors)


class Source:
    """Where a soft prompt is loaded from; waits until it is opened, and can be out of order."""

    def __init__(self, prompt: SoftPrompt, *, is_open: bool = True) -> None:
        self.prompt = prompt
        self.num_loads = 0
        self.num_cancelled = 0
        self.called = asyncio.Event()
        self.opened = asyncio.Event()
        self.failure: Exception | None = None
        if is_open:
            self.opened.set()

    @property
    def ref(self) -> PromptRef:
        return PromptRef(self.prompt.digest, self.prompt.num_virtual_tokens, self.load)

    async def load(self) -> SoftPrompt:
        self.num_loads += 1
        self.called.set()
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        return self.prompt


def sources(base: BaseModel, count: int) -> list[PromptRef]:
    """Equally long prefixes of as many domains."""
    return [PromptRef.of(random_prompt(base, "prefix_kv", 16, seed)) for seed in range(count)]


@pytest.fixture
def store_of(tiny: BaseModel) -> Callable[[int], PrefixStore]:
    """A store for as many prefixes of 16 virtual tokens."""
    one_bytes = random_prompt(tiny, "prefix_kv", 16, 0).num_bytes

    async def convert(embeds: Tensor) -> Tensor:
        return await asyncio.to_thread(kv_of_embeds, tiny, embeds)

    return lambda count: PrefixStore(tiny, count * one_bytes, convert)


async def test_the_budget_holds_in_bytes_and_the_least_recently_used_goes(
    tiny: BaseModel, store_of: Callable[[int], PrefixStore]
) -> None:
    store, refs = store_of(2), sources(tiny, 3)
    one_bytes = 16 * 2 * 2 * 2 * 16 * 4  # P, L, keys and values, H_kv, D, float32
    for index in (0, 1, 0, 2, 0, 1):
        (await store.acquire(refs[index])).release()
        assert store.stats().num_bytes <= 2 * one_bytes
    stats = store.stats()
    assert (stats.num_misses, stats.num_hits, stats.num_evictions) == (4, 2, 2)
    assert (stats.num_entries, stats.num_bytes, stats.num_pinned_bytes) == (2, 2 * one_bytes, 0)
    large = PromptRef.of(random_prompt(tiny, "prefix_kv", 33, 9))  # alone more than the budget
    pin = await store.acquire(large)
    assert (store.stats().num_entries, store.stats().num_bytes) == (1, pin.prefix_kv.nbytes)
    pin.release()
    assert (store.stats().num_entries, store.stats().num_bytes) == (0, 0)


async def test_prefix_kv_that_overflows_in_the_serving_dtype_is_refused(tiny: BaseModel) -> None:
    async def convert(embeds: Tensor) -> Tensor:
        return kv_of_embeds(tiny, embeds) * torch.inf  # as a model does whose activations overflow

    in_half = PrefixStore(replace(tiny, dtype=torch.float16), 2**20, convert)
    for kind, value in (("prefix_kv", 7e4), ("embeds", 1.0)):
        prompt = SoftPrompt(kind, random_prompt(tiny, kind, 4, 0).tensor.sign() * value)  # type: ignore[arg-type]
        with pytest.raises(
            SoftPromptError, match=f"prefix KV of soft prompt {prompt.digest[:12]} is not finite in float16; set"
        ):
            await in_half.acquire(PromptRef.of(prompt))
        assert in_half.stats().num_entries == 0
    (await in_half.acquire(PromptRef.of(random_prompt(tiny, "prefix_kv", 4, 0)))).release()


async def test_pinned_kv_is_not_evicted(tiny: BaseModel, store_of: Callable[[int], PrefixStore]) -> None:
    store, refs = store_of(1), sources(tiny, 3)
    first, again = await store.acquire(refs[0]), await store.acquire(refs[0])
    second = await store.acquire(refs[1])
    over = store.stats()
    assert (over.num_entries, over.num_evictions) == (2, 0)
    assert over.num_bytes == over.num_pinned_bytes == 2 * first.prefix_kv.nbytes
    first.release()
    first.release()  # counts once
    assert store.stats().num_entries == 2  # `again` still uses it
    again.release()
    assert (store.stats().num_entries, store.stats().num_evictions) == (1, 1)
    third = await store.acquire(refs[2])
    assert store.stats().num_entries == 2
    assert torch.equal((await store.acquire(refs[1])).prefix_kv, second.prefix_kv)
    assert store.stats().num_hits == 2
    third.release()
    assert (store.stats().num_entries, store.stats().num_bytes) == (1, second.prefix_kv.nbytes)


async def test_a_running_request_pins_its_prefix_until_it_ends(tiny: BaseModel) -> None:
    refs, gate = sources(tiny, 2), threading.Event()
    async with TorchEngine(tiny, context_tokens=256, prefix_budget_bytes=1) as engine:
        running = engine.generate(refers(refs[0], 3, Recorder(gate)))
        waiting = asyncio.ensure_future(anext(running))
        while engine.stats().prefix.num_pinned_bytes == 0:  # noqa: ASYNC110  after a thread's work
            await asyncio.sleep(0.001)
        assert engine.stats().prefix.num_entries == 1
        gate.set()
        await waiting
        while engine.stats().prefix.num_entries:  # noqa: ASYNC110  finished, though two tokens are not taken yet
            await asyncio.sleep(0.001)
        assert [token.finish_reason async for token in running] == [None, "length"]
        cancelled = engine.generate(refers(refs[1], 200))
        await anext(cancelled)
        await cancelled.aclose()
        assert engine.stats().prefix.num_bytes == 0

        def broken(text_ids: object, logits: Tensor) -> Tensor:
            raise ZeroDivisionError("on purpose")

        with pytest.raises(EngineFailedError):
            await tokens_of(engine, GenerationRequest(text(5, 1), 5, refs[1], logits_processors=[broken]))
        assert engine.stats().prefix.num_bytes == 0
    assert engine.stats().prefix.num_evictions == 3


@pytest.mark.parametrize("kind", ["embeds", "prefix_kv"])
async def test_fifty_cold_requests_load_once(tiny: BaseModel, kind: str) -> None:
    source = Source(random_prompt(tiny, kind, 40, 1), is_open=False)  # type: ignore[arg-type]
    async with TorchEngine(tiny, context_tokens=256) as engine:
        asked = [asyncio.ensure_future(tokens_of(engine, refers(source.ref))) for _ in range(50)]
        await source.called.wait()
        source.opened.set()
        answers = await asyncio.gather(*asked)
        stats = engine.stats().prefix
    assert source.num_loads == 1
    assert (stats.num_misses, stats.num_hits, stats.num_entries) == (1, 49, 1)
    assert len({tuple(answer) for answer in answers}) == 1


async def test_a_failed_load_fails_its_waiters_and_the_next_request_tries_again(tiny: BaseModel) -> None:
    source = Source(random_prompt(tiny, "prefix_kv", 16, 1), is_open=False)
    source.failure = RedisUnavailableError("on purpose")
    async with TorchEngine(tiny, context_tokens=256) as engine:
        asked = [asyncio.ensure_future(tokens_of(engine, refers(source.ref))) for _ in range(3)]
        await source.called.wait()
        source.opened.set()
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, RedisUnavailableError)
        stats = engine.stats()
        assert (stats.prefix.num_errors, stats.prefix.num_entries, stats.num_waiting) == (3, 0, 0)
        source.failure = None
        assert len(await tokens_of(engine, refers(source.ref))) == 2
        assert (source.num_loads, engine.stats().prefix.num_misses) == (2, 1)


async def test_a_conversion_that_fails_is_an_error_of_its_request_alone(tiny: BaseModel) -> None:
    too_wide = SoftPrompt("embeds", torch.zeros(4, tiny.shape.hidden_size + 1))
    async with TorchEngine(tiny, context_tokens=256) as engine:
        with pytest.raises(EngineFailedError):
            await tokens_of(engine, request(text(5, 1), too_wide))
        assert len(await tokens_of(engine, request(text(5, 1), random_prompt(tiny, "embeds", 4, 1)))) == 8


async def test_another_soft_prompt_than_was_asked_for_is_refused(tiny: BaseModel) -> None:
    one, other = (random_prompt(tiny, "prefix_kv", 16, seed) for seed in (1, 2))
    async with TorchEngine(tiny, context_tokens=256) as engine:
        with pytest.raises(SoftPromptError, match=f"{one.digest[:12]} was asked for and {other.digest[:12]} was loaded"):
            await tokens_of(engine, refers(PromptRef(one.digest, 16, Source(other).load)))
        for _ in range(2):  # cold, then warm
            with pytest.raises(SoftPromptError, match="has 16 virtual tokens, its reference says 17"):
                await tokens_of(engine, refers(PromptRef(one.digest, 17, Source(one).load)))
        assert engine.stats().prefix.num_errors == 3
        assert len(await tokens_of(engine, refers(PromptRef.of(one)))) == 2


async def test_refusals_come_before_loading(tiny: BaseModel) -> None:
    held, source = Source(random_prompt(tiny, "embeds", 16, 1), is_open=False), Source(random_prompt(tiny, "embeds", 250, 2))
    async with TorchEngine(tiny, max_waiting=2, context_tokens=256) as engine:
        with pytest.raises(MessageTooLongError, match="250 virtual and 6 text tokens"):
            await tokens_of(engine, GenerationRequest(text(6, 1), 2, source.ref))
        waiting = [asyncio.ensure_future(tokens_of(engine, refers(held.ref))) for _ in range(2)]
        await held.called.wait()
        assert engine.stats().num_waiting == 2
        with pytest.raises(EngineBusyError):
            await tokens_of(engine, refers(source.ref))
        held.opened.set()
        await asyncio.gather(*waiting)
        assert source.num_loads == 0


async def test_a_slow_load_delays_nobody_else(tiny: BaseModel) -> None:
    slow = Source(random_prompt(tiny, "embeds", 16, 1), is_open=False)
    async with TorchEngine(tiny, num_rows=1, context_tokens=256) as engine:
        cold = asyncio.ensure_future(tokens_of(engine, refers(slow.ref)))
        await slow.called.wait()
        for _ in range(3):
            assert len(await tokens_of(engine, request(text(5, 2), random_prompt(tiny, "prefix_kv", 16, 2)))) == 8
        assert not cold.done()
        slow.opened.set()
        assert len(await cold) == 2


@contextmanager
def watched_forwards(base: BaseModel, at_chunk: Callable[[int], None]) -> Iterator[list[str]]:
    """The order of the model's forwards: `chunk N` of a conversion and `text N`; `at_chunk` is called before the nth chunk."""
    order: list[str] = []

    def note(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        if "inputs_embeds" in kwargs:
            at_chunk(sum(entry.startswith("chunk") for entry in order))
            order.append(f"chunk {kwargs['inputs_embeds'].shape[1]}")
        else:
            order.append(f"text {kwargs['input_ids'].shape[1]}")

    hook = base.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield order
    finally:
        hook.remove()


async def test_a_cold_embeds_prompt_stalls_nobody(tiny: BaseModel) -> None:
    """Between any two chunks of a conversion the others decode a token, and a warm request is admitted."""
    cold, loop = Source(random_prompt(tiny, "embeds", 200, 1), is_open=False), asyncio.get_running_loop()
    is_converted, recorder = threading.Event(), Recorder()
    warm: list[asyncio.Future[list[int]]] = []

    def ask_in_the_middle(index: int) -> None:
        """On the engine thread, which goes on once the request is in the queue."""
        if index == 3:
            asked = threading.Event()

            def ask() -> None:
                warm.append(asyncio.ensure_future(tokens_of(engine, request(text(11, 3), max_tokens=2))))
                loop.call_soon(asked.set)

            loop.call_soon_threadsafe(ask)
            assert asked.wait(30)

    with watched_forwards(tiny, ask_in_the_middle) as order:
        async with TorchEngine(tiny, context_tokens=512) as engine:
            others = GenerationRequest(text(5, 2), 500, stop=lambda ids: is_converted.is_set())
            decoding = engine.generate(others)
            await anext(decoding)
            asked = asyncio.ensure_future(tokens_of(engine, refers(cold.ref, recorder=recorder)))
            await cold.called.wait()
            cold.opened.set()
            await asked
            is_converted.set()
            assert [token async for token in decoding][-1].finish_reason == "stop"  # it decoded all the while
            assert len(await warm[0]) == 2
    chunks = [index for index, entry in enumerate(order) if entry.startswith("chunk")]
    assert [order[index] for index in chunks] == [f"chunk {CHUNK}"] * 6 + ["chunk 8"]
    for before, after in pairwise(chunks):
        assert "text 1" in order[before:after]
    assert chunks[3] < order.index("text 11") < chunks[4]
    assert (recorder.logits[0] - plain_logits(tiny, cold.prompt, text(5, 1))[-1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("tokens_per_step", [1, 7, CHUNK, 100, 200])
@torch.inference_mode()
def test_a_conversion_in_chunks_equals_one_at_once(tiny: BaseModel, tokens_per_step: int) -> None:
    """In float64, where it shows that what float32 leaves of it is rounding: up to 1e-5 in steps of one token, then less."""
    embeds = random_prompt(tiny, "embeds", 200, 1).tensor
    double = replace(tiny, model=deepcopy(tiny.model).double(), dtype=torch.float64)
    for base, tolerance in ((tiny, 2e-5 if tokens_per_step == 1 else 1e-5), (double, 1e-12)):
        expected = kv_of_embeds(base, embeds)
        conversion = EmbedsConversion(base, embeds, tokens_per_step)
        steps = [conversion.step() for _ in range(-(-200 // tokens_per_step))]
        assert steps[:-1] == [None] * (len(steps) - 1)
        assert steps[-1] is not None
        torch.testing.assert_close(steps[-1], expected, rtol=0, atol=tolerance)
        shifted = kv_of_embeds(base, embeds.roll(1, dims=0))
        assert (shifted - expected).abs().max() > 1e-3  # control


async def test_a_waiter_that_goes_away_does_not_end_the_load_for_others(tiny: BaseModel) -> None:
    source = Source(random_prompt(tiny, "embeds", 16, 1), is_open=False)
    async with TorchEngine(tiny, context_tokens=256) as engine:
        first, second = (asyncio.ensure_future(tokens_of(engine, refers(source.ref))) for _ in range(2))
        await source.called.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        source.opened.set()
        assert len(await second) == 2
    assert (source.num_loads, source.num_cancelled) == (1, 0)


async def test_cancelling_while_loading_frees_everything(tiny: BaseModel) -> None:
    source = Source(random_prompt(tiny, "embeds", 16, 1), is_open=False)
    async with TorchEngine(tiny, max_waiting=3, context_tokens=256) as engine:
        for _ in range(2):
            asked = [asyncio.ensure_future(tokens_of(engine, refers(source.ref))) for _ in range(3)]
            await source.called.wait()
            for one in asked:
                one.cancel()
            assert all(
                isinstance(outcome, asyncio.CancelledError) for outcome in await asyncio.gather(*asked, return_exceptions=True)
            )
            stats = engine.stats()
            assert (stats.num_waiting, stats.prefix.num_entries, stats.prefix.num_bytes) == (0, 0, 0)
            source.called.clear()
        assert source.num_cancelled == 2
        source.opened.set()
        assert len(await tokens_of(engine, refers(source.ref))) == 2
        assert source.num_loads == 3


async def test_cancelling_while_converting_ends_the_conversion(tiny: BaseModel) -> None:
    loop, entered, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def stay(index: int) -> None:
        if index == 1:
            loop.call_soon_threadsafe(entered.set)
            assert go_on.wait(30)

    with watched_forwards(tiny, stay) as order:
        async with TorchEngine(tiny, context_tokens=256) as engine:
            asked = asyncio.ensure_future(tokens_of(engine, request(text(5, 1), random_prompt(tiny, "embeds", 200, 1))))
            await entered.wait()
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            go_on.set()
            assert len(await tokens_of(engine, request(text(5, 1), random_prompt(tiny, "embeds", 4, 2)))) == 8
            assert engine.stats().prefix.num_entries == 1
    assert [entry for entry in order if entry.startswith("chunk")] == [f"chunk {CHUNK}"] * 2 + ["chunk 4"]


async def test_stopping_while_loading(tiny: BaseModel) -> None:
    """What is loaded within the time to drain is answered; what is not gets the error."""
    source = Source(random_prompt(tiny, "embeds", 100, 1), is_open=False)
    async with TorchEngine(tiny, context_tokens=256, drain_s=30) as engine:
        drained = asyncio.ensure_future(tokens_of(engine, refers(source.ref)))
        await source.called.wait()
        asyncio.get_running_loop().call_later(0.05, source.opened.set)
    assert len(await drained) == 2
    stuck = Source(source.prompt, is_open=False)
    async with TorchEngine(tiny, context_tokens=256, drain_s=0) as impatient:
        left = [asyncio.ensure_future(tokens_of(impatient, refers(stuck.ref))) for _ in range(2)]
        await stuck.called.wait()
    for outcome in await asyncio.wait_for(asyncio.gather(*left, return_exceptions=True), 10):
        assert isinstance(outcome, EngineStoppedError)
    assert (stuck.num_cancelled, impatient.is_running, impatient.stats().prefix.num_entries) == (1, False, 0)


async def test_stopping_while_converting(tiny: BaseModel) -> None:
    loop, entered = asyncio.get_running_loop(), asyncio.Event()

    def announce(index: int) -> None:
        loop.call_soon_threadsafe(entered.set)

    with watched_forwards(tiny, announce) as order:
        async with TorchEngine(tiny, context_tokens=512, drain_s=0) as engine:
            prompts = [random_prompt(tiny, "embeds", 500, seed) for seed in range(4)]
            left = [asyncio.ensure_future(tokens_of(engine, request(text(5, 1), prompt))) for prompt in prompts]
            await entered.wait()
    for outcome in await asyncio.wait_for(asyncio.gather(*left, return_exceptions=True), 10):
        assert isinstance(outcome, EngineStoppedError)
    assert len(order) < 4 * -(-500 // CHUNK)  # not run to their end
