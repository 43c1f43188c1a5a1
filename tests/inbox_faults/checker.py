"""Says of every acknowledged message whether it was lost, answered twice, out of order, or with another history. Pure."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prompt_bank.conversation import Message


@dataclass(frozen=True)
class Asked:
    """An acknowledged message. Those of a conversation are given in the order of their acknowledgements."""

    id: str
    conversation: str
    text: str


@dataclass(frozen=True)
class Answered:
    """A turn as the log has it. Those of a conversation are given in the log's order."""

    message_id: str | None
    conversation: str
    question: str
    answer: str
    finish_reason: str
    num_prompt_tokens: int
    version: int | None = None


# How many tokens a version (None where none answered) is given for these messages, so that a turn more or less shows.
NumTokens = Callable[[Sequence[Message], int | None], int]


def check(asked: Sequence[Asked], answered: Sequence[Answered], num_tokens: NumTokens) -> list[str]:
    """All that is wrong, one line each."""
    counts = Counter(turn.message_id for turn in answered)
    problems = [f"message {one.id} was lost" for one in asked if not counts[one.id]]
    problems += [f"message {id_} was answered {count} times" for id_, count in counts.items() if count > 1]
    problems += [f"message {id_} was never acknowledged" for id_ in counts.keys() - {one.id for one in asked}]
    texts = {one.id: one.text for one in asked}
    by_conversation = _grouped(answered)
    for conversation, ids in _ids(asked).items():
        turns = by_conversation.get(conversation, [])
        in_log = [turn.message_id for turn in turns]
        if in_log != [id_ for id_ in ids if id_ in in_log]:
            problems.append(f"conversation {conversation} was answered in the order {in_log}, asked in the order {ids}")
        problems += [f"turn of {turn.message_id}: {problem}" for turn, problem in _wrong(turns, texts, num_tokens)]
    return problems


def _ids(asked: Sequence[Asked]) -> dict[str, list[str]]:
    ids = defaultdict(list)
    for one in asked:
        ids[one.conversation].append(one.id)
    return ids


def _grouped(answered: Sequence[Answered]) -> dict[str, list[Answered]]:
    groups = defaultdict(list)
    for turn in answered:
        groups[turn.conversation].append(turn)
    return groups


def _wrong(turns: Sequence[Answered], texts: Mapping[str, str], num_tokens: NumTokens) -> Iterator[tuple[Answered, str]]:
    history: list[Message] = []
    for turn in turns:
        if turn.finish_reason not in ("stop", "length"):
            yield turn, f"it ended as {turn.finish_reason}"
        if turn.question != texts.get(turn.message_id or "", turn.question):
            yield turn, f"it answers {turn.question!r}"
        question = Message(role="user", content=turn.question)
        if turn.num_prompt_tokens != (expected := num_tokens([*history, question], turn.version)):
            yield turn, f"it was given {turn.num_prompt_tokens} tokens, its predecessors make {expected}"
        if turn.answer:
            history += [question, Message(role="assistant", content=turn.answer)]


def check_heard(events: Sequence[Mapping[str, Any]], turn: Answered) -> list[str]:
    """What a follower was told of a message's turn, all events of it in their order, against the log."""
    kinds = [event["type"] for event in events]
    if "turn.started" not in kinds or kinds[-1] != "turn.completed":
        return [f"message {turn.message_id}: a follower was told {kinds}"]
    last = max(index for index, kind in enumerate(kinds) if kind == "turn.started")  # what came before it is void
    text = "".join(event["text"] for event in events[last:] if event["type"] == "turn.delta")
    told = {"streamed": text, "told at the end": events[-1]["turn"]["answer"]}
    return [
        f"message {turn.message_id}: {answer!r} was {how}, the log has {turn.answer!r}"
        for how, answer in told.items()
        if answer != turn.answer
    ]
