"""The model's forward at the serving layout, `[virtual tokens][chat text]`: what training and evaluation run on.

Virtual tokens take positions 0 to P - 1 and the text starts at P. Knows nothing of conversations.

Notation: B batch, T text tokens, P virtual tokens, H hidden size, L layers, H_kv key-value heads, D head size, V vocabulary,
N positions whose logits are wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from bot.engine.kv import kv_of_embeds
from prompt_bank.base_model import BaseModel
from prompt_bank.soft_prompt import Kind, SoftPrompt


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """A soft prompt in a forward: on the model's device, and perhaps a parameter. `vectors` is [P, H] or [L, 2, H_kv, P, D]."""

    kind: Kind
    vectors: Tensor

    @classmethod
    def of(cls, prompt: SoftPrompt, base: BaseModel) -> "VirtualTokens":
        return cls(prompt.kind, prompt.tensor.to(base.device))

    @property
    def num_tokens(self) -> int:
        return self.vectors.shape[0] if self.kind == "embeds" else self.vectors.shape[3]


def logits_at(base: BaseModel, virtual: VirtualTokens | None, input_ids: Tensor, is_wanted: Tensor) -> Tensor:
    """Logits [N, V] at the positions of `input_ids` [B, T] that `is_wanted` [B, T] selects, behind `virtual`.

    Rows are padded at the end, where causal attention needs no mask. Gradients reach `virtual`, which may be float32 under a
    model of lower precision.
    """
    batch_size, num_tokens = input_ids.shape
    num_virtual = virtual.num_tokens if virtual else 0
    positions = torch.arange(num_virtual, num_virtual + num_tokens, device=input_ids.device)
    arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if virtual is not None and virtual.kind == "prefix_kv":
        arguments |= {"past_key_values": _prefix_cache(virtual.vectors.to(base.dtype), batch_size), "use_cache": True}
    elif virtual is not None:
        prompt = virtual.vectors.to(base.dtype).expand(batch_size, -1, -1)
        text = base.model.get_input_embeddings()(input_ids)
        arguments = {"inputs_embeds": torch.cat([prompt, text], dim=1), "use_cache": False}  # [B, P + T, H]
        positions = torch.arange(num_virtual + num_tokens, device=input_ids.device)
        is_wanted = pad(is_wanted, (num_virtual, 0))  # [B, P + T]
    arguments["position_ids"] = positions.expand(batch_size, -1)
    logits: Tensor = base.model(**arguments, logits_to_keep=is_wanted).logits
    return logits


def _prefix_cache(prefix: Tensor, batch_size: int) -> DynamicCache:
    """A cache holding `prefix` [L, 2, H_kv, P, D] for each row; without a configuration, so that no layer is windowed."""
    layers = prefix.unsqueeze(2).expand(-1, -1, batch_size, -1, -1, -1)  # [L, 2, B, H_kv, P, D]
    return DynamicCache([(layer[0], layer[1]) for layer in layers])


@torch.no_grad()
def prefix_kv_of(base: BaseModel, embeds: Tensor) -> Tensor:
    """The prefix KV [L, 2, H_kv, P, D], float32 on the CPU, that the model computes from input embeddings [P, H]."""
    return kv_of_embeds(base, embeds).float().cpu()


@torch.no_grad()
def greedy_answers(
    base: BaseModel, prompt: SoftPrompt | None, texts: Sequence[Sequence[int]], max_new_tokens: int = 80
) -> list[list[int]]:
    """The likeliest continuation of each text, token by token, without its stop token.

    Texts are padded at their start, behind the virtual tokens; masked pads have no position, so that each continuation is
    that of the text alone.
    """
    num_virtual = prompt.num_virtual_tokens if prompt else 0
    cache = DynamicCache()
    if prompt is not None:
        prefix = prompt.tensor if prompt.kind == "prefix_kv" else prefix_kv_of(base, prompt.tensor)
        cache = _prefix_cache(prefix.to(base.device, base.dtype), len(texts))
    longest = max(len(text) for text in texts)
    step_ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=base.device)  # [B, T]
    is_text = torch.tensor([[False] * (longest - len(text)) + [True] * len(text) for text in texts], device=base.device)
    positions = (is_text.cumsum(dim=1) - 1).clamp(min=0) + num_virtual  # [B, T]
    mask = pad(is_text, (num_virtual, 0), value=True).long()  # [B, P + T]
    answers: list[list[int]] = [[] for _ in texts]
    unfinished = set(range(len(texts)))
    for _ in range(max_new_tokens):
        output = base.model(
            input_ids=step_ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        step_ids = output.logits[:, -1:].argmax(dim=-1)  # [B, 1]
        positions, mask = positions[:, -1:] + 1, pad(mask, (0, 1), value=1)
        unfinished -= {row for row in unfinished if int(step_ids[row]) in base.stop_token_ids}
        for row in unfinished:
            answers[row].append(int(step_ids[row]))
        if not unfinished:
            break
    return answers
