"""Training data: conversations from JSONL files, their digest, their split, and padded batches of token ids.

What a model learns from a conversation is decided by the chat format alone. A record's own system message is left out: the
soft prompt stands in its place. Knows nothing of models or soft prompts.

Notation: B batch, T text tokens, N answer tokens in a batch.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prompt_bank.chat_format import ChatFormat, Rendered
from prompt_bank.conversation import Conversation, Message, read_conversations, record_lines
from prompt_bank.errors import ConversationFileError

VALIDATION_SHARE = 0.1
# Conversations of like length share a batch; the jitter keeps the same ones from meeting in every epoch.
_LENGTH_JITTER = 0.15


@dataclass(frozen=True, slots=True)
class Dataset:
    """An immutable snapshot. `test` is empty when none was given: held-out figures are then those of `validation`."""

    train: tuple[Conversation, ...]
    validation: tuple[Conversation, ...]
    test: tuple[Conversation, ...] = ()

    @property
    def held_out(self) -> tuple[Conversation, ...]:
        return self.test or self.validation

    @property
    def digest(self) -> str:
        """SHA-256 over the records of each part, as `record_lines` writes them."""
        digest = hashlib.sha256()
        for name, part in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            digest.update(f"{name} {len(part)}\n".encode())
            for line in record_lines(part):
                digest.update(f"{line}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations side by side, padded at the end, where causal attention needs no mask.

    input_ids [B, T]; is_predicting [B, T] is true at t where token t + 1 counts in the loss; targets [N] are those tokens,
    in the order in which `is_predicting` selects positions.
    """

    input_ids: Tensor
    is_predicting: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Sequence[Rendered]) -> "Batch":
        num_tokens = max(len(row.token_ids) for row in rows)
        token_ids = torch.zeros((len(rows), num_tokens), dtype=torch.long)
        in_loss = torch.zeros((len(rows), num_tokens), dtype=torch.bool)
        for index, row in enumerate(rows):
            token_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
            in_loss[index, : len(row.loss_mask)] = torch.tensor(row.loss_mask)
        return cls(token_ids[:, :-1], in_loss[:, 1:], token_ids[:, 1:][in_loss[:, 1:]])

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.is_predicting.to(device), self.targets.to(device))


def read_dataset(
    train: Path, validation: Path | None, test: Path | None, chat_format: ChatFormat, max_tokens: int, seed: int
) -> Dataset:
    """Reads the files; without a validation file a tenth of the training conversations, chosen by `seed`, is held out.

    Raises ConversationFileError naming file and row, also for a conversation of more than `max_tokens`.
    """
    train_part = _read_part(train, chat_format, max_tokens)
    test_part = _read_part(test, chat_format, max_tokens) if test else ()
    if validation is not None:
        return Dataset(train_part, _read_part(validation, chat_format, max_tokens), test_part)
    if len(train_part) < 2:
        raise ConversationFileError(
            f"{train}: has one conversation, expected at least 2 (one is held out); add more, or give --validation"
        )
    kept, held_out = split_validation(train_part, seed)
    return Dataset(kept, held_out, test_part)


def _read_part(path: Path, chat_format: ChatFormat, max_tokens: int) -> tuple[Conversation, ...]:
    conversations = read_conversations(path)
    learnt = tuple(filter(is_worth_learning, conversations))
    if not learnt:
        raise ConversationFileError(f"{path}: every conversation has an answer that was voted down; expected some without")
    for index, rendered in enumerate(render_all(conversations, chat_format)):
        if len(rendered.token_ids) > max_tokens:
            raise ConversationFileError(
                f"{path}, row {_row_of(path, index)}: the conversation takes {len(rendered.token_ids)} tokens, at most "
                f"{max_tokens} fit; split it into shorter ones"
            )
    return learnt


def _row_of(path: Path, index: int) -> int:
    """The row of the conversation with this index: blank lines hold none."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [number for number, line in enumerate(lines, 1) if line.strip()][index]


def split_validation(
    conversations: Sequence[Conversation], seed: int
) -> tuple[tuple[Conversation, ...], tuple[Conversation, ...]]:
    """What is trained on and what is held out, each in file order. A conversation is never divided."""
    num_held_out = max(1, round(len(conversations) * VALIDATION_SHARE))
    held_out = set(random.Random(seed).sample(range(len(conversations)), num_held_out))
    kept = tuple(conversation for index, conversation in enumerate(conversations) if index not in held_out)
    return kept, tuple(conversations[index] for index in sorted(held_out))


def render_all(conversations: Sequence[Conversation], chat_format: ChatFormat, brief: str | None = None) -> list[Rendered]:
    """Each conversation as it is served: behind virtual tokens, or with `brief` as its system message. None is shortened."""
    system = [Message(role="system", content=brief)] if brief else []
    return [chat_format.render(system + spoken_messages(c), context_tokens=1_000_000_000) for c in conversations]


def spoken_messages(conversation: Conversation) -> list[Message]:
    """What was said; where a person gave a better answer, that one."""
    return [
        Message(role=message.role, content=message.correction or message.content)
        for message in conversation.messages
        if message.role != "system"
    ]


def is_worth_learning(conversation: Conversation) -> bool:
    """No answer in it was voted down and left uncorrected."""
    return not any(message.vote == "down" and not message.correction for message in conversation.messages)


def batches_in_order(rows: Sequence[Rendered], batch_size: int) -> Iterator[Batch]:
    """Every row once, by length, for evaluation."""
    yield from _cut(sorted(rows, key=lambda row: len(row.token_ids)), batch_size)


def shuffled_batches(rows: Sequence[Rendered], batch_size: int, rng: random.Random) -> Iterator[Batch]:
    """Every row once, conversations of like length together, in an order drawn from `rng`."""
    by_length = sorted(rows, key=lambda row: len(row.token_ids) * rng.uniform(1 - _LENGTH_JITTER, 1 + _LENGTH_JITTER))
    batches = list(_cut(by_length, batch_size))
    rng.shuffle(batches)
    yield from batches


def _cut(rows: Sequence[Rendered], batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(rows), batch_size):
        yield Batch.of(rows[start : start + batch_size])
