"""How well answers are predicted: loss and accuracy per answer token, for every way of serving, by the same code; and chrF.

The frozen model has neither prompt nor system message; the brief stands as system message before the frozen model; the
trained prompt stands at the serving layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat, Rendered
from prompt_bank.conversation import Conversation
from prompt_bank.soft_prompt import SoftPrompt
from trainers.dataset import batches_in_order, render_all
from trainers.serving_layout import VirtualTokens, logits_at


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss (nats) and share of answer tokens, stop tokens included, that are the model's first choice."""

    loss: float
    accuracy: float

    @property
    def metrics(self) -> dict[str, float]:
        return {"loss": round(self.loss, 4), "accuracy": round(self.accuracy, 4)}


@torch.no_grad()
def score(base: BaseModel, rows: Sequence[Rendered], prompt: SoftPrompt | None, batch_size: int = 8) -> Score:
    """Every answer token counts the same, whatever batch it is in."""
    virtual = None if prompt is None else VirtualTokens.of(prompt, base)
    total_loss, num_correct, num_tokens = 0.0, 0, 0
    for batch in batches_in_order(rows, batch_size):
        on_device = batch.to(base.device)
        logits = logits_at(base, virtual, on_device.input_ids, on_device.is_predicting).float()
        total_loss += float(cross_entropy(logits, on_device.targets, reduction="sum"))
        num_correct += int((logits.argmax(dim=-1) == on_device.targets).sum())
        num_tokens += len(on_device.targets)
    return Score(total_loss / num_tokens, num_correct / num_tokens)


def score_before(
    base: BaseModel, chat_format: ChatFormat, conversations: Sequence[Conversation], brief: str
) -> dict[str, Score]:
    """The frozen model alone, and with the brief as its system message."""
    return {
        "frozen": score(base, render_all(conversations, chat_format), None),
        "brief": score(base, render_all(conversations, chat_format, brief), None),
    }


def chrf(texts: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF (Popović 2015), 0 to 100: how well character n-grams of the texts agree with one reference each."""
    from sacrebleu.metrics import CHRF  # only translation is measured this way

    value: float = CHRF().corpus_score(list(texts), [list(references)]).score
    return value
