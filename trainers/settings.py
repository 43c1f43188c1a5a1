"""How to train, as plain values that need no model library, so that `frontdesk train --help` can show the defaults."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prompt_bank.soft_prompt import Kind

Init = Literal["brief", "random"]

# Measured on SmolLM2-135M; the kinds differ because keys and values are of another size than embeddings.
LEARNING_RATES: "dict[Kind, float]" = {"prefix_kv": 0.02, "embeds": 0.05}


@dataclass(frozen=True, slots=True)
class TuningSettings:
    """`num_epochs` counts passes over the data; `max_seconds` ends a run early, its schedule included."""

    kind: "Kind" = "prefix_kv"
    num_virtual_tokens: int = 32
    init: Init = "brief"
    num_epochs: int = 4
    learning_rate: float | None = None
    batch_size: int = 4
    seed: int = 0
    max_seconds: float | None = None
    warmup_share: float = 0.05
    max_gradient_norm: float = 1.0
    patience_epochs: int = 2

    @property
    def peak_learning_rate(self) -> float:
        return LEARNING_RATES[self.kind] if self.learning_rate is None else self.learning_rate
