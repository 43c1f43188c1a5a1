"""What tests of the engine ask it for, and what they compare its answers with."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from bot.engine.request import GenerationRequest, PromptRef, SamplingParams
from bot.engine.torch_engine import TorchEngine
from prompt_bank.base_model import BaseModel, ModelShape
from prompt_bank.soft_prompt import Kind, SoftPrompt, expected_shape

TOLERANCE = 1e-4


class Recorder:
    """A logits processor that keeps what it sees; optionally stays in a step until it is released."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.logits: list[Tensor] = []
        self.gate = gate

    def __call__(self, text_ids: Sequence[int], logits: Tensor) -> Tensor:
        if self.gate is not None:
            assert self.gate.wait(30)
        self.logits.append(logits.clone())
        return logits

    @property
    def all(self) -> Tensor:
        return torch.stack(self.logits)


def random_prompt(base: BaseModel, kind: Kind, num_virtual_tokens: int, seed: int) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    shape = expected_shape(kind, num_virtual_tokens, base.shape)
    return SoftPrompt(kind, torch.randn(shape, generator=generator))


def text(length: int, seed: int) -> list[int]:
    return torch.randint(10, 40_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request(
    token_ids: list[int],
    prompt: SoftPrompt | None = None,
    recorder: Recorder | None = None,
    max_tokens: int = 8,
    **sampling: object,
) -> GenerationRequest:
    return GenerationRequest(
        token_ids=token_ids,
        max_tokens=max_tokens,
        prompt=PromptRef.of(prompt) if prompt else None,
        sampling=SamplingParams(**{"temperature": 0, **sampling}),  # type: ignore[arg-type]
        logits_processors=[recorder] if recorder else [],
    )


async def tokens_of(engine: TorchEngine, one: GenerationRequest) -> list[int]:
    return [token.token_id async for token in engine.generate(one)]


def plain_logits(base: BaseModel, prompt: SoftPrompt, ids: list[int], shift: int = 0) -> Tensor:
    num_virtual_tokens = prompt.num_virtual_tokens
    positions = torch.arange(num_virtual_tokens, num_virtual_tokens + len(ids))[None] + shift
    with torch.inference_mode():
        if prompt.kind == "embeds":
            embeds = torch.cat([prompt.tensor, base.model.get_input_embeddings()(torch.tensor(ids))])[None]
            all_positions = torch.cat([torch.arange(num_virtual_tokens)[None], positions], dim=1)
            return base.model(inputs_embeds=embeds, position_ids=all_positions).logits[0, num_virtual_tokens:]
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(prompt.tensor):
            cache.update(keys[None], values[None], layer)
        return base.model(input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=cache).logits[0]


def random_model(base: BaseModel, config: PreTrainedConfig) -> BaseModel:
    """Another architecture with random weights, over the same tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return replace(base, name="random", model=model, shape=ModelShape.of(config))
