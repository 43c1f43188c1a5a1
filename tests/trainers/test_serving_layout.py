"""The layout trained at is the layout served at. Each parity has a control that misses its tolerance tenfold."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat, Rendered
from prompt_bank.conversation import Message
from prompt_bank.soft_prompt import SoftPrompt, check_soft_prompt
from trainers.dataset import Batch
from trainers.evaluate import score
from trainers.initializers import from_random, from_text, system_token_ids
from trainers.serving_layout import VirtualTokens, greedy_answers, logits_at, prefix_kv_of

TEXT = "You are the calm assistant of a small bank. Answer in one or two sentences and never ask for a PIN or a password."
TOLERANCE = 2e-4
NUM_VIRTUAL = 16


def text_prefix(base: BaseModel, chat_format: ChatFormat) -> tuple[list[int], SoftPrompt]:
    """P token ids of a system message, and their prefix KV."""
    token_ids = system_token_ids(base, chat_format, NUM_VIRTUAL, TEXT)
    return token_ids, from_text(base, chat_format, "prefix_kv", NUM_VIRTUAL, TEXT)


def all_logits(base: BaseModel, prompt: SoftPrompt | None, token_ids: list[int]) -> Tensor:
    """[T, V]"""
    input_ids = torch.tensor([token_ids])
    virtual = VirtualTokens.of(prompt, base) if prompt else None
    return logits_at(base, virtual, input_ids, torch.ones_like(input_ids, dtype=torch.bool))


@pytest.mark.parametrize("model", ["tiny", "smollm2"])
@torch.no_grad()
def test_a_prefix_from_text_answers_as_the_text_itself(
    model: str, request: pytest.FixtureRequest, rows: list[Rendered]
) -> None:
    base: BaseModel = request.getfixturevalue(model)
    system_ids, prompt = text_prefix(base, ChatFormat(base.tokenizer))
    chat_ids = rows[-1].token_ids
    expected = all_logits(base, None, system_ids + chat_ids)[NUM_VIRTUAL:]
    torch.testing.assert_close(all_logits(base, prompt, chat_ids), expected, rtol=0, atol=TOLERANCE)
    # Control: keys rotated for positions one further on stand where an off-by-one would put the text.
    shifted = from_shifted_text(base, system_ids)
    assert (all_logits(base, shifted, chat_ids) - expected).abs().max() > 10 * TOLERANCE


def from_shifted_text(base: BaseModel, token_ids: list[int]) -> SoftPrompt:
    """The prefix KV of `token_ids` at positions 1 to P."""
    output = base.model(
        input_ids=torch.tensor([token_ids]), position_ids=torch.arange(1, len(token_ids) + 1)[None], use_cache=True
    )
    layers = [torch.cat([layer.keys, layer.values]) for layer in output.past_key_values.layers]
    return SoftPrompt("prefix_kv", torch.stack(layers))


@torch.no_grad()
def test_embeds_and_their_prefix_kv_give_the_same_loss(tiny: BaseModel, rows: list[Rendered]) -> None:
    embeds = from_random(tiny, "embeds", NUM_VIRTUAL, seed=1)
    as_prefix = SoftPrompt("prefix_kv", prefix_kv_of(tiny, embeds.tensor))
    other = from_random(tiny, "embeds", NUM_VIRTUAL, seed=2)
    expected = score(tiny, rows, embeds).loss
    assert score(tiny, rows, as_prefix).loss == pytest.approx(expected, abs=1e-5)
    assert abs(score(tiny, rows, other).loss - expected) > 1e-4


@pytest.mark.parametrize("kind", ["embeds", "prefix_kv", None])
@torch.no_grad()
def test_a_padded_batch_scores_as_each_row_alone(tiny: BaseModel, rows: list[Rendered], kind: str | None) -> None:
    prompt = None if kind is None else from_random(tiny, kind, NUM_VIRTUAL, seed=1)  # type: ignore[arg-type]
    alone = [score(tiny, [row], prompt) for row in rows]
    counts = [sum(row.loss_mask) for row in rows]
    expected = sum(one.loss * count for one, count in zip(alone, counts, strict=True)) / sum(counts)
    together = score(tiny, rows, prompt, batch_size=len(rows))
    assert together.loss == pytest.approx(expected, abs=1e-5)
    assert together.loss == pytest.approx(score(tiny, rows, prompt, batch_size=3).loss, abs=1e-5)


@torch.no_grad()
def test_logits_come_only_from_the_wanted_positions(tiny: BaseModel, rows: list[Rendered]) -> None:
    batch = Batch.of(rows)
    virtual = VirtualTokens.of(from_random(tiny, "embeds", 4, seed=0), tiny)
    wanted = logits_at(tiny, virtual, batch.input_ids, batch.is_predicting)
    assert wanted.shape == (len(batch.targets), len(tiny.tokenizer))
    everywhere = torch.ones_like(batch.is_predicting)
    full = logits_at(tiny, virtual, batch.input_ids, everywhere).unflatten(0, batch.input_ids.shape)
    torch.testing.assert_close(wanted, full[batch.is_predicting], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["embeds", "prefix_kv"])
def test_initial_prompts_fit_the_model(tiny: BaseModel, chat_format: ChatFormat, kind: str) -> None:
    for prompt in (
        from_text(tiny, chat_format, kind, 48, "A short brief."),  # type: ignore[arg-type]
        from_random(tiny, kind, 48, seed=0),  # type: ignore[arg-type]
    ):
        assert check_soft_prompt(prompt, tiny.shape).num_virtual_tokens == 48


def test_a_text_is_served_as_a_closed_system_message(tiny: BaseModel, chat_format: ChatFormat) -> None:
    message = chat_format.render([Message(role="system", content=TEXT), Message(role="user", content="Hi")], 500).token_ids
    num_text = len(chat_format.text_ids(TEXT))
    whole = system_token_ids(tiny, chat_format, num_text + 5, TEXT)
    assert whole == message[: len(whole)]
    cut = system_token_ids(tiny, chat_format, 16, TEXT)
    assert (len(cut), cut[:14], cut[14:]) == (16, whole[:14], whole[-2:])


def test_a_short_text_is_repeated(tiny: BaseModel, chat_format: ChatFormat) -> None:
    text_ids = chat_format.text_ids("A short brief.")
    repeated = system_token_ids(tiny, chat_format, 5 + 2 * len(text_ids), "A short brief.")
    assert repeated[3:-2] == text_ids + text_ids
    vectors = from_text(tiny, chat_format, "embeds", len(repeated), "A short brief.").tensor
    torch.testing.assert_close(vectors, tiny.model.get_input_embeddings().weight[repeated])


def test_as_few_virtual_tokens_as_one(tiny: BaseModel, chat_format: ChatFormat) -> None:
    for num_virtual in (1, 4):
        assert from_text(tiny, chat_format, "prefix_kv", num_virtual, TEXT).num_virtual_tokens == num_virtual


def test_random_prompts_are_seeded(tiny: BaseModel) -> None:
    one, same, other = (from_random(tiny, "prefix_kv", 4, seed) for seed in (0, 0, 1))
    assert one.digest == same.digest != other.digest


def openings(rows: list[Rendered]) -> list[list[int]]:
    """Each row up to its first answer."""
    return [row.token_ids[: row.loss_mask.index(True)] for row in rows]


def test_greedy_answers_do_not_depend_on_the_batch(tiny: BaseModel, rows: list[Rendered]) -> None:
    prompt = from_random(tiny, "embeds", NUM_VIRTUAL, seed=1)
    texts = openings(rows)
    together = greedy_answers(tiny, prompt, texts, max_new_tokens=8)
    assert together == [greedy_answers(tiny, prompt, [text], max_new_tokens=8)[0] for text in texts]
    assert together != greedy_answers(tiny, from_random(tiny, "embeds", NUM_VIRTUAL, seed=2), texts, max_new_tokens=8)


def test_greedy_answers_serve_embeds_as_their_prefix_kv(tiny: BaseModel, rows: list[Rendered]) -> None:
    embeds = from_random(tiny, "embeds", NUM_VIRTUAL, seed=1)
    as_prefix = SoftPrompt("prefix_kv", prefix_kv_of(tiny, embeds.tensor))
    assert greedy_answers(tiny, embeds, openings(rows), 8) == greedy_answers(tiny, as_prefix, openings(rows), 8)


def test_an_answer_ends_before_its_stop_token(tiny: BaseModel, rows: list[Rendered]) -> None:
    texts = [row.token_ids for row in rows[:3]]
    free = greedy_answers(tiny, None, texts, max_new_tokens=6)
    stopping = replace(tiny, model=stopping_at(tiny, free[0][2]))
    assert greedy_answers(stopping, None, texts, max_new_tokens=6)[0] == free[0][: free[0].index(free[0][2])]


def stopping_at(base: BaseModel, token: int) -> object:
    from copy import deepcopy

    model = deepcopy(base.model)
    model.generation_config.eos_token_id = [token]
    return model
