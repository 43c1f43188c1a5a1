"""Conversations and their JSONL record: every malformed file is refused by name and row."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_bank.conversation import AnswerRecord, Conversation, read_conversations, record_lines
from prompt_bank.errors import ConversationFileError

GOOD = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'


def row(*messages: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("{not json", "Invalid JSON"),
        ("[]", "should be an object"),
        ('"text"', "should be an object"),
        ("{}", "messages: Field required"),
        ('{"messages": []}', "messages: "),
        (row(("user", "Hi")), "messages: "),
        (row(("assistant", "Hello"), ("user", "Hi")), "message 1 has role 'assistant', expected 'user'"),
        (row(("user", "Hi"), ("user", "Hello?")), "message 2 has role 'user', expected 'assistant'"),
        (row(("system", "Be brief"), ("user", "Hi"), ("user", "?")), "message 3 has role 'user'"),
        (row(("user", "Hi"), ("system", "Be brief")), "message 2 has role 'system'"),
        (row(("user", " \n"), ("assistant", "Hello")), "message 1 is empty"),
        (row(("user", "Hi"), ("assistant", "")), "message 2 is empty"),
        (row(("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")), "the last message must be the assistant's"),
        (row(("system", "Be brief"), ("user", "Hi")), "the last message must be the assistant's"),
        (row(("robot", "Hi"), ("assistant", "Hello")), "messages.0.role"),
        ('{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "a"}]}', "messages.0.content"),
        ('{"messages": [{"role": "user", "content": "a", "colour": "red"}]}', "messages.0.colour"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_malformed_row_is_refused_by_file_and_row(tmp_path: Path, bad: str, problem: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f"{GOOD}\n\n{bad}\n{GOOD}\n")
    with pytest.raises(ConversationFileError) as refused:
        read_conversations(path)
    text = str(refused.value)
    assert text.startswith(f"{path}, row 3: ")
    assert problem in text
    assert "Value error" not in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no conversations"),
        (b"\n  \n", "has no conversations"),
        (GOOD.encode() + b"\n\xff", "is not UTF-8"),
        (GOOD.encode("utf-16"), "is not UTF-8"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConversationFileError, match=problem) as refused:
        read_conversations(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_unreadable_path_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConversationFileError, match="cannot be read"):
        read_conversations(tmp_path / name)


def test_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\r\n{GOOD}\r\n".encode())
    assert len(read_conversations(path)) == 2


text = st.text(min_size=1).filter(str.strip)
turns = st.lists(st.tuples(text, text), min_size=1, max_size=4)


@given(turns, st.none() | st.text(), st.none() | st.text(min_size=1))
def test_record_round_trip(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], system: str | None, id_: str | None
) -> None:
    messages = [AnswerRecord(role="system", content=system)] if system is not None else []
    for user, answer in pairs:
        messages.append(AnswerRecord(role="user", content=user))
        known = {"turn_id": "t1", "domain": "banking", "version": 2, "author": "bot", "vote": "down", "correction": user}
        messages.append(AnswerRecord(role="assistant", content=answer, **known))
    conversation = Conversation(id=id_, messages=tuple(messages))
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    lines = list(record_lines([conversation, conversation]))
    assert all("\n" not in line for line in lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read_conversations(path) == [conversation, conversation]


def test_line_separators_inside_a_text_do_not_split_a_row(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    content = "one\u2028two\x85three"
    path.write_text(row(("user", content), ("assistant", "ok")), encoding="utf-8")
    assert read_conversations(path)[0].messages[0].content == content
