"""One training run of a domain: from its card and a dataset to a soft prompt with the record a version keeps of it."""

import time
from dataclasses import asdict, dataclass

from prompt_bank.base_model import BaseModel
from prompt_bank.card import Card
from prompt_bank.chat_format import ChatFormat
from prompt_bank.manifest import TrainingRecord
from prompt_bank.soft_prompt import SoftPrompt, check_soft_prompt
from trainers.dataset import Dataset, render_all
from trainers.evaluate import score, score_before
from trainers.initializers import from_random, from_text
from trainers.settings import TuningSettings
from trainers.tuning import Progress, tune

# A conversation of more would slow every batch it is in; the serving context is far longer.
_MAX_CONVERSATION_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class TrainedDomain:
    prompt: SoftPrompt
    record: TrainingRecord


def max_conversation_tokens(base: BaseModel, settings: TuningSettings) -> int:
    return min(_MAX_CONVERSATION_TOKENS, base.context_tokens - settings.num_virtual_tokens)


def train_domain(
    base: BaseModel, chat_format: ChatFormat, card: Card, dataset: Dataset, settings: TuningSettings, progress: Progress
) -> TrainedDomain:
    """Trains a prompt for `card` and measures it on held-out conversations beside the frozen model and the brief.

    Raises TrainingError, or SoftPromptError when the prompt cannot be served.
    """
    started = time.monotonic()
    initial = initial_prompt(base, chat_format, card, settings)
    train, validation = render_all(dataset.train, chat_format), render_all(dataset.validation, chat_format)
    tuned = tune(base, train, validation, initial, settings, progress)
    seconds = time.monotonic() - started
    scores = score_before(base, chat_format, dataset.held_out, card.brief)
    scores["trained"] = score(base, render_all(dataset.held_out, chat_format), tuned.prompt)
    record = TrainingRecord(
        seed=settings.seed,
        data_digest=dataset.digest,
        num_conversations=len(dataset.train),
        settings={
            **asdict(settings),
            "learning_rate": settings.peak_learning_rate,
            "dtype": str(base.dtype).removeprefix("torch."),
            "num_steps": tuned.num_steps,
            "best_step": tuned.best_step,
            "validation_loss": round(tuned.validation.loss, 4),
            "held_out": "test" if dataset.test else "validation",
            "num_held_out": len(dataset.held_out),
        },
        metrics={setup: figures.metrics for setup, figures in scores.items()},
        seconds=round(seconds, 1),
        drift=drift(initial, tuned.prompt),
    )
    return TrainedDomain(check_soft_prompt(tuned.prompt, base.shape), record)


def initial_prompt(base: BaseModel, chat_format: ChatFormat, card: Card, settings: TuningSettings) -> SoftPrompt:
    if settings.init == "random":
        return from_random(base, settings.kind, settings.num_virtual_tokens, settings.seed)
    return from_text(base, chat_format, settings.kind, settings.num_virtual_tokens, card.brief)


def drift(initial: SoftPrompt, trained: SoftPrompt) -> tuple[float, ...]:
    """How far each virtual token moved, relative to the length of its initial vectors, over all layers."""
    before, after = initial.by_token, trained.by_token
    return tuple(round(float(moved), 4) for moved in (after - before).norm(dim=1) / before.norm(dim=1))
