"""The conversation log, on real databases of both kinds."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from bot.conversations.database import Database, open_database, sqlite_url
from bot.conversations.log import ConversationLog, transcript_digest
from bot.conversations.reading import LogReader
from bot.conversations.records import Caller, ConversationState, LoggedTurn, TurnFilter
from bot.conversations.schema import turns
from prompt_bank.conversation import AnswerRecord, Conversation, Message, read_conversations, record_lines
from prompt_bank.errors import (
    FencedError,
    LogUnavailableError,
    ServiceError,
    UnknownConversationError,
    UnknownTurnError,
)

API, ANNA, BERT = Caller("api"), Caller("api", "anna"), Caller("api", "bert")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    async with open_database(database_url) as opened:
        yield opened


@pytest.fixture
def log(database: Database) -> ConversationLog:
    return ConversationLog(database)


@pytest.fixture
def reader(database: Database) -> LogReader:
    return LogReader(database)


async def created(log: ConversationLog, caller: Caller = API, given_id: str | None = None) -> ConversationState:
    state = await log.create(caller, given_id)
    assert state is not None
    return state


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


async def records(reader: LogReader, domain: str | None = None) -> list[Conversation]:
    return [conversation async for conversation in reader.export(domain and frozenset({domain}))]


async def test_a_given_id_names_the_conversation_of_its_caller(log: ConversationLog) -> None:
    first = await created(log, ANNA, "my-chat")
    assert first.id == "my-chat"
    await log.append(turn(first.id, "Hi", "Hello"), said("Hi", "Hello"), fence=1)
    again = await log.find(ANNA, "my-chat", [])
    assert again == ConversationState("my-chat", "banking", is_domain_fixed=False, fence=1)
    assert await log.create(ANNA, "my-chat") is None
    assert await log.find(BERT, "my-chat", []) is None
    other = await created(log, BERT, "my-chat")
    assert other.id != "my-chat"
    assert (await log.find(BERT, "my-chat", [])) == other


@pytest.mark.parametrize("caller", [Caller("api", "ann/a"), Caller("api/ann", "a"), Caller("api"), Caller("api", "")])
async def test_no_two_callers_share_a_conversation(log: ConversationLog, caller: Caller) -> None:
    first = await created(log, Caller("api", "ann"), "a/x")
    await log.append(turn(first.id, "Hi", "Hello"), said("Hi", "Hello"), fence=1)
    for given_id in ("x", "a/x", "ann/a/x", first.id):
        assert await log.find(caller, given_id, []) is None
    assert await log.find(caller, None, said("Hi", "Hello")) is None


async def test_earlier_messages_that_equal_a_logged_conversation_continue_it(log: ConversationLog) -> None:
    first = await created(log)
    await log.append(turn(first.id, "Hi", "Hello"), said("Hi", "Hello"), fence=1)

    async def found(*earlier: Message, caller: Caller = API) -> str | None:
        state = await log.find(caller, None, earlier)
        return state.id if state else None

    system = Message(role="system", content="changed between the turns")
    assert await found(system, *said("Hi", "Hello")) == first.id
    assert await found(*said("Hi", "Hello!")) is None
    assert await found(*said("Hi", "Hello"), caller=ANNA) is None
    assert await found() is None
    assert await found(system) is None
    await log.append(turn(first.id, "And?", "Yes"), said("Hi", "Hello", "And?", "Yes"), fence=1)
    assert await found(*said("Hi", "Hello")) is None  # it has moved on
    assert await found(*said("Hi", "Hello", "And?", "Yes")) == first.id


async def test_a_turn_whose_caller_does_not_know_the_rest_ends_continuing_by_messages(log: ConversationLog) -> None:
    first = await created(log)
    await log.append(turn(first.id, "Hi", "Hello"), said("Hi", "Hello"), 1)
    await log.append(replace(turn(first.id, "And?", "Yes"), message_id="m1"), None, 1)
    assert await log.find(API, None, said("Hi", "Hello")) is None


async def test_feedback_reaches_no_other_domain(log: ConversationLog) -> None:
    state = await created(log)
    one = turn(state.id, "Hi", "Hello")
    await log.append(one, None, 1)
    with pytest.raises(UnknownTurnError):
        await log.add_feedback(one.id, "up", None, None, domains=frozenset({"travel"}))
    await log.add_feedback(one.id, "up", None, None, domains=frozenset({"banking"}))


async def test_an_unfinished_turn_moves_nothing(log: ConversationLog) -> None:
    first = await created(log)
    await log.append(turn(first.id, "Hi", "Hello"), said("Hi", "Hello"), fence=1)
    cut = replace(turn(first.id, "And?", "Ye", "travel"), finish_reason="cancelled")
    await log.append(cut, said("Hi", "Hello", "And?", "Ye"), fence=1)
    state = await log.find(API, None, said("Hi", "Hello"))
    assert state is not None
    assert (state.id, state.domain) == (first.id, "banking")


async def test_whoever_claimed_last_writes_and_nobody_else(log: ConversationLog, reader: LogReader) -> None:
    first = await created(log)
    frozen, awake = await log.claim(first.id), await log.claim(first.id)
    assert (frozen.fence, awake.fence) == (2, 3)
    for fence in (1, frozen.fence, awake.fence + 1):
        with pytest.raises(FencedError, match=f"claimed by another after fence {fence}"):
            await log.append(turn(first.id, "Hi", "late"), None, fence)
    await log.append(turn(first.id, "Hi", "Hello"), None, awake.fence)
    assert [record.turn.answer for record in await reader.turns(TurnFilter(), 9)] == ["Hello"]
    with pytest.raises(UnknownConversationError):
        await log.claim("nope")


async def test_a_conversation_comes_to_be_with_its_first_turn(log: ConversationLog, reader: LogReader) -> None:
    await log.append(turn("new", "Hi", "Hello"), said("Hi", "Hello"), 0, creator=ANNA)
    found = await log.find(ANNA, None, said("Hi", "Hello"))
    assert found == await log.find(ANNA, "new", []) == ConversationState("new", "banking", is_domain_fixed=False, fence=0)
    with pytest.raises(FencedError):
        await log.append(turn("never made", "Hi", "Hello"), None, 0)


async def test_a_first_turn_that_ends_after_the_second_is_logged_too(log: ConversationLog, reader: LogReader) -> None:
    """Whoever streams the first answer knows its conversation's id, and may go on in it before that answer has ended."""
    second = await created(log, ANNA, "new")
    await log.append(turn("new", "And?", "Yes"), None, second.fence)
    await log.append(turn("new", "Hi", "Hello"), None, 0, creator=ANNA)
    assert [record.turn.question for record in await reader.turns(TurnFilter(), 9)] == ["Hi", "And?"]


async def test_a_message_is_answered_once(log: ConversationLog, reader: LogReader) -> None:
    first, second = await created(log), await created(log)
    await log.append(replace(turn(first.id, "Hi", "Hello"), message_id="m1"), None, fence=1)
    for conversation in (first, second):
        again = replace(turn(conversation.id, "Hi", "Hello again"), message_id="m1")
        with pytest.raises(FencedError, match=r"message m1 .* was answered by another"):
            await log.append(again, None, fence=1)
    answered = await reader.turn_of_message("m1")
    assert answered is not None
    assert answered.answer == "Hello"
    assert await reader.turn_of_message("m2") is None


def test_a_transcript_has_no_ambiguous_borders() -> None:
    assert transcript_digest(said("a", "b")) != transcript_digest(said("ab"))
    assert transcript_digest(said("a", "b", "c")) != transcript_digest(said("a", "bc"))
    assert transcript_digest([]) != transcript_digest(said(""))


async def test_export_is_what_training_reads(log: ConversationLog, reader: LogReader, tmp_path: Path) -> None:
    state = await created(log)
    first = replace(turn(state.id, "Hi\u2028there", "Hello"), system="Be kind.")
    second = turn(state.id, "Why?", "Because")
    await log.append(first, said("Hi", "Hello"), 1)
    await log.append(second, said("Hi", "Hello", "Why?", "Because"), 1)
    await log.add_feedback(second.id, "up", None, None)
    await log.add_feedback(second.id, "down", "too short", "Because of the rain.")
    path = tmp_path / "export.jsonl"
    path.write_text("".join(f"{line}\n" for line in record_lines(await records(reader))), encoding="utf-8")
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


async def test_export_leaves_out_other_domains_and_answers_that_are_not_whole(log: ConversationLog, reader: LogReader) -> None:
    state = await created(log)
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
        await log.append(one, said("q", answer), 1)
    assert [[message.content for message in one.messages] for one in await records(reader)] == [
        ["q0", "a", "q1", "b", "q4", "e"]
    ]
    assert [[message.content for message in one.messages] for one in await records(reader, "banking")] == [["q0", "a"]]


async def test_feedback_on_an_unknown_turn_is_refused(log: ConversationLog) -> None:
    with pytest.raises(UnknownTurnError, match="no turn 'nope' is logged"):
        await log.add_feedback("nope", "up", None, None)


async def test_many_writers_at_once_lose_nothing(log: ConversationLog, reader: LogReader) -> None:
    state = await created(log)
    await asyncio.gather(*(log.append(turn(state.id, f"q{n}", f"a{n}"), None, 1) for n in range(40)))
    (conversation,) = await records(reader)
    assert {message.content for message in conversation.messages[::2]} == {f"q{n}" for n in range(40)}


async def test_a_reader_keeps_nobody_from_writing(log: ConversationLog, reader: LogReader, database: Database) -> None:
    state = await created(log)
    await log.append(turn(state.id, "Hi", "Hello"), said("Hi", "Hello"), 1)
    async with database.reading() as reading:
        await reading.execute(select(turns))
        await log.append(turn(state.id, "Why?", "Because"), said("Hi", "Hello", "Why?", "Because"), 1)
    (conversation,) = await records(reader)
    assert len(conversation.messages) == 4


async def test_a_log_that_fails_says_so_without_what_people_wrote(log: ConversationLog, database: Database) -> None:
    state = await created(log)
    async with database.writing() as connection:
        for table in ("shadow_answers", "feedback", "turns"):
            await connection.execute(text(f"DROP TABLE {table}"))
    with pytest.raises(LogUnavailableError, match="turns") as raised:
        await log.append(turn(state.id, "my secret", "your secret"), said("my secret", "your secret"), 1)
    assert "secret" not in f"{raised.value} {raised.value.__cause__}"


async def test_what_was_logged_survives_reopening(database_url: str) -> None:
    async with open_database(database_url) as database:
        log = ConversationLog(database)
        state = await created(log, given_id="x")
        await log.append(turn(state.id, "'; DROP TABLE turns; --", "kept"), said("q", "kept"), 1)
    async with open_database(database_url) as database:
        (conversation,) = await records(LogReader(database))
        assert conversation.messages[0].content == "'; DROP TABLE turns; --"
        assert (await ConversationLog(database).find(API, "x", [])) == replace(state, domain="banking")


async def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    path.write_bytes(b"this is not a database, it is a note of one hundred bytes and more" * 10)
    with pytest.raises(ServiceError, match=r"log\.db cannot be opened"):
        async with open_database(sqlite_url(path)):
            pass
    assert path.read_bytes().startswith(b"this is not")


async def test_the_history_is_what_was_said(log: ConversationLog, reader: LogReader) -> None:
    """A cancelled answer was said as far as it went; a failed one was not."""
    state = await created(log)
    ways = [("a", "stop"), ("b", "cancelled"), ("", "cancelled"), ("", "error"), ("c", "length")]
    for index, (answer, finish_reason) in enumerate(ways):
        one = replace(turn(state.id, f"q{index}", answer), finish_reason=finish_reason)  # type: ignore[arg-type]
        await log.append(one, None, 1)
    for fence, max_turns, history in ((2, 10, ("q0", "a", "q1", "b", "q4", "c")), (3, 2, ("q1", "b", "q4", "c"))):
        taken_up = await log.take_up(state.id, "m1", max_turns)
        assert taken_up == (replace(state, fence=fence, domain="banking"), said(*history))
    await log.append(replace(turn(state.id, "q5", "d"), message_id="m1"), None, 3)
    assert await log.take_up(state.id, "m1", 10) == await reader.turn_of_message("m1")
    with pytest.raises(UnknownConversationError):
        await log.take_up("nope", "m2", 10)


async def test_pages_of_conversations_meet_and_do_not_overlap(log: ConversationLog, reader: LogReader) -> None:
    ids = [(await created(log, ANNA if n % 2 else BERT)).id for n in range(7)]
    await created(log, Caller("other"))
    for descending in (False, True):
        seen: list[str] = []
        while page := await reader.conversations(3, scope="api", after=seen[-1] if seen else None, descending=descending):
            seen += [record.id for record in page]
        assert seen == (ids[::-1] if descending else ids)
    assert [record.id for record in await reader.conversations(9, scope="api", person="anna")] == ids[1::2][::-1]
    assert len(await reader.conversations(99)) == 8
    with pytest.raises(UnknownConversationError):
        await reader.conversations(3, scope="other", after=ids[0])
    with pytest.raises(UnknownConversationError):
        await reader.conversation(ids[0], scope="other")
    assert (await reader.conversation(ids[0], scope="api")).person == "bert"


async def test_search_and_filters_find_what_they_name(log: ConversationLog, reader: LogReader) -> None:
    anna, bert = await created(log, ANNA), await created(log, Caller("other"))
    card = turn(anna.id, "Where is my CARD?", "It was sent - on Monday.")
    loan = replace(turn(anna.id, 'a "loan" (OR) card*', "No.", "loans"), version=4, finish_reason="length")
    fever = replace(turn(bert.id, "J'ai de la fièvre", "Reposez-vous.", "healthcare"), finish_reason="cancelled")
    for one in (card, loan, fever):
        await log.append(one, None, 1)
    await log.add_feedback(card.id, "down", None, None)
    await log.add_feedback(card.id, "up", "after all", None)
    await log.add_feedback(loan.id, "down", None, "Yes.")

    async def found(**wanted: Any) -> list[str]:
        names = {card.id: "card", loan.id: "loan", fever.id: "fever"}
        return [names[record.turn.id] for record in await reader.turns(TurnFilter(**wanted), 10)]

    assert await found() == ["fever", "loan", "card"]
    assert await found(text="card") == ["loan", "card"]
    assert await found(text="monday card") == ["card"]
    assert await found(text="fièvre") == ["fever"]
    assert await found(text="fevre") == []
    # Whatever a person types is words, never a query.
    for typed in ('"', "OR", "card*", "NEAR(card)", "answer:no", "-card", "'; DROP TABLE turns; --", "(", "^card", ":*", "&|!"):
        assert await found(text=typed) in ([], ["loan"], ["loan", "card"], ["card"]), typed
    assert await found(text="loan OR") == ["loan"]
    assert await found(domains=frozenset({"banking"})) == ["card"]
    assert await found(domains=frozenset({"loans"}), version=4) == ["loan"]
    assert await found(domains=frozenset({"loans"}), version=3) == []
    assert await found(vote="up") == ["card"]
    assert await found(vote="down") == ["loan"]
    assert await found(finish_reason="cancelled") == ["fever"]
    assert await found(domains=frozenset({"loans", "banking"})) == ["loan", "card"]
    assert await found(conversation_id=bert.id) == ["fever"]
    newest, _, oldest = await reader.turns(TurnFilter(), 10)
    assert await found(since=newest.created_at) == ["fever"]
    assert await found(until=newest.created_at) == ["loan", "card"]
    assert [record.number for record in await reader.turns(TurnFilter(), 1, after=newest.number)] == [newest.number - 1]
    assert [record.turn.id for record in await reader.turns(TurnFilter(), 1, descending=False)] == [oldest.turn.id]
    assert newest.turn == fever


async def test_the_export_reads_in_batches(log: ConversationLog, reader: LogReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bot.conversations.reading._CONVERSATIONS_A_BATCH", 2)
    ids = []
    for n in range(5):
        state = await created(log)
        ids.append(state.id)
        await log.append(turn(state.id, f"q{n}", f"a{n}"), None, 1)
    assert [record.id for record in await records(reader)] == ids


async def test_a_conversation_can_come_to_be_with_its_first_turn(log: ConversationLog, reader: LogReader) -> None:
    new = turn("fresh", "Hello", "Hi.")
    await log.append(new, said("Hello", "Hi."), 0, creator=ANNA)
    found = await log.find(ANNA, None, said("Hello", "Hi."))
    assert found == ConversationState("fresh", "banking", is_domain_fixed=False, fence=0)
    assert await log.find(BERT, None, said("Hello", "Hi.")) is None
    claimed = await log.claim("fresh")
    with pytest.raises(FencedError):  # who thinks that it is still nobody's
        await log.append(turn("fresh", "And?", "Nothing."), None, 0)
    await log.append(turn("fresh", "And?", "Nothing."), None, claimed.fence)
    assert len(await reader.turns(TurnFilter(conversation_id="fresh"), limit=9)) == 2


async def test_the_last_vote_is_what_a_turn_is_found_by(log: ConversationLog, reader: LogReader) -> None:
    voted = turn((await created(log)).id, "Hello", "Hi.")
    await log.append(voted, None, 1)
    await log.add_feedback(voted.id, "up", None, None)
    await log.add_feedback(voted.id, "down", "vague", None)
    assert await reader.turns(TurnFilter(vote="up"), limit=9) == []
    (found,) = await reader.turns(TurnFilter(vote="down"), limit=9)
    assert (found.vote, found.reason) == ("down", "vague")
