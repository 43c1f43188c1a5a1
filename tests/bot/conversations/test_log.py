"""The conversation log on a real SQLite file."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.schema import DropTable

from bot.conversations.log import ConversationLog, LoggedTurn, open_log, transcript_digest
from bot.conversations.schema import turns
from prompt_bank.conversation import AnswerRecord, Conversation, Message, read_conversations, record_lines
from prompt_bank.errors import LogUnavailableError, ServiceError, UnknownTurnError


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[ConversationLog]:
    async with open_log(tmp_path / "log.db") as opened:
        yield opened


def said(*texts: str) -> list[Message]:
    return [Message(role=("user", "assistant")[index % 2], content=text) for index, text in enumerate(texts)]  # type: ignore[arg-type]


def turn(conversation_id: str, question: str, answer: str, domain: str | None = "banking") -> LoggedTurn:
    return LoggedTurn(
        conversation_id=conversation_id,
        question=question,
        answer=answer,
        fingerprint="f" * 64,
        routing_reason="routed",
        finish_reason="stop",
        total_ms=12.5,
        domain=domain,
        version=3 if domain else None,
        digest="d" * 64 if domain else None,
        routing_score=0.8,
        routing_scores={"banking": 0.8, "healthcare": 0.1},
        num_prompt_tokens=7,
        token_ids=(1, 2, 3),
        first_token_ms=4.5,
    )


async def records(log: ConversationLog, domain: str | None = None) -> list[Conversation]:
    return [conversation async for conversation in log.export(domain)]


async def test_a_given_id_names_the_conversation_within_its_scope(log: ConversationLog) -> None:
    first = await log.find_or_create("anna", "my-chat", [])
    await log.append(turn(first.id, "Hi", "Hello"), said("Hi", "Hello"))
    again = await log.find_or_create("anna", "my-chat", [])
    assert (again.id, again.domain) == (first.id, "banking")
    other = await log.find_or_create("bert", "my-chat", [])
    assert other.id != first.id
    assert other.domain is None


async def test_earlier_messages_that_equal_a_logged_conversation_continue_it(log: ConversationLog) -> None:
    first = await log.find_or_create("api", None, [])
    await log.append(turn(first.id, "Hi", "Hello"), said("Hi", "Hello"))
    system = Message(role="system", content="changed between the turns")
    assert (await log.find_or_create("api", None, [system, *said("Hi", "Hello")])).id == first.id
    assert (await log.find_or_create("api", None, said("Hi", "Hello!"))).id != first.id
    assert (await log.find_or_create("other", None, said("Hi", "Hello"))).id != first.id
    assert (await log.find_or_create("api", None, [])).id != first.id
    assert (await log.find_or_create("api", None, [system])).id != first.id
    await log.append(turn(first.id, "And?", "Yes"), said("Hi", "Hello", "And?", "Yes"))
    assert (await log.find_or_create("api", None, said("Hi", "Hello"))).id != first.id  # it has moved on
    assert (await log.find_or_create("api", None, said("Hi", "Hello", "And?", "Yes"))).id == first.id


async def test_the_id_that_an_answer_gave_names_its_conversation(log: ConversationLog) -> None:
    first = await log.find_or_create("api", None, [])
    assert (await log.find_or_create("api", first.id, [])).id == first.id
    assert (await log.find_or_create("thief", first.id, [])).id != first.id


def test_a_transcript_has_no_ambiguous_borders() -> None:
    assert transcript_digest(said("a", "b")) != transcript_digest(said("ab"))
    assert transcript_digest(said("a", "b", "c")) != transcript_digest(said("a", "bc"))
    assert transcript_digest([]) != transcript_digest(said(""))


async def test_export_is_what_training_reads(log: ConversationLog, tmp_path: Path) -> None:
    state = await log.find_or_create("api", None, [])
    first = replace(turn(state.id, "Hi\u2028there", "Hello"), system="Be kind.")
    second = turn(state.id, "Why?", "Because")
    await log.append(first, said("Hi", "Hello"))
    await log.append(second, said("Hi", "Hello", "Why?", "Because"))
    await log.add_feedback(second.id, "up", None, None)
    await log.add_feedback(second.id, "down", "too short", "Because of the rain.")
    path = tmp_path / "export.jsonl"
    path.write_text("".join(f"{line}\n" for line in record_lines(await records(log))), encoding="utf-8")
    (conversation,) = read_conversations(path)
    known = {"domain": "banking", "version": 3, "digest": "d" * 64, "author": "bot"}
    assert conversation.id == state.id
    assert conversation.messages == (
        AnswerRecord(role="system", content="Be kind."),
        AnswerRecord(role="user", content="Hi\u2028there"),
        AnswerRecord(role="assistant", content="Hello", turn_id=first.id, **known),
        AnswerRecord(role="user", content="Why?"),
        AnswerRecord(
            role="assistant",
            content="Because",
            turn_id=second.id,
            vote="down",
            reason="too short",
            correction="Because of the rain.",
            **known,
        ),
    )


async def test_export_leaves_out_other_domains_and_answers_that_are_not_whole(log: ConversationLog) -> None:
    state = await log.find_or_create("api", None, [])
    for index, (domain, finish_reason, answer) in enumerate(
        [
            ("banking", "stop", "a"),
            (None, "stop", "b"),
            ("banking", "cancelled", "c"),
            ("banking", "error", ""),
            ("other", "stop", "e"),
        ]
    ):
        one = replace(turn(state.id, f"q{index}", answer, domain), finish_reason=finish_reason)  # type: ignore[arg-type]
        await log.append(one, said("q", answer))
    assert [[message.content for message in one.messages] for one in await records(log)] == [["q0", "a", "q1", "b", "q4", "e"]]
    assert [[message.content for message in one.messages] for one in await records(log, "banking")] == [["q0", "a"]]


async def test_feedback_on_an_unknown_turn_is_refused(log: ConversationLog) -> None:
    with pytest.raises(UnknownTurnError, match="no turn 'nope' is logged"):
        await log.add_feedback("nope", "up", None, None)


async def test_many_writers_at_once_lose_nothing(log: ConversationLog) -> None:
    state = await log.find_or_create("api", None, [])
    await asyncio.gather(*(log.append(turn(state.id, f"q{n}", f"a{n}"), said(f"q{n}", f"a{n}")) for n in range(40)))
    (conversation,) = await records(log)
    assert {message.content for message in conversation.messages[::2]} == {f"q{n}" for n in range(40)}


async def test_a_reader_keeps_nobody_from_writing(log: ConversationLog) -> None:
    state = await log.find_or_create("api", None, [])
    await log.append(turn(state.id, "Hi", "Hello"), said("Hi", "Hello"))
    async with log._reading() as reader:
        await reader.execute(select(turns))
        await log.append(turn(state.id, "Why?", "Because"), said("Hi", "Hello", "Why?", "Because"))
    (conversation,) = await records(log)
    assert len(conversation.messages) == 4


async def test_a_log_that_fails_says_so_without_what_people_wrote(log: ConversationLog) -> None:
    state = await log.find_or_create("api", None, [])
    async with log._writing() as connection:
        await connection.execute(DropTable(turns))
    with pytest.raises(LogUnavailableError, match="no such table: turns") as raised:
        await log.append(turn(state.id, "my secret", "your secret"), said("my secret", "your secret"))
    assert "secret" not in f"{raised.value} {raised.value.__cause__}"


async def test_what_was_logged_survives_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.db"
    async with open_log(path) as log:
        state = await log.find_or_create("api", "x", [])
        await log.append(turn(state.id, "'; DROP TABLE turns; --", "kept"), said("q", "kept"))
    async with open_log(path) as log:
        (conversation,) = await records(log)
        assert conversation.messages[0].content == "'; DROP TABLE turns; --"
        assert (await log.find_or_create("api", "x", [])).id == state.id


async def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    path.write_bytes(b"this is not a database, it is a note of one hundred bytes and more" * 10)
    with pytest.raises(ServiceError, match=r"log\.db cannot be opened"):
        async with open_log(path):
            pass
    assert path.read_bytes().startswith(b"this is not")
