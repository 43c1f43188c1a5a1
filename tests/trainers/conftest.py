"""Conversations small enough for the two-layer random model."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat, Rendered
from prompt_bank.conversation import Conversation
from trainers.dataset import render_all
from trainers.evaluate import Score

SPOKEN = (
    ("Is the branch open?", "Yes, until five."),
    ("I lost my card", "Please freeze it in the app."),
    ("hi", "Hello, how can I help?"),
    ("What is the fee?", "I cannot see fees here, the price list in the app shows them all."),
    ("Can you send me a new card to my other address?", "Yes, change it first."),
    ("thanks", "You're welcome."),
)


def conversation(*spoken: str) -> Conversation:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(spoken)]
    return Conversation.model_validate({"messages": messages})


def write_jsonl(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    records = [conversation(*row).model_dump(exclude_none=True) for row in rows]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


class Recorder:
    """A run's progress, kept."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.losses: list[float] = []
        self.validations: list[Score] = []

    def started(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def stepped(self, loss: float) -> None:
        self.losses.append(loss)

    def validated(self, validation: Score) -> None:
        self.validations.append(validation)


@pytest.fixture(scope="session")
def chat_format(tiny: BaseModel) -> ChatFormat:
    return ChatFormat(tiny.tokenizer)


@pytest.fixture(scope="session")
def conversations() -> list[Conversation]:
    return [conversation(*spoken) for spoken in SPOKEN] + [conversation(*SPOKEN[0], *SPOKEN[1])]


@pytest.fixture(scope="session")
def rows(conversations: list[Conversation], chat_format: ChatFormat) -> list[Rendered]:
    return render_all(conversations, chat_format)
