"""The manifest of a version: what it is made of and where it came from. Its presence is what makes a version exist."""

from datetime import UTC, datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from prompt_bank.soft_prompt import Kind


class _Record(BaseModel):
    # A metric may be NaN; as JSON's null it could not be read back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class BaseModelRecord(_Record):
    name: str
    fingerprint: str


class SoftPromptRecord(_Record):
    kind: Kind
    digest: str
    num_virtual_tokens: int
    num_bytes: int


class TrainingRecord(_Record):
    """How a soft prompt was trained. `metrics` holds held-out figures before (frozen, brief) and after (trained).

    `drift` [P] is how far training moved each virtual token: ||v - v0|| / ||v0||, v0 its initial vectors, over all layers.
    `imported_from` is empty for what was trained in this bank; of anything else nobody here can say whether it is true.
    """

    seed: int
    data_digest: str
    num_conversations: int
    settings: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    seconds: float
    drift: tuple[float, ...] = ()
    imported_from: str = ""


class Manifest(_Record):
    domain: str
    version: int = Field(ge=1)
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    actor: str = ""
    reason: str = ""
    base_model: BaseModelRecord
    chat_format: str
    card_sha256: str
    soft_prompt: SoftPromptRecord | None = None
    parent: int | None = None
    training: TrainingRecord | None = None

    @model_validator(mode="after")
    def _drift_of_each_virtual_token(self) -> Self:
        num_virtual_tokens = self.soft_prompt.num_virtual_tokens if self.soft_prompt else 0
        if self.training and len(self.training.drift) not in (0, num_virtual_tokens):
            raise ValueError(f"has the drift of {len(self.training.drift)} virtual tokens, there are {num_virtual_tokens}")
        return self
