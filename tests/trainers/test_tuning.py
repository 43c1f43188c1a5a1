from dataclasses import replace
from typing import get_args

import pytest
import torch

from prompt_bank.base_model import BaseModel, fingerprint_of
from prompt_bank.chat_format import ChatFormat, Rendered
from prompt_bank.errors import TrainingError
from prompt_bank.soft_prompt import KINDS, Kind, SoftPrompt
from tests.trainers.conftest import Recorder
from trainers.evaluate import score
from trainers.initializers import from_text
from trainers.settings import LEARNING_RATES, TuningSettings
from trainers.tuning import PromptModule, Tuned, tune

SETTINGS = TuningSettings(num_virtual_tokens=8, num_epochs=2, batch_size=2)


def run(base: BaseModel, rows: list[Rendered], settings: TuningSettings = SETTINGS) -> tuple[SoftPrompt, Tuned, Recorder]:
    initial = from_text(base, ChatFormat(base.tokenizer), settings.kind, settings.num_virtual_tokens, "Be calm.")
    recorder = Recorder()
    return initial, tune(base, rows[:5], rows[5:], initial, settings, recorder), recorder


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_prompt_moves(tiny: BaseModel, rows: list[Rendered], kind: Kind) -> None:
    before = fingerprint_of(tiny.model, tiny.tokenizer)
    initial, tuned, _ = run(tiny, rows, replace(SETTINGS, kind=kind))
    assert fingerprint_of(tiny.model, tiny.tokenizer) == before
    assert all(weight.grad is None for weight in tiny.model.parameters())
    assert tuned.prompt.digest != initial.digest
    assert [name for name, _ in PromptModule(tiny, initial).named_parameters()] == ["vectors"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_virtual_token_of_every_layer_moves(tiny: BaseModel, rows: list[Rendered], kind: Kind) -> None:
    initial, tuned, _ = run(tiny, rows, replace(SETTINGS, kind=kind))
    assert ((tuned.prompt.tensor - initial.tensor).abs().amax(dim=-1) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_validation_loss(tiny: BaseModel, rows: list[Rendered], kind: Kind) -> None:
    initial, tuned, recorder = run(tiny, rows, replace(SETTINGS, kind=kind, num_epochs=8))
    assert tuned.validation.loss < score(tiny, rows[5:], initial).loss - 0.05
    assert tuned.validation.loss == pytest.approx(score(tiny, rows[5:], tuned.prompt).loss, abs=1e-5)
    assert tuned.validation.loss == min(validation.loss for validation in recorder.validations)
    assert 0 < tuned.best_step <= tuned.num_steps == len(recorder.losses) <= recorder.num_steps


def test_the_same_seed_gives_the_same_prompt(tiny: BaseModel, rows: list[Rendered]) -> None:
    digests = [run(tiny, rows, replace(SETTINGS, seed=seed))[1].prompt.digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_the_initial_prompt_is_kept_when_training_does_not_help(tiny: BaseModel, rows: list[Rendered]) -> None:
    initial, tuned, recorder = run(tiny, rows, replace(SETTINGS, learning_rate=0.0, num_epochs=6))
    assert tuned.prompt.digest == initial.digest
    assert tuned.best_step == 0
    assert len(recorder.validations) == 1 + SETTINGS.patience_epochs  # and no epoch after patience ran out


def test_a_loss_that_is_no_number_ends_the_run(tiny: BaseModel, rows: list[Rendered]) -> None:
    with pytest.raises(TrainingError, match=r"step \d+: the loss is nan.*lower learning rate than 3e\+37"):
        run(tiny, rows, replace(SETTINGS, learning_rate=3e37, num_epochs=9, patience_epochs=9))


def test_a_run_ends_when_its_time_is_up(tiny: BaseModel, rows: list[Rendered]) -> None:
    _, tuned, recorder = run(tiny, rows, replace(SETTINGS, num_epochs=10_000, max_seconds=0.2, patience_epochs=10_000))
    assert tuned.num_steps == len(recorder.losses) < recorder.num_steps


def test_the_prompt_is_float32_over_a_model_of_lower_precision(tiny: BaseModel, rows: list[Rendered]) -> None:
    from copy import deepcopy

    halved = replace(tiny, model=deepcopy(tiny.model).to(torch.bfloat16), dtype=torch.bfloat16)
    _, tuned, _ = run(halved, rows)
    assert tuned.prompt.tensor.dtype == torch.float32
    assert (tuned.prompt.tensor != tuned.prompt.tensor.bfloat16().float()).any()


def test_every_kind_has_a_learning_rate() -> None:
    assert set(LEARNING_RATES) == set(get_args(Kind)) == set(KINDS)
    assert TuningSettings(kind="embeds").peak_learning_rate == LEARNING_RATES["embeds"]
    assert TuningSettings(kind="embeds", learning_rate=0.0).peak_learning_rate == 0
