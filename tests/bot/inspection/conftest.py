"""Prompts whose contents are known, on random models of three architectures."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, PreTrainedConfig

from bot.engine.kv import kv_of_embeds
from prompt_bank.base_model import BaseModel, ModelShape
from prompt_bank.soft_prompt import Kind, SoftPrompt

WORDS = "The quick brown fox jumps over it"


def word_ids(base: BaseModel) -> list[int]:
    return [int(token_id) for token_id in base.tokenizer(WORDS, add_special_tokens=False)["input_ids"]]


@torch.inference_mode()
def prompt_of_words(base: BaseModel, kind: Kind) -> SoftPrompt:
    """The prompt that is nothing but these words, at positions 0 to P - 1."""
    embeds = base.model.get_input_embeddings()(torch.tensor(word_ids(base)))
    return SoftPrompt(kind, embeds.clone() if kind == "embeds" else kv_of_embeds(base, embeds).clone())


CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    "bloom": BloomConfig(hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2),
}


@pytest.fixture(params=["llama", *CONFIGS])
def architecture(request: pytest.FixtureRequest, tiny: BaseModel) -> BaseModel:
    """The tiny Llama, and models of other architectures over its tokenizer."""
    if request.param == "llama":
        return tiny
    config = CONFIGS[request.param]
    config.vocab_size = len(tiny.tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return dataclasses.replace(tiny, name=request.param, model=model, shape=ModelShape.of(config))
