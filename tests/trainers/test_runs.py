"""What a run records of how far its prompt moved."""

import pytest
import torch

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Conversation
from prompt_bank.soft_prompt import Kind, SoftPrompt
from tests.prompt_bank.conftest import make_card, make_prompt
from tests.trainers.conftest import Recorder
from trainers.dataset import Dataset
from trainers.runs import drift, initial_prompt, train_domain
from trainers.settings import TuningSettings


@pytest.mark.parametrize("kind", ["embeds", "prefix_kv"])
def test_drift_is_of_each_virtual_token_relative_to_its_start(tiny: BaseModel, kind: Kind) -> None:
    initial = make_prompt(tiny.shape, kind, num_virtual_tokens=3)
    moved = initial.tensor.clone()
    (moved if kind == "embeds" else moved.movedim(3, 0))[1] *= -1  # by twice its length
    assert drift(initial, SoftPrompt(kind, moved)) == pytest.approx((0, 2, 0))


# PEFT 0.21 asks transformers for a name it has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_run_records_how_far_its_prompt_moved(
    tiny: BaseModel, chat_format: ChatFormat, conversations: list[Conversation]
) -> None:
    settings = TuningSettings(num_virtual_tokens=16, num_epochs=2)
    dataset = Dataset(tuple(conversations[:5]), tuple(conversations[5:]))
    trained = train_domain(tiny, chat_format, make_card(), dataset, settings, Recorder())
    before = initial_prompt(tiny, chat_format, make_card(), settings).tensor
    difference = trained.prompt.tensor - before
    expected = [float(difference[..., i, :].norm() / before[..., i, :].norm()) for i in range(16)]
    assert trained.record.drift == pytest.approx(expected, abs=1e-3)
    assert torch.tensor(expected).min() > 1e-3
