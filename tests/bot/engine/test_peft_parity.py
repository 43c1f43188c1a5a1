"""What PEFT trains answers here as it answers in PEFT, and back: every method on three architectures, prefill and decode.

The reference is PEFT's own model, loaded from the folder that PEFT saved, over a base model that the engine never touched. It
computes each step from the whole sequence, in float32. PEFT 0.21 on transformers 5.23 runs every method on every one of these.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import BloomConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from bot.engine.torch_engine import TorchEngine
from prompt_bank.base_model import BaseModel
from prompt_bank.peft_format import read_peft, write_peft
from prompt_bank.soft_prompt import KINDS, Kind, SoftPrompt
from tests.bot.engine.tools import TOLERANCE, Recorder, random_model, random_prompt, request, text, tokens_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks

NUM_STEPS = 5
NUM_VIRTUAL = 6

# Weights far from zero, so that a wrong position or prompt shows in the logits.
SIZES = {"vocab_size": 49_152, "initializer_range": 0.2}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        **SIZES, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "gpt2": GPT2Config(**SIZES, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0),
    # Six heads: ALiBi has other slopes when their number is no power of two.
    "bloom": BloomConfig(**SIZES, hidden_size=96, n_layer=2, n_head=6),
}

_COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": NUM_VIRTUAL}
METHODS: dict[str, PeftConfig] = {
    "prompt tuning": PromptTuningConfig(**_COMMON),
    "p-tuning": PromptEncoderConfig(**_COMMON, encoder_hidden_size=32),
    "cpt": CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=list(range(20, 20 + NUM_VIRTUAL)),
        cpt_mask=[1] * NUM_VIRTUAL,
        cpt_tokens_type_mask=[1, 2, 3, 4, 4, 4],
    ),
    "multitask 0": MultitaskPromptTuningConfig(**_COMMON, num_tasks=3, num_ranks=2),
    "multitask 1": MultitaskPromptTuningConfig(**_COMMON, num_tasks=3, num_ranks=2),
    "prefix tuning": PrefixTuningConfig(**_COMMON),
    "prefix tuning projected": PrefixTuningConfig(**_COMMON, prefix_projection=True, encoder_hidden_size=32),
    "cartridge": CartridgeConfig(**_COMMON, num_frozen_tokens=2),
}


def trained(base: BaseModel, config: PeftConfig, folder: Path) -> None:
    """Saves a prompt of this method with random parameters far from zero, all by PEFT."""
    model = get_peft_model(base.model, deepcopy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    model.save_pretrained(folder)


@torch.no_grad()
def logits_by_peft(base: BaseModel, folder: Path, task_id: int | None, ids: list[int], generated: list[int]) -> Tensor:
    """[N, V] of the steps that chose `generated`; each from the whole sequence."""
    model = PeftModel.from_pretrained(base.model, folder).eval()
    task = {} if task_id is None else {"task_ids": torch.tensor([task_id])}
    steps = [[*ids, *generated[:count]] for count in range(len(generated))]
    return torch.stack([model(input_ids=torch.tensor([step]), **task).logits[0, -1] for step in steps])


async def logits_by_engine(base: BaseModel, prompt: SoftPrompt, ids: list[int]) -> tuple[Tensor, list[int]]:
    """[N, V] of prefill and the decode steps after it, and what they chose."""
    recorder = Recorder()
    async with TorchEngine(base, num_rows=1, context_tokens=64) as engine:
        generated = await tokens_of(engine, request(ids, prompt, recorder, NUM_STEPS))
    return recorder.all, generated


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_the_engine_answers_as_peft_does(tiny: BaseModel, tmp_path: Path, architecture: str, method: str) -> None:
    config, ids = ARCHITECTURES[architecture], text(9, 3)
    task_id = int(method.split()[1]) if method.startswith("multitask") else None
    trained(random_model(tiny, config), METHODS[method], tmp_path)
    served = random_model(tiny, config)
    prompt = read_peft(tmp_path, served.shape, task_id=task_id)
    assert prompt.num_virtual_tokens == NUM_VIRTUAL
    got, generated = await logits_by_engine(served, prompt, ids)
    expected = logits_by_peft(random_model(tiny, config), tmp_path, task_id, ids, generated)
    assert len(expected) == NUM_STEPS
    assert (got - expected).abs().max() < TOLERANCE
    # Controls: another prompt, and the same with a virtual token less, which puts the text one position off.
    one_less = prompt.tensor[:-1] if prompt.kind == "embeds" else prompt.tensor[:, :, :, :-1]
    for other in (random_prompt(served, prompt.kind, NUM_VIRTUAL, 99), SoftPrompt(prompt.kind, one_less.contiguous())):
        wrong, _ = await logits_by_engine(served, other, ids)
        assert (wrong[0] - expected[0]).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_peft_answers_with_an_exported_prompt_as_the_engine_does(
    tiny: BaseModel, tmp_path: Path, architecture: str, kind: Kind
) -> None:
    config, ids = ARCHITECTURES[architecture], text(9, 3)
    served = random_model(tiny, config)
    prompt = random_prompt(served, kind, NUM_VIRTUAL, 5)
    write_peft(prompt, tmp_path, served.shape, served.name)
    got, generated = await logits_by_engine(served, prompt, ids)
    by_peft = logits_by_peft(random_model(tiny, config), tmp_path, None, ids, generated)
    assert (got - by_peft).abs().max() < TOLERANCE
    wrong, _ = await logits_by_engine(served, random_prompt(served, kind, NUM_VIRTUAL, 99), ids)
    assert (wrong[0] - by_peft[0]).abs().max() > 10 * TOLERANCE


async def test_tasks_of_a_multitask_prompt_are_told_apart(tiny: BaseModel, tmp_path: Path) -> None:
    base, ids = random_model(tiny, ARCHITECTURES["llama"]), text(9, 3)
    trained(random_model(tiny, ARCHITECTURES["llama"]), METHODS["multitask 0"], tmp_path)
    first, second = [(await logits_by_engine(base, read_peft(tmp_path, base.shape, task), ids))[0][0] for task in (0, 1)]
    assert (first - second).abs().max() > 10 * TOLERANCE


def test_a_model_adapted_twice_stays_what_it_was(tiny: BaseModel) -> None:
    """Two engines over one BLOOM, and BLOOM's own forward beside them."""
    base, ids = random_model(tiny, ARCHITECTURES["bloom"]), torch.tensor([text(9, 3)])
    expected = base.model(input_ids=ids).logits
    padded = base.model(input_ids=ids, attention_mask=torch.tensor([[0, 0] + [1] * 7])).logits
    for _ in range(2):
        TorchEngine(base, num_rows=1, context_tokens=64)
    assert torch.equal(base.model(input_ids=ids).logits, expected)
    assert torch.equal(base.model(input_ids=ids, attention_mask=torch.tensor([[0, 0] + [1] * 7])).logits, padded)
