"""What single architectures need before they take this engine's masks. Changes a loaded model's instance, never its class."""

from typing import Any

import torch
from torch import Tensor


def adapt(model: Any) -> None:
    """Makes `model` take masks [B, 1, T, kv_length]. Calling it again changes nothing."""
    if model.config.model_type == "bloom":
        _let_bloom_take_square_masks(model.transformer)


def _let_bloom_take_square_masks(transformer: Any) -> None:
    """BLOOM derives ALiBi from a mask [B, kv_length], and builds it from any other mask wrongly or not at all.

    In our rows key i stands at position i, so that ALiBi is that of a mask of ones.
    """
    build = type(transformer).build_alibi_tensor

    def build_alibi_tensor(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        if attention_mask.dim() == 4:
            batch_size, _, _, kv_length = attention_mask.shape
            attention_mask = torch.ones(batch_size, kv_length, device=attention_mask.device)
        alibi: Tensor = build(transformer, attention_mask, num_heads, dtype)
        return alibi

    transformer.build_alibi_tensor = build_alibi_tensor
