"""Attention on virtual tokens, against the same words run as plain text, and on a prompt with a sink."""

import pytest
import torch
from torch import Tensor

from bot.inspection.attention import attention_weights, measure_attention
from prompt_bank.base_model import BaseModel
from prompt_bank.soft_prompt import SoftPrompt
from tests.bot.inspection.conftest import prompt_of_words, word_ids
from tests.prompt_bank.conftest import make_prompt

TEXTS = [[50, 600, 7000, 88], [9, 10, 11, 12, 13, 14, 15]]


@torch.inference_mode()
def weights_of_plain_text(base: BaseModel, text: list[int]) -> list[Tensor]:
    """Words and text in one sequence: what the text's tokens look at, [heads, T, P + T] a layer."""
    base.model.set_attn_implementation("eager")
    output = base.model(torch.tensor([word_ids(base) + text]), output_attentions=True, use_cache=False)
    return [layer[0, :, -len(text) :] for layer in output.attentions]


def test_weights_are_those_of_the_same_words_as_text(architecture: BaseModel) -> None:
    before = architecture.model.config._attn_implementation
    try:
        expected = weights_of_plain_text(architecture, TEXTS[0])
        prompt = prompt_of_words(architecture, "prefix_kv")
        with torch.inference_mode():
            got = attention_weights(architecture, prompt.tensor, TEXTS[0])
            moved = attention_weights(architecture, prompt.tensor.roll(1, dims=3), TEXTS[0])
    finally:
        if before != "eager":
            architecture.model.set_attn_implementation(before)
    assert len(got) == architecture.shape.num_layers
    for layer, wanted, other in zip(got, expected, moved, strict=True):
        assert torch.allclose(layer.sum(dim=-1), torch.ones(layer.shape[:-1]), atol=1e-5)
        assert torch.allclose(layer, wanted, atol=1e-5)
        assert (other - wanted).abs().max() > 1e-4


def test_shares_are_means_over_heads_layers_and_all_text_tokens(tiny: BaseModel) -> None:
    prompt = prompt_of_words(tiny, "prefix_kv")
    before = tiny.model.config._attn_implementation
    attention = measure_attention(tiny, prompt.tensor, TEXTS)
    assert tiny.model.config._attn_implementation == before != "eager"
    try:
        rows = [torch.stack(weights_of_plain_text(tiny, text))[..., : prompt.num_virtual_tokens] for text in TEXTS]
    finally:
        tiny.model.set_attn_implementation(before)
    by_layer = torch.cat([each.mean(dim=1) for each in rows], dim=1).mean(dim=1)  # [L, P]
    assert torch.allclose(torch.tensor(attention.by_layer), by_layer, atol=1e-5)
    assert attention.by_token == pytest.approx(by_layer.mean(dim=0).tolist(), abs=1e-5)
    assert attention.share == pytest.approx(sum(attention.by_token))
    assert 0 < attention.share < 1


def test_keys_of_zero_share_evenly(tiny: BaseModel) -> None:
    """One text token and virtual tokens it cannot tell apart: all but its own weight is even."""
    prompt = make_prompt(tiny.shape, "prefix_kv", num_virtual_tokens=4)
    flat = prompt.tensor.clone()
    flat[:, 0] = 0
    attention = measure_attention(tiny, flat, [[50]])
    assert attention.even_share == pytest.approx(4 / 5)
    assert attention.by_token == pytest.approx([attention.share / 4] * 4, abs=1e-6)


def test_a_virtual_token_with_a_huge_key_is_found(tiny: BaseModel) -> None:
    prompt = make_prompt(tiny.shape, "prefix_kv", num_virtual_tokens=8)
    before = measure_attention(tiny, prompt.tensor, TEXTS).by_token
    sink = prompt.tensor.clone()
    sink[:, 0, :, 5] *= 1000
    after = measure_attention(tiny, SoftPrompt("prefix_kv", sink).tensor, TEXTS).by_token
    assert max(range(8), key=after.__getitem__) == 5
    # About half of the queries point its way, and look at nothing else.
    assert after[5] > 0.3
    assert after[5] > 2 * before[5]
