"""Trains a soft prompt against conversations. Only the prompt moves: the model's weights take no gradients.

Loss is the cross-entropy of answer tokens, at the serving layout. The prompt is float32, the model stays in its serving
dtype. Knows nothing of domains, cards or the bank.
"""

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import Rendered
from prompt_bank.errors import TrainingError
from prompt_bank.soft_prompt import Kind, SoftPrompt
from trainers.dataset import Batch, shuffled_batches
from trainers.evaluate import Score, score
from trainers.serving_layout import VirtualTokens, logits_at
from trainers.settings import TuningSettings


class Progress(Protocol):
    """Told how a run goes."""

    def started(self, num_steps: int) -> None: ...

    def stepped(self, loss: float) -> None: ...

    def validated(self, validation: Score) -> None: ...


@dataclass(frozen=True, slots=True)
class Tuned:
    """The best prompt of a run by validation loss, and where it was found. Step 0 is the initial prompt."""

    prompt: SoftPrompt
    validation: Score
    best_step: int
    num_steps: int


class PromptModule(nn.Module):
    """The frozen model behind a prompt that is its only parameter."""

    def __init__(self, base: BaseModel, initial: SoftPrompt) -> None:
        super().__init__()
        self._base = base  # a plain value, not a submodule: its weights are not this module's parameters
        self.kind: Kind = initial.kind
        self.vectors = nn.Parameter(initial.tensor.to(base.device, copy=True))

    def forward(self, batch: Batch) -> Tensor:
        """Mean loss over the batch's answer tokens."""
        logits = logits_at(self._base, VirtualTokens(self.kind, self.vectors), batch.input_ids, batch.is_predicting)
        return cross_entropy(logits.float(), batch.targets)

    def soft_prompt(self) -> SoftPrompt:
        return SoftPrompt(self.kind, self.vectors.detach().cpu().clone())


def tune(
    base: BaseModel,
    train: Sequence[Rendered],
    validation: Sequence[Rendered],
    initial: SoftPrompt,
    settings: TuningSettings,
    progress: Progress,
) -> Tuned:
    """Trains `initial` on `train`, validating after every epoch and stopping once that no longer gets better.

    Raises TrainingError when the loss is no finite number.
    """
    run = _Run(base, initial, settings, num_steps=settings.num_epochs * math.ceil(len(train) / settings.batch_size))
    progress.started(run.num_steps)
    best = Tuned(initial, score(base, validation, initial, settings.batch_size), 0, 0)
    progress.validated(best.validation)
    rng = random.Random(settings.seed)
    epochs_without_gain = 0
    while run.share_done < 1 and epochs_without_gain < settings.patience_epochs:
        for batch in shuffled_batches(train, settings.batch_size, rng):
            progress.stepped(run.step(batch))
            if run.share_done >= 1:
                break
        prompt = run.module.soft_prompt()
        current = score(base, validation, prompt, settings.batch_size)
        progress.validated(current)
        if current.loss < best.validation.loss:
            best, epochs_without_gain = Tuned(prompt, current, run.num_done, 0), 0
        else:
            epochs_without_gain += 1
    return Tuned(best.prompt, best.validation, best.best_step, run.num_done)


class _Run:
    """Optimiser and schedule of one run. The rate rises over the warm-up and falls along a cosine to zero."""

    def __init__(self, base: BaseModel, initial: SoftPrompt, settings: TuningSettings, num_steps: int) -> None:
        self._settings = settings
        self._accelerator = Accelerator(cpu=base.device.type == "cpu", mixed_precision="no")
        self.module = PromptModule(base, initial)
        # No weight decay: zero is no better a place for a prompt than where it is.
        adam = torch.optim.Adam([self.module.vectors], lr=settings.peak_learning_rate)
        self._optimizer = self._accelerator.prepare_optimizer(adam)
        self._device = base.device
        self._started = time.monotonic()
        self.num_steps, self.num_done = num_steps, 0

    @property
    def share_done(self) -> float:
        """Of the steps or of the time, whichever is further."""
        by_steps = self.num_done / self.num_steps
        if self._settings.max_seconds is None:
            return by_steps
        return max(by_steps, (time.monotonic() - self._started) / self._settings.max_seconds)

    def step(self, batch: Batch) -> float:
        """One update; gives the loss before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.peak_learning_rate * _schedule(self.share_done, self._settings.warmup_share)
        loss: Tensor = self.module(batch.to(self._device))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"step {self.num_done + 1}: the loss is {value}; nothing was published, try a lower learning rate than "
                f"{self._settings.peak_learning_rate}"
            )
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_([self.module.vectors], self._settings.max_gradient_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.num_done += 1
        return value


def _schedule(share_done: float, warmup_share: float) -> float:
    """The learning rate's share of its peak."""
    if share_done < warmup_share:
        return max(share_done / warmup_share, 0.1)
    share_left = (1 - share_done) / (1 - warmup_share)
    return 0.5 * (1 - math.cos(math.pi * max(0.0, share_left)))
