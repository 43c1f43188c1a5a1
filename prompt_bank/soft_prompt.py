"""A soft prompt: the learned vectors of one domain version, what they must look like, and their digest.

Two kinds. `embeds` [P, H]: vectors in place of input embeddings (prompt tuning, Lester et al. 2021; P-tuning).
`prefix_kv` [L, 2, H_kv, P, D]: keys (after rotary embedding) and values of every layer (prefix tuning, Li and Liang 2021).
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prompt_bank.base_model import ModelShape
from prompt_bank.errors import SoftPromptError

Kind = Literal["embeds", "prefix_kv"]
KINDS: tuple[Kind, ...] = ("embeds", "prefix_kv")
MAX_VIRTUAL_TOKENS = 1024


@dataclass(frozen=True)
class SoftPrompt:
    """`tensor` is float32 on the CPU and is never changed."""

    kind: Kind
    tensor: Tensor

    @property
    def num_virtual_tokens(self) -> int:
        return self.tensor.shape[0] if self.kind == "embeds" else self.tensor.shape[3]

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def by_token(self) -> Tensor:
        """[P, W]: all numbers of each virtual token, of every layer."""
        return (self.tensor if self.kind == "embeds" else self.tensor.movedim(3, 0)).flatten(1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over kind, dtype, shape and bytes: the only key under which anything of this prompt is cached."""
        head = f"{self.kind} {self.tensor.dtype} {tuple(self.tensor.shape)} ".encode()
        raw = self.tensor.contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(head + raw.tobytes()).hexdigest()

    def to_bytes(self) -> bytes:
        return bytes(save({self.kind: self.tensor.contiguous()}))

    @classmethod
    def from_bytes(cls, blob: bytes) -> "SoftPrompt":
        """Raises SoftPromptError when `blob` is not one safetensors tensor named after its kind."""
        try:
            tensors = load(blob)
        except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch has not
            raise SoftPromptError(f"not a safetensors blob: {error}") from error
        kinds = [kind for kind in KINDS if kind in tensors]
        if len(tensors) != 1 or not kinds:
            raise SoftPromptError(f"blob holds tensors {sorted(tensors)}, expected one of {KINDS}")
        return cls(kinds[0], tensors[kinds[0]])


def expected_shape(kind: Kind, num_virtual_tokens: int, model: ModelShape) -> tuple[int, ...]:
    if kind == "embeds":
        return (num_virtual_tokens, model.hidden_size)
    return (model.num_layers, 2, model.num_kv_heads, num_virtual_tokens, model.head_size)


def check_soft_prompt(prompt: SoftPrompt, model: ModelShape) -> SoftPrompt:
    """The prompt itself, once rank, length, widths, dtype and values are what `model` can take; else SoftPromptError."""
    rank = 2 if prompt.kind == "embeds" else 5
    if prompt.tensor.dim() != rank:
        raise SoftPromptError(f"{prompt.kind} has rank {prompt.tensor.dim()}, expected {rank}")
    if not 1 <= prompt.num_virtual_tokens <= MAX_VIRTUAL_TOKENS:
        raise SoftPromptError(f"{prompt.num_virtual_tokens} virtual tokens, expected 1 to {MAX_VIRTUAL_TOKENS}")
    expected = expected_shape(prompt.kind, prompt.num_virtual_tokens, model)
    if tuple(prompt.tensor.shape) != expected:
        raise SoftPromptError(f"{prompt.kind} has shape {tuple(prompt.tensor.shape)}, this base model takes {expected}")
    if prompt.tensor.dtype != torch.float32:
        raise SoftPromptError(f"{prompt.kind} is {prompt.tensor.dtype}, expected float32")
    if not bool(torch.isfinite(prompt.tensor).all()):
        raise SoftPromptError(f"{prompt.kind} has values that are not finite; train it again")
    if float(prompt.tensor.abs().max()) > torch.finfo(torch.float16).max:
        raise SoftPromptError(f"{prompt.kind} has values beyond half precision's range; train it again")
    return prompt
