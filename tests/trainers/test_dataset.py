import json
import random
from pathlib import Path

import pytest
import torch

from prompt_bank.chat_format import ChatFormat, Rendered
from prompt_bank.conversation import Conversation
from prompt_bank.errors import ConversationFileError
from tests.trainers.conftest import SPOKEN, conversation, write_jsonl
from trainers.dataset import (
    Batch,
    Dataset,
    batches_in_order,
    read_dataset,
    render_all,
    shuffled_batches,
    split_validation,
)


def test_loss_covers_answers_and_their_stop_token_only(chat_format: ChatFormat) -> None:
    row = render_all([conversation("Is it open?", "Yes.", "Where?", "At the station.")], chat_format)[0]
    batch = Batch.of([row])
    assert chat_format.decode(batch.targets.tolist()) == "Yes.At the station."
    stop = chat_format.tokenizer.eos_token_id
    assert batch.targets.tolist() == [*chat_format.text_ids("Yes."), stop, *chat_format.text_ids("At the station."), stop]


def test_each_predicting_position_stands_one_before_its_target(rows: list[Rendered]) -> None:
    batch = Batch.of(rows)
    expected = [row.token_ids[place] for row in rows for place in range(1, len(row.token_ids)) if row.loss_mask[place]]
    assert batch.targets.tolist() == expected
    next_ids = torch.cat([batch.input_ids[:, 1:], torch.full((len(rows), 1), -1)], dim=1)
    has_next_inside = batch.is_predicting & (next_ids >= 0)
    for row in range(len(rows)):
        places = has_next_inside[row].nonzero().flatten()
        assert next_ids[row, places].tolist() == [rows[row].token_ids[place + 1] for place in places]


def test_a_records_own_system_message_is_left_out(chat_format: ChatFormat) -> None:
    plain = conversation("Hi", "Hello.")
    with_system = Conversation.model_validate(
        {"messages": [{"role": "system", "content": "Be rude."}, *plain.model_dump(exclude_none=True)["messages"]]}
    )
    assert render_all([with_system], chat_format) == render_all([plain], chat_format)
    assert render_all([with_system], chat_format, "Be kind.") == render_all([plain], chat_format, "Be kind.")


def test_corrections_are_learnt_and_answers_voted_down_are_not(tmp_path: Path, chat_format: ChatFormat) -> None:
    def record(question: str, **judged: str) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "No.", **judged}]
        return json.dumps({"messages": messages}) + "\n"

    path = tmp_path / "log.jsonl"
    rows = [record("a", vote="up"), record("b", vote="down"), record("c", vote="down", correction="Yes."), record("d")]
    path.write_text("".join(rows))
    dataset = read_dataset(path, path, None, chat_format, 512, 0)
    assert [conversation.messages[0].content for conversation in dataset.train] == ["a", "c", "d"]
    learnt = [chat_format.decode(Batch.of([row]).targets.tolist()) for row in render_all(dataset.train, chat_format)]
    assert learnt == ["No.", "Yes.", "No."]
    path.write_text(record("b", vote="down"))
    with pytest.raises(ConversationFileError, match="every conversation has an answer that was voted down"):
        read_dataset(path, path, None, chat_format, 512, 0)


def test_batches_hold_every_row_once_whatever_the_order(rows: list[Rendered]) -> None:
    def tokens(batches: list[Batch]) -> list[int]:
        return sorted(int(batch.targets.sum()) for batch in batches)

    assert tokens(list(batches_in_order(rows, 1))) == tokens(list(shuffled_batches(rows, 1, random.Random(0))))
    assert sum(len(batch.input_ids) for batch in shuffled_batches(rows, 4, random.Random(0))) == len(rows)


def test_shuffling_is_seeded(rows: list[Rendered]) -> None:
    def order(seed: int) -> list[list[int]]:
        return [batch.targets.tolist() for batch in shuffled_batches(rows, 2, random.Random(seed))]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_split_is_seeded_and_loses_no_conversation(conversations: list[Conversation]) -> None:
    many = [conversation(f"question {index}", "answer") for index in range(40)]
    kept, held_out = split_validation(many, seed=3)
    assert len(held_out) == 4
    assert sorted(map(repr, kept + held_out)) == sorted(map(repr, many))
    assert split_validation(many, seed=3) == (kept, held_out)
    assert split_validation(many, seed=4) != (kept, held_out)
    assert len(split_validation(conversations[:2], seed=0)[1]) == 1


def test_the_digest_is_of_records_and_their_part(conversations: list[Conversation]) -> None:
    first, second, *_ = conversations
    digest = Dataset((first,), (second,)).digest
    assert digest == Dataset((first,), (second,)).digest
    others = [Dataset((second,), (first,)), Dataset((first, second), ()), Dataset((first,), (), (second,))]
    assert digest not in {other.digest for other in others}


def test_formatting_of_the_file_leaves_the_digest_alone(tmp_path: Path, chat_format: ChatFormat) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", SPOKEN)
    spaced = tmp_path / "spaced.jsonl"
    records = [json.loads(line) for line in plain.read_text().splitlines()]
    spaced.write_text("\n\n".join(json.dumps(record, separators=(" , ", " : ")) for record in records))
    digests = {read_dataset(path, None, None, chat_format, 500, seed=0).digest for path in (plain, spaced)}
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no conversations"),
        ("\n\n", "has no conversations"),
        ('\n{"messages": [', "row 2"),
        ('{"messages": []}\n', "row 1: messages"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}\n', "row 1: messages"),
        ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}]}\n', "row 1: .*empty"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_row(tmp_path: Path, chat_format: ChatFormat, text: str, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConversationFileError, match=f"bad.jsonl.*{problem}"):
        read_dataset(path, None, None, chat_format, 500, seed=0)


def test_a_too_long_conversation_is_refused_by_name_row_and_numbers(tmp_path: Path, chat_format: ChatFormat) -> None:
    path = write_jsonl(tmp_path / "long.jsonl", [SPOKEN[0], ("Tell me", "word " * 600)])
    path.write_text("\n" + path.read_text())  # a blank line counts as a row
    with pytest.raises(ConversationFileError, match=r"long.jsonl, row 3: the conversation takes 6\d\d tokens, at most 500"):
        read_dataset(path, None, None, chat_format, 500, seed=0)


def test_one_conversation_cannot_be_split(tmp_path: Path, chat_format: ChatFormat) -> None:
    path = write_jsonl(tmp_path / "one.jsonl", SPOKEN[:1])
    with pytest.raises(ConversationFileError, match=r"one.jsonl.*at least 2.*--validation"):
        read_dataset(path, None, None, chat_format, 500, seed=0)
    assert read_dataset(path, path, None, chat_format, 500, seed=0).held_out


def test_held_out_figures_are_those_of_the_test_file_when_there_is_one(tmp_path: Path, chat_format: ChatFormat) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", SPOKEN)
    test = write_jsonl(tmp_path / "test.jsonl", SPOKEN[:2])
    without, with_test = (read_dataset(train, None, path, chat_format, 500, seed=0) for path in (None, test))
    assert without.held_out == without.validation
    assert with_test.held_out == with_test.test
    assert with_test.validation == without.validation
