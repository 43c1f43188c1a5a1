"""Prefix KV of soft prompts, computed once for each digest and shared by every sequence of that version.

The digest is the only key, so a version that is republished under the same name can never meet the KV of the old one. One
store belongs to one engine, so base model and dtype are given. Owned by the engine thread.
"""

from collections import OrderedDict

from torch import Tensor

from bot.engine.kv import kv_of_embeds
from prompt_bank.base_model import BaseModel
from prompt_bank.soft_prompt import SoftPrompt


class PrefixStore:
    """Least recently used prefix KV goes when the budget in bytes is exceeded."""

    def __init__(self, base: BaseModel, budget_bytes: int) -> None:
        self._base = base
        self._budget_bytes = budget_bytes
        self._entries: OrderedDict[str, Tensor] = OrderedDict()
        self.num_hits = 0
        self.num_misses = 0
        self.num_bytes = 0

    def get(self, prompt: SoftPrompt) -> Tensor:
        """[L, 2, H_kv, P, D] in the serving dtype, on the device."""
        entry = self._entries.get(prompt.digest)
        if entry is not None:
            self.num_hits += 1
            self._entries.move_to_end(prompt.digest)
            return entry
        self.num_misses += 1
        entry = self._compute(prompt)
        self._entries[prompt.digest] = entry
        self.num_bytes += entry.nbytes
        while self.num_bytes > self._budget_bytes and len(self._entries) > 1:
            self.num_bytes -= self._entries.popitem(last=False)[1].nbytes
        return entry

    def _compute(self, prompt: SoftPrompt) -> Tensor:
        if prompt.kind == "embeds":
            return kv_of_embeds(self._base, prompt.tensor)
        return prompt.tensor.to(self._base.device, self._base.dtype)
