"""Messages, turns and conversations as plain values, and their JSONL record: the contract between log and training.

A record is one line of JSON in the form that OpenAI fine-tuning files use, `{"messages": [{"role", "content"}, ...]}`; an
assistant's message may carry what the log knows of its turn (`turn_id`, `domain`, `version`, `digest`, `author`, `vote`,
`reason`, `correction`). Knows nothing of tokens.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from prompt_bank.errors import ConversationFileError

Role = Literal["system", "user", "assistant"]


class Message(BaseModel):
    """One utterance."""

    model_config = ConfigDict(frozen=True)

    role: Role
    content: str


class AnswerRecord(Message):
    """A message of a JSONL record; the fields beyond role and content describe an assistant's answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    turn_id: str | None = None
    domain: str | None = None
    version: int | None = None
    digest: str | None = None
    author: Literal["bot", "human"] | None = None
    vote: Literal["up", "down"] | None = None
    reason: str | None = None
    correction: str | None = None


class Conversation(BaseModel):
    """Messages in order: an optional system message, then user and assistant in turn, starting with the user.

    A record ends with an answer, so that every user message in it is answered.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str | None = None
    messages: tuple[AnswerRecord, ...] = Field(min_length=2)

    @model_validator(mode="after")
    def _roles_in_order(self) -> "Conversation":
        num_system = int(self.messages[0].role == "system")
        spoken = self.messages[num_system:]
        for index, message in enumerate(spoken):
            place, expected = f"message {num_system + index + 1}", ("user", "assistant")[index % 2]
            if message.role != expected:
                raise ValueError(f"{place} has role {message.role!r}, expected {expected!r}")
            if not message.content.strip():
                raise ValueError(f"{place} is empty")
        if not spoken or spoken[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's")
        return self


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a JSONL file; blank lines are skipped.

    Raises ConversationFileError naming file and row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConversationFileError(f"{path}: cannot be read ({error.strerror}); give a JSONL file") from error
    except UnicodeDecodeError as error:
        raise ConversationFileError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    # Not splitlines(): U+2028 and its kind are legal inside a JSON string.
    rows = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise ConversationFileError(f"{path}: has no conversations; expected one JSON record a line")
    return [_parse(path, number, line) for number, line in rows]


def _parse(path: Path, number: int, line: str) -> Conversation:
    try:
        return Conversation.model_validate_json(line)
    except ValidationError as error:
        raise ConversationFileError(f"{path}, row {number}: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """The first of pydantic's problems in one line, with the place it was seen."""
    problem: Any = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in problem["loc"])
    text = str(problem["msg"]).removeprefix("Value error, ")
    return f"{place}: {text}" if place else text


def record_lines(conversations: Iterable[Conversation]) -> Iterator[str]:
    """Each conversation as one line of JSON, without its newline."""
    for conversation in conversations:
        yield conversation.model_dump_json(exclude_none=True)
