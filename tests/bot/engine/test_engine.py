"""The engine on a tiny random model: rows in a mixed batch equal each row alone, and nothing leaks between requests."""

import asyncio
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import FalconConfig, GPT2Config, MistralConfig, Qwen2Config

from bot.engine.request import GeneratedToken, GenerationRequest, PromptRef, SamplingParams
from bot.engine.torch_engine import TorchEngine
from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Message
from prompt_bank.errors import (
    EngineBusyError,
    EngineFailedError,
    EngineStoppedError,
    MessageTooLongError,
    ModelNotServedError,
)
from prompt_bank.soft_prompt import Kind, SoftPrompt
from prompt_bank.starter import STARTER_DIR, TRAINED, starter_domains
from prompt_bank.version import ServedModel, read_soft_prompt, read_version
from tests.bot.engine.tools import TOLERANCE, Recorder, plain_logits, random_model, random_prompt, request, text, tokens_of


def mixed_requests(base: BaseModel) -> list[tuple[list[int], SoftPrompt | None]]:
    """Every mix: no prompt, both kinds, five lengths of prompt, seven lengths of text, one prompt used twice."""
    shared = random_prompt(base, "prefix_kv", 16, 1)
    return [
        (text(5, 1), None),
        (text(31, 2), shared),
        (text(2, 3), shared),
        (text(17, 4), random_prompt(base, "embeds", 16, 2)),
        (text(40, 5), random_prompt(base, "embeds", 3, 3)),
        (text(1, 6), random_prompt(base, "prefix_kv", 64, 4)),
        (text(9, 7), random_prompt(base, "embeds", 100, 5)),
    ]


async def test_a_mixed_batch_equals_each_sequence_alone(tiny: BaseModel, engine: TorchEngine) -> None:
    requests = mixed_requests(tiny)
    together = [Recorder() for _ in requests]
    # Different lengths of answers, so that rows move while others are decoding.
    lengths = [4 + 3 * index for index in range(len(requests))]
    batch = [request(ids, prompt, recorder, n) for (ids, prompt), recorder, n in zip(requests, together, lengths, strict=True)]
    await asyncio.gather(*(tokens_of(engine, one) for one in batch))
    for (ids, prompt), recorder, n in zip(requests, together, lengths, strict=True):
        alone, other = Recorder(), Recorder()
        await tokens_of(engine, request(ids, prompt, alone, n))
        assert (recorder.all - alone.all).abs().max() < TOLERANCE
        await tokens_of(engine, request(ids, random_prompt(tiny, "prefix_kv", 16, 99), other, 1))
        assert (recorder.logits[0] - other.logits[0]).abs().max() > 10 * TOLERANCE  # control: another prompt shows


@pytest.mark.parametrize(("kind", "num_virtual_tokens"), [("embeds", 16), ("embeds", 7), ("prefix_kv", 16), ("prefix_kv", 48)])
async def test_engine_equals_the_plain_model(tiny: BaseModel, engine: TorchEngine, kind: Kind, num_virtual_tokens: int) -> None:
    """Against transformers without our cache: embeddings concatenated, or a prefix as past; text starts at position P."""
    prompt, ids = random_prompt(tiny, kind, num_virtual_tokens, 11), text(13, 12)
    recorder = Recorder()
    generated = await tokens_of(engine, request(ids, prompt, recorder, 6))
    all_ids = [*ids, *generated[:-1]]
    expected = plain_logits(tiny, prompt, all_ids)[len(ids) - 1 :]
    assert (recorder.all - expected).abs().max() < TOLERANCE
    shifted = plain_logits(tiny, prompt, all_ids, shift=1)[len(ids) - 1 :]
    assert (recorder.all - shifted).abs().max() > 10 * TOLERANCE  # control: text positions off by one show


async def test_two_domains_with_equal_text_never_share_kv(tiny: BaseModel, engine: TorchEngine) -> None:
    ids = text(20, 1)
    prompts = [random_prompt(tiny, "prefix_kv", 16, seed) for seed in (1, 2)]
    recorders = [Recorder(), Recorder()]
    await asyncio.gather(*(tokens_of(engine, request(ids, p, r)) for p, r in zip(prompts, recorders, strict=True)))
    assert (recorders[0].all - recorders[1].all).abs().max() > 10 * TOLERANCE
    for prompt, recorder in zip(prompts, recorders, strict=True):
        assert (recorder.logits[0] - plain_logits(tiny, prompt, ids)[-1]).abs().max() < TOLERANCE


async def test_a_row_that_was_used_before_leaves_nothing_behind(tiny: BaseModel) -> None:
    async with TorchEngine(tiny, num_rows=1, context_tokens=256) as engine:
        await tokens_of(engine, request(text(150, 1), random_prompt(tiny, "prefix_kv", 64, 1)))
        used = Recorder()
        await tokens_of(engine, request(text(4, 2), None, used))
    async with TorchEngine(tiny, num_rows=1, context_tokens=256) as engine:
        fresh = Recorder()
        await tokens_of(engine, request(text(4, 2), None, fresh))
    assert (used.all - fresh.all).abs().max() < TOLERANCE


async def test_prefix_kv_is_computed_once_for_each_version(tiny: BaseModel, engine: TorchEngine) -> None:
    prompt = random_prompt(tiny, "embeds", 16, 1)
    same_bytes = SoftPrompt("embeds", prompt.tensor.clone())
    await asyncio.gather(*(tokens_of(engine, request(text(5, seed), prompt)) for seed in range(6)))
    await tokens_of(engine, request(text(5, 9), same_bytes))
    stats = engine.stats().prefix
    assert (stats.num_misses, stats.num_hits) == (1, 6)


async def test_a_cancelled_request_frees_its_slot_at_the_next_step(tiny: BaseModel) -> None:
    async with TorchEngine(tiny, num_rows=1, context_tokens=256) as engine:
        long = engine.generate(request(text(5, 1), max_tokens=200))
        await anext(long)
        waiting = asyncio.ensure_future(tokens_of(engine, request(text(5, 2), max_tokens=2)))
        await long.aclose()
        assert len(await asyncio.wait_for(waiting, 10)) == 2
        assert engine.stats().num_generated_tokens < 100  # the long one had 200 to go


async def test_a_request_cancelled_while_it_waits_is_never_run(tiny: BaseModel) -> None:
    gate = threading.Event()
    async with TorchEngine(tiny, num_rows=1, context_tokens=256) as engine:
        first = asyncio.ensure_future(tokens_of(engine, request(text(5, 1), None, Recorder(gate), max_tokens=3)))
        recorder = Recorder()
        second = asyncio.ensure_future(tokens_of(engine, request(text(5, 2), None, recorder)))
        await asyncio.sleep(0.05)
        second.cancel()
        gate.set()
        assert len(await first) == 3
        with pytest.raises(asyncio.CancelledError):
            await second
        await tokens_of(engine, request(text(5, 3), max_tokens=2))
    assert recorder.logits == []


async def test_a_full_queue_refuses_at_once(tiny: BaseModel) -> None:
    gate = threading.Event()
    async with TorchEngine(tiny, num_rows=1, max_waiting=2, context_tokens=256) as engine:
        holding = asyncio.ensure_future(tokens_of(engine, request(text(5, 1), None, Recorder(gate), max_tokens=1)))
        while engine.stats().num_active == 0:  # noqa: ASYNC110  the engine's thread sets it
            await asyncio.sleep(0.01)
        waiting = [asyncio.ensure_future(tokens_of(engine, request(text(5, seed), max_tokens=1))) for seed in (2, 3)]
        await asyncio.sleep(0.01)
        with pytest.raises(EngineBusyError, match="2 requests are waiting, at most 2"):
            await tokens_of(engine, request(text(5, 4)))
        gate.set()
        assert [len(tokens) for tokens in await asyncio.gather(holding, *waiting)] == [1, 1, 1]


async def test_an_over_long_request_is_refused_with_the_numbers(tiny: BaseModel, engine: TorchEngine) -> None:
    with pytest.raises(MessageTooLongError, match=r"16 virtual and 250 text tokens .* context of 256"):
        await tokens_of(engine, request(text(250, 1), random_prompt(tiny, "embeds", 16, 1)))
    generated = await tokens_of(engine, request(text(250, 1), max_tokens=100))
    assert len(generated) == 6  # what the context still holds


async def test_equal_seeds_draw_equal_tokens_whatever_else_is_in_the_batch(tiny: BaseModel, engine: TorchEngine) -> None:
    seeded = {"temperature": 1.5, "top_p": 0.95, "seed": 1234}
    alone = await tokens_of(engine, request(text(6, 1), None, None, 20, **seeded))
    others = [request(text(7, seed), None, None, 25, temperature=1.0) for seed in range(2, 6)]
    crowded, *_ = await asyncio.gather(
        *(tokens_of(engine, one) for one in [request(text(6, 1), None, None, 20, **seeded), *others])
    )
    assert crowded == alone
    assert await tokens_of(engine, request(text(6, 1), None, None, 20, **{**seeded, "seed": 1235})) != alone


async def test_log_probabilities_are_the_models_own_whatever_is_done_to_its_logits(
    tiny: BaseModel, engine: TorchEngine
) -> None:
    """Against the plain model, with a penalty, a temperature, top-k and a processor that writes into what it is given."""

    def forbid_in_place(text_ids: Sequence[int], logits: Tensor) -> Tensor:
        logits[int(logits.argmax())] = -torch.inf
        return logits

    prompt, ids = random_prompt(tiny, "prefix_kv", 16, 11), text(13, 12)
    sampling = SamplingParams(temperature=1.5, top_k=50, repetition_penalty=1.3, seed=3, top_logprobs=5)
    one = GenerationRequest(ids, 8, PromptRef.of(prompt), sampling, logits_processors=[forbid_in_place])
    tokens = [token async for token in engine.generate(one)]
    generated = [token.token_id for token in tokens]
    expected = plain_logits(tiny, prompt, [*ids, *generated[:-1]])[len(ids) - 1 :].log_softmax(dim=1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=TOLERANCE)
        assert [token_id for token_id, _ in token.top_logprobs] == row.topk(5).indices.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(row.topk(5).values.tolist(), abs=TOLERANCE)
        assert token.token_id != token.top_logprobs[0][0]  # forbidden, and yet told
    shifted = plain_logits(tiny, prompt, [*ids, *generated[:-1]], shift=1)[len(ids) - 1 :].log_softmax(dim=1)
    told = torch.tensor([token.logprob for token in tokens])
    assert (told - shifted[torch.arange(8), generated]).abs().max() > 10 * TOLERANCE  # control: another position shows


async def test_log_probabilities_are_given_only_where_they_are_asked_for(
    engine: TorchEngine,
) -> None:
    plain = [token async for token in engine.generate(request(text(5, 1), max_tokens=2))]
    assert [(token.logprob, token.top_logprobs) for token in plain] == [(None, ())] * 2
    own = [token async for token in engine.generate(request(text(5, 1), max_tokens=2, top_logprobs=0))]
    assert [token.top_logprobs for token in own] == [(), ()]
    assert all(token.logprob is not None and token.logprob < 0 for token in own)


async def test_why_generation_ends(tiny: BaseModel, engine: TorchEngine) -> None:
    async def ending(**changes: object) -> list[GeneratedToken]:
        one = GenerationRequest(text(6, 1), 10, sampling=SamplingParams(temperature=0), **changes)  # type: ignore[arg-type]
        return [token async for token in engine.generate(one)]

    plain = await ending()
    assert len(plain) == 10
    assert [token.finish_reason for token in plain] == [None] * 9 + ["length"]
    third = plain[2].token_id
    by_token = await ending(stop_token_ids=frozenset({third}))
    assert by_token[-1] == GeneratedToken(third, "stop")
    assert len(by_token) <= 3
    by_condition = await ending(stop=lambda ids: len(ids) == 4)
    assert (len(by_condition), by_condition[-1].finish_reason) == (4, "stop")


async def test_a_broken_processor_fails_only_its_own_request(tiny: BaseModel, engine: TorchEngine) -> None:
    def broken(text_ids: Sequence[int], logits: Tensor) -> Tensor:
        raise ZeroDivisionError("broken on purpose")

    good = asyncio.ensure_future(tokens_of(engine, request(text(5, 1), max_tokens=12)))
    one = GenerationRequest(text(5, 2), 5, logits_processors=[broken])
    with pytest.raises(EngineFailedError, match="ZeroDivisionError: broken on purpose"):
        await tokens_of(engine, one)
    assert len(await good) == 12
    assert engine.stats().num_active == 0


def overflowing(base: BaseModel, num_virtual_tokens: int) -> SoftPrompt:
    """Finite, but its attention scores are infinities of both signs, whose sum is NaN."""
    prompt = random_prompt(base, "prefix_kv", num_virtual_tokens, seed=1)
    return SoftPrompt("prefix_kv", prompt.tensor.sign() * 3e38)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_logits_that_are_not_finite_fail_their_own_request_and_leave_nothing_behind(
    tiny: BaseModel, order: tuple[int, ...]
) -> None:
    """Also where others read: a masked weight of 0 times a NaN is NaN, and the row that failed may have been moved."""
    short, long = request(text(4, 1), max_tokens=12), request(text(60, 2), max_tokens=12)
    broken = request(text(30, 3), overflowing(tiny, 40))
    async with TorchEngine(tiny, num_rows=3, context_tokens=256) as engine:
        alone = [await tokens_of(engine, one) for one in (short, long)]
        for _ in range(2):
            asked = [(short, broken, request(text(9, 4), max_tokens=1))[index] for index in order]
            outcomes = await asyncio.gather(*(tokens_of(engine, one) for one in asked), return_exceptions=True)
            assert outcomes[order.index(0)] == alone[0]
            failed = outcomes[order.index(1)]
            assert isinstance(failed, EngineFailedError)
            assert "the model gives nan as logit; set FRONTDESK_DTYPE" in str(failed)
            assert all(bool((layer.keys == 0).all() and (layer.values == 0).all()) for layer in engine._cache.rows)
            assert await asyncio.gather(*(tokens_of(engine, one) for one in (long, short, short))) == [
                alone[1],
                alone[0],
                alone[0],
            ]


async def test_stopping_drains_then_cancels(tiny: BaseModel) -> None:
    engine = TorchEngine(tiny, context_tokens=256, drain_s=10)
    async with engine:
        drained = asyncio.ensure_future(tokens_of(engine, request(text(5, 1), max_tokens=20)))
        await asyncio.sleep(0.01)
    assert len(await drained) == 20
    with pytest.raises(EngineStoppedError):
        await tokens_of(engine, request(text(5, 1)))
    impatient = TorchEngine(tiny, context_tokens=256, drain_s=0)
    async with impatient:
        left = asyncio.ensure_future(tokens_of(impatient, request(text(5, 1), max_tokens=200)))
        await asyncio.sleep(0.01)
    with pytest.raises(EngineStoppedError):
        await left
    assert not impatient.is_running


async def test_the_event_loop_stays_free_while_the_model_works(tiny: BaseModel, engine: TorchEngine) -> None:
    working = asyncio.ensure_future(tokens_of(engine, request(text(100, 1), max_tokens=60)))
    num_turns = 0
    while not working.done():
        await asyncio.sleep(0)
        num_turns += 1
    # A loop that waited for every step would turn about once for each of the 60 tokens.
    assert num_turns > 300


SIZES = {"vocab_size": 49_152, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_an_architecture_that_cannot_be_served_is_refused_by_name(tiny: BaseModel) -> None:
    with pytest.raises(ModelNotServedError, match=r"random \(falcon\) does not take this engine's cache and masks"):
        TorchEngine(random_model(tiny, FalconConfig(**SIZES, alibi=True)))


async def test_other_architectures_are_served(tiny: BaseModel) -> None:
    gpt2 = GPT2Config(vocab_size=49_152, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    qwen2 = Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=128)
    for config in (gpt2, qwen2):
        base = random_model(tiny, config)
        prompt, ids, recorder = random_prompt(base, "embeds", 16, 11), text(13, 12), Recorder()
        async with TorchEngine(base) as engine:
            generated = await tokens_of(engine, request(ids, prompt, recorder, 4))
        expected = plain_logits(base, prompt, [*ids, *generated[:-1]])[len(ids) - 1 :]
        assert (recorder.all - expected).abs().max() < TOLERANCE


def test_a_sliding_window_bounds_the_context(tiny: BaseModel) -> None:
    config = MistralConfig(**SIZES, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=512, sliding_window=64)
    assert TorchEngine(random_model(tiny, config)).context_tokens == 64


async def test_real_model_answers_like_transformers_generate(smollm2: BaseModel) -> None:
    """Greedy text of the default model in fp32, beside another sequence, token for token."""
    ids = smollm2.tokenizer("The capital of France is")["input_ids"]
    expected = smollm2.model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :].tolist()
    async with TorchEngine(smollm2, context_tokens=256) as engine:
        other = request(text(30, 1), random_prompt(smollm2, "prefix_kv", 16, 1), max_tokens=16)
        got, _ = await asyncio.gather(tokens_of(engine, request(ids, max_tokens=16)), tokens_of(engine, other))
    assert got == expected


async def test_the_starters_in_one_batch_equal_each_alone(smollm2: BaseModel) -> None:
    """The real model in fp32 with the three trained prompts and a row without one."""
    chat_format = ChatFormat(smollm2.tokenizer)
    served = ServedModel.of(smollm2, chat_format)
    folders = [STARTER_DIR / domain / TRAINED for domain in starter_domains()]
    prompts = [None, *(read_soft_prompt(folder, read_version(folder), served) for folder in folders)]
    asked = ["Hello", "I lost my card", "My head hurts since yesterday and I feel sick", "Translate: Good morning."]
    ids = [chat_format.render([Message(role="user", content=question)], 500).token_ids for question in asked]
    together, alone = [[Recorder() for _ in prompts] for _ in range(2)]
    async with TorchEngine(smollm2, context_tokens=256) as engine:
        rows = zip(ids, prompts, together, strict=True)
        await asyncio.gather(*(tokens_of(engine, request(*row, max_tokens=6)) for row in rows))
        for row in zip(ids, prompts, alone, strict=True):
            await tokens_of(engine, request(*row, max_tokens=6))
    for mixed, single in zip(together, alone, strict=True):
        assert (mixed.all - single.all).abs().max() < TOLERANCE
    assert (alone[1].logits[0] - alone[2].logits[0]).abs().max() > 10 * TOLERANCE
