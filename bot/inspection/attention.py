"""How much attention chat text gives to each virtual token, measured in the frozen model.

Notation: P virtual tokens, T text tokens, L layers, H_kv key-value heads, D head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prompt_bank.base_model import BaseModel


@dataclass(frozen=True, slots=True)
class Attention:
    """`by_layer` [L][P] is the mean weight over heads and text tokens; what is left of 1 in a layer goes to the text.

    `even_share` is what all virtual tokens would receive if every text token looked at all it sees alike.
    """

    share: float
    even_share: float
    by_layer: list[list[float]]

    @property
    def by_token(self) -> list[float]:
        """[P], the mean over layers."""
        return [sum(layers) / len(layers) for layers in zip(*self.by_layer, strict=True)]


@torch.inference_mode()
def measure_attention(base: BaseModel, prefix_kv: Tensor, texts: Sequence[Sequence[int]]) -> Attention:
    """Over `texts`, token ids as served, each behind the virtual tokens of `prefix_kv` [L, 2, H_kv, P, D]."""
    num_virtual, num_queries = prefix_kv.shape[3], sum(map(len, texts))
    total = torch.zeros(len(prefix_kv), num_virtual)
    with _eager_attention(base.model):
        for token_ids in texts:
            layers = attention_weights(base, prefix_kv, token_ids)
            total += torch.stack([layer[..., :num_virtual].float().mean(dim=0).sum(dim=0).cpu() for layer in layers])
    by_layer = total / num_queries
    even = sum(num_virtual / (num_virtual + index + 1) for text in texts for index in range(len(text)))
    return Attention(float(by_layer.sum(dim=1).mean()), even / num_queries, by_layer.tolist())


def attention_weights(base: BaseModel, prefix_kv: Tensor, token_ids: Sequence[int]) -> list[Tensor]:
    """Each layer's weights [heads, T, P + T] of text behind virtual tokens. The model must run eager attention."""
    start, end = prefix_kv.shape[3], prefix_kv.shape[3] + len(token_ids)
    output = base.model(
        input_ids=torch.tensor([list(token_ids)], device=base.device),
        position_ids=torch.arange(start, end, device=base.device)[None],
        attention_mask=torch.ones(1, end, dtype=torch.long, device=base.device),  # BLOOM takes positions from it
        past_key_values=DynamicCache([(keys[None], values[None]) for keys, values in prefix_kv]),
        output_attentions=True,
        logits_to_keep=1,
    )
    return [layer[0] for layer in output.attentions]


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """Fused attention never holds the weights. Models that know no other (BLOOM) are eager already."""
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
