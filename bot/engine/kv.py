"""The KV cache: one preallocated tensor per layer and side, one row a sequence. All use of transformers' cache classes is here.

A row holds positions [0, P) prefix KV, [P, P + T) text, and zeros beyond that. The mask hides them from the row's own queries,
but a masked weight of 0 times a NaN or an infinity that another sequence left there would be NaN.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from prompt_bank.base_model import BaseModel


class RowLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer's keys and values [R, H_kv, C, D]; an update writes at given rows and positions and returns what is read."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._rows = slice(0, 0)
        self._positions = torch.empty(0, 0, dtype=torch.long)
        self._kv_length = 0

    def aim(self, rows: slice, positions: Tensor, kv_length: int) -> None:
        """Says where the next update goes: `rows` (B of them) at `positions` [B, T], reading [0, kv_length)."""
        self._rows, self._positions, self._kv_length = rows, positions, kv_length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes [B, H_kv, T, D] and returns [B, H_kv, kv_length, D], a view."""
        keys, values = self.keys[self._rows], self.values[self._rows]
        batch = torch.arange(keys.shape[0], device=keys.device)[:, None]
        keys[batch, :, self._positions] = key_states.transpose(1, 2)
        values[batch, :, self._positions] = value_states.transpose(1, 2)
        return keys[:, :, : self._kv_length], values[:, :, : self._kv_length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("rows are allocated before the first step")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._kv_length, 0

    def get_seq_length(self) -> int:
        return self._kv_length - self._positions.shape[1]

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


class RowCache(Cache):  # type: ignore[misc]
    """KV of up to `num_rows` sequences of up to `capacity` positions. Rows [0, n) are the active ones."""

    def __init__(self, base: BaseModel, num_rows: int, capacity: int) -> None:
        shape = base.shape
        size = (num_rows, shape.num_kv_heads, capacity, shape.head_size)

        # Zeros, not empty: see above. The system commits pages when written.
        def side() -> Tensor:
            return torch.zeros(size, dtype=base.dtype, device=base.device)

        self.rows = [RowLayer(side(), side()) for _ in range(shape.num_layers)]
        super().__init__(layers=self.rows)

    def aim(self, rows: slice, positions: Tensor, kv_length: int) -> None:
        for layer in self.rows:
            layer.aim(rows, positions, kv_length)

    def write_prefix(self, row: int, prefix_kv: Tensor) -> None:
        """Puts prefix KV [L, 2, H_kv, P, D] at positions [0, P) of a row."""
        num_virtual_tokens = prefix_kv.shape[3]
        for layer, (keys, values) in zip(self.rows, prefix_kv, strict=True):
            layer.keys[row, :, :num_virtual_tokens] = keys
            layer.values[row, :, :num_virtual_tokens] = values

    def clear_row(self, row: int, length: int) -> None:
        """Zeros at positions [0, length), all that its sequence wrote."""
        for layer in self.rows:
            layer.keys[row, :, :length] = 0
            layer.values[row, :, :length] = 0

    def move_row(self, source: int, target: int, length: int) -> None:
        """From a row to one that is clear; the source is clear after it."""
        for layer in self.rows:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]
        self.clear_row(source, length)


def attention_mask(positions: Tensor, kv_length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, kv_length] for queries at `positions` [B, T]: each sees positions up to its own."""
    keys = torch.arange(kv_length, device=positions.device)
    hidden = keys[None, None, None, :] > positions[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, -torch.inf)


class EmbedsConversion:
    """Input embeddings [P, H] on their way to the prefix KV they leave behind, a few virtual tokens a step.

    Exact for causal models. The cache is built without the configuration: a windowed one would keep too little.
    """

    def __init__(self, base: BaseModel, embeds: Tensor, tokens_per_step: int) -> None:
        self._base = base
        self._chunks = [embeds[start : start + tokens_per_step] for start in range(0, len(embeds), tokens_per_step)]
        self._cache = DynamicCache()

    def step(self) -> Tensor | None:
        """Runs the next virtual tokens. The prefix KV [L, 2, H_kv, P, D] once the last have run."""
        base, chunk, start = self._base, self._chunks.pop(0), self._cache.get_seq_length()
        base.model(
            inputs_embeds=chunk[None].to(base.device, base.dtype),
            position_ids=torch.arange(start, start + len(chunk), device=base.device)[None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if self._chunks:
            return None
        return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in self._cache.layers])


def kv_of_embeds(base: BaseModel, embeds: Tensor) -> Tensor:
    """The prefix KV [L, 2, H_kv, P, D] of input embeddings [P, H], in one step."""
    prefix_kv = EmbedsConversion(base, embeds, len(embeds)).step()
    assert prefix_kv is not None
    return prefix_kv


def positions_tensor(base: BaseModel, positions: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(positions, dtype=torch.long, device=base.device)
