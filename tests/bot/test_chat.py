"""One turn, end to end, where HTTP is too coarse to see it: what the engine is given, and what is logged when it fails."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from bot.answering import Answerer, Overrides, with_brief
from bot.app import open_service, torch_engine
from bot.channels.http.api import create_app
from bot.chat import Chat, clarifying_question
from bot.conversations.database import Database, open_database, sqlite_url
from bot.conversations.inbox import Inbox
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.conversations.records import Caller, LoggedTurn
from bot.engine.request import Engine, EngineStats, GeneratedToken, GenerationRequest
from bot.engine.torch_engine import TorchEngine
from bot.routing.encoder import Encoder
from bot.routing.live import LiveRouter
from bot.settings import Settings
from bot.shadow import Shadows
from bot.telemetry import Telemetry
from bot.turn import ChatRequest, TextDelta, TurnFinished, TurnStarted
from prompt_bank.bank import Bank
from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Message
from prompt_bank.errors import (
    BadRequestError,
    EmptyMessageError,
    EngineBusyError,
    EngineFailedError,
    LogUnavailableError,
    MessageTooLongError,
)
from prompt_bank.opening import LoadedModel, open_bank
from prompt_bank.soft_prompt import SoftPrompt, expected_shape
from prompt_bank.starter import install_starters
from prompt_bank.version import Draft, ServedModel


class RecordingEngine:
    """The real engine, which keeps what it is asked for and can be made to fail in the middle of an answer."""

    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self.requests: list[GenerationRequest] = []
        self.fails_after: int | None = None
        self.failure: Exception = EngineFailedError("a step failed: RuntimeError: on purpose")

    @property
    def context_tokens(self) -> int:
        return self._engine.context_tokens

    @property
    def is_running(self) -> bool:
        return self._engine.is_running

    def is_half_idle(self) -> bool:
        return self._engine.is_half_idle()

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GeneratedToken, None]:
        self.requests.append(request)
        num_tokens = 0
        async for token in self._engine.generate(request):
            if num_tokens == self.fails_after:
                raise self.failure
            num_tokens += 1
            yield token


@pytest.fixture
async def bank(tmp_path: Path, redis_url: str, tiny_served: ServedModel) -> AsyncIterator[Bank]:
    async with open_bank(Settings(data_dir=tmp_path, redis_url=redis_url)) as opened:
        await install_starters(opened, tiny_served)
        yield opened


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "conversations.db"


@pytest.fixture
async def database(log_file: Path) -> AsyncIterator[Database]:
    async with open_database(sqlite_url(log_file)) as opened:
        yield opened


@pytest.fixture
def conversations(database: Database) -> ConversationLog:
    return ConversationLog(database)


@pytest.fixture
def reader(database: Database) -> LogReader:
    return LogReader(database)


@pytest.fixture
async def engine(tiny: BaseModel) -> AsyncIterator[RecordingEngine]:
    async with TorchEngine(tiny, context_tokens=512) as running:
        yield RecordingEngine(running)


@pytest.fixture
def chat_format(tiny: BaseModel) -> ChatFormat:
    return ChatFormat(tiny.tokenizer)


@pytest.fixture
def chat(
    bank: Bank,
    engine: RecordingEngine,
    encoder: Encoder,
    conversations: ConversationLog,
    tiny: BaseModel,
    tiny_served: ServedModel,
    chat_format: ChatFormat,
) -> Callable[..., Chat]:
    def make(**given: str | int) -> Chat:
        router, telemetry = LiveRouter(bank, encoder), Telemetry(engine.stats, bank.read_stats)
        answerer = Answerer(bank, engine, tiny_served, chat_format, tiny.stop_token_ids)
        shadows = Shadows(answerer, conversations, telemetry, has_room=lambda: True)
        inbox = Inbox(bank.cache.redis, bank.cache.prefix, bank.cache.table_key)
        parts = (bank, answerer, router, conversations, inbox, telemetry, shadows, tiny_served)
        return Chat(*parts, **given)  # type: ignore[arg-type]

    return make


MakeChat = Callable[..., Chat]
FEW = Overrides(temperature=0, max_tokens=4)


def said(*texts: str, system: str | None = None) -> list[Message]:
    opening = [Message(role="system", content=system)] if system else []
    return [*opening, *(Message(role=("user", "assistant")[n % 2], content=text) for n, text in enumerate(texts))]  # type: ignore[arg-type]


async def answer(chat: Chat, messages: list[Message], domain: str | None = "banking", overrides: Overrides = FEW) -> LoggedTurn:
    async for event in chat.answer(ChatRequest(messages, domain, overrides=overrides), Caller("test")):
        if isinstance(event, TurnFinished):
            return event.turn
    raise AssertionError("a turn ends with TurnFinished")


def logged(log_file: Path) -> list[tuple[str, str, str]]:
    """Question, answer and finish reason of every turn."""
    with closing(sqlite3.connect(log_file)) as database:
        return database.execute("SELECT question, answer, finish_reason FROM turns ORDER BY created_at").fetchall()


async def publish_prompt(bank: Bank, model: ServedModel, num_virtual_tokens: int = 6) -> SoftPrompt:
    """Gives banking a soft prompt, live."""
    prompt = SoftPrompt("prefix_kv", torch.full(expected_shape("prefix_kv", num_virtual_tokens, model.shape), 0.1))
    card = (await bank.live("banking", model)).card
    version = await bank.publish(Draft(card, model, prompt), "test", "trained")
    await bank.promote("banking", version.manifest.version, "test", "trained")
    return prompt


async def test_the_brief_is_the_system_message_only_without_a_soft_prompt(
    chat: MakeChat, bank: Bank, engine: RecordingEngine, tiny_served: ServedModel, chat_format: ChatFormat
) -> None:
    brief = (await bank.live("banking", tiny_served)).card.brief
    turn = await answer(chat(), said("Hello"))
    expected = chat_format.render(said("Hello", system=brief), 10_000)
    assert engine.requests[-1].token_ids == expected.token_ids
    assert (engine.requests[-1].prompt, turn.version, turn.digest) == (None, 1, None)

    prompt = await publish_prompt(bank, tiny_served)
    turn = await answer(chat(), said("Hello"))
    assert engine.requests[-1].token_ids == chat_format.render(said("Hello"), 10_000).token_ids
    assert engine.requests[-1].prompt is not None
    assert engine.requests[-1].prompt.digest == turn.digest == prompt.digest
    assert turn.version == 2


async def test_the_callers_system_message_is_kept(
    chat: MakeChat, bank: Bank, engine: RecordingEngine, tiny_served: ServedModel, chat_format: ChatFormat
) -> None:
    brief = (await bank.live("banking", tiny_served)).card.brief
    own = said("Hello", system="Call the customer Anna.")
    await answer(chat(), own)
    expected = chat_format.render(said("Hello", system=f"{brief}\n\nCall the customer Anna."), 10_000)
    assert engine.requests[-1].token_ids == expected.token_ids
    await publish_prompt(bank, tiny_served)
    turn = await answer(chat(), own)
    assert engine.requests[-1].token_ids == chat_format.render(own, 10_000).token_ids
    assert turn.system == "Call the customer Anna."


def test_with_brief_leaves_its_argument_alone() -> None:
    messages = said("Hello", system="Own.")
    assert [message.content for message in with_brief(messages, "Brief.")] == ["Brief.\n\nOwn.", "Hello"]
    assert messages == said("Hello", system="Own.")
    assert [message.content for message in with_brief(said("Hello"), "Brief.")] == ["Brief.", "Hello"]


async def test_a_history_longer_than_the_context_drops_its_oldest_turns(
    chat: MakeChat, engine: RecordingEngine, chat_format: ChatFormat
) -> None:
    texts = [text for n in range(40) for text in (f"This is question number {n} of many.", f"This is answer number {n}.")]
    turn = await answer(chat(), said(*texts, "And what was the last number?"))
    shown = chat_format.decode(engine.requests[-1].token_ids)
    assert turn.num_prompt_tokens == len(engine.requests[-1].token_ids) <= 512 - FEW.max_tokens  # type: ignore[operator]
    assert "question number 0" not in shown
    assert "answer number 39" in shown
    assert "And what was the last number?" in shown
    assert "customer-service assistant of a bank" in shown  # the brief stays
    assert turn.finish_reason == "length"


async def test_a_message_too_long_for_the_context_is_refused_with_the_numbers(chat: MakeChat) -> None:
    with pytest.raises(MessageTooLongError, match=r"takes \d+ tokens with its system message, at most \d+ fit"):
        await answer(chat(), said("many words " * 300))


async def test_a_blank_question_is_refused_and_not_logged(chat: MakeChat, log_file: Path) -> None:
    with pytest.raises(EmptyMessageError):
        await answer(chat(), said("Hello", "Hi", " \n"))
    assert logged(log_file) == []


async def test_the_events_of_a_turn(chat: MakeChat) -> None:
    events = [event async for event in chat().answer(ChatRequest(said("Hello"), "banking", overrides=FEW), Caller("test"))]
    started, *deltas, finished = events
    assert isinstance(started, TurnStarted)
    assert isinstance(finished, TurnFinished)
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert "".join(delta.text for delta in deltas if isinstance(delta, TextDelta)) == finished.turn.answer
    assert (started.turn_id, started.conversation_id) == (finished.turn.id, finished.turn.conversation_id)
    assert len(finished.turn.token_ids) == 4


async def test_an_engine_that_fails_in_the_middle_loses_nothing(
    chat: MakeChat, engine: RecordingEngine, log_file: Path
) -> None:
    whole = await answer(chat(), said("Hello"))
    engine.fails_after = 2
    pieces: list[str] = []

    async def listen() -> None:
        async for event in chat().answer(ChatRequest(said("Hello again"), "banking", overrides=FEW), Caller("test")):
            if isinstance(event, TextDelta):
                pieces.append(event.text)

    with pytest.raises(EngineFailedError):
        await listen()
    (_, (question, partial, finish_reason)) = logged(log_file)
    assert (question, finish_reason) == ("Hello again", "error")
    assert partial == "".join(pieces)
    assert len(partial) > 0
    engine.fails_after = None
    assert (await answer(chat(), said("Hello"))).answer == whole.answer


async def test_an_engine_that_fails_at_once_is_logged_too(chat: MakeChat, engine: RecordingEngine, log_file: Path) -> None:
    first = await answer(chat(), said("Hello"))
    follow_up = said("Hello", first.answer, "and?")
    engine.fails_after = 0
    with pytest.raises(EngineFailedError):
        await answer(chat(), follow_up, domain=None)
    engine.fails_after = None
    again = await answer(chat(), follow_up, domain=None)
    assert again.conversation_id == first.conversation_id  # asking again is the same conversation
    assert [finish_reason for _, _, finish_reason in logged(log_file)] == ["length", "error", "length"]


async def test_a_turn_that_cannot_be_logged_is_kept_in_the_operators_log(
    chat: MakeChat, log_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(log_file)) as database:
        database.execute("ALTER TABLE turns RENAME TO away")
        with pytest.raises(LogUnavailableError):
            await answer(chat(), said("Hello"))
        (line,) = [record.message for record in caplog.records if record.levelname == "CRITICAL"]
        assert json.loads(line[line.index("{") :])["question"] == "Hello"
        database.execute("ALTER TABLE away RENAME TO turns")
    assert (await answer(chat(), said("Hello"))).finish_reason == "length"


async def test_more_turns_than_may_be_under_way_are_refused_before_anything_is_done(chat: MakeChat, log_file: Path) -> None:
    full = chat(max_turns=1)
    first = full.answer(ChatRequest(said("Hello"), "banking", overrides=FEW), Caller("test"))
    await anext(first)
    with pytest.raises(EngineBusyError, match="1 turns are under way, at most 1 may be"):
        await answer(full, said("Hello again"))
    await first.aclose()
    assert (await answer(full, said("Hello again"))).question == "Hello again"


async def test_a_long_prompt_leaves_room_for_history(
    chat: MakeChat, bank: Bank, engine: RecordingEngine, tiny_served: ServedModel
) -> None:
    await publish_prompt(bank, tiny_served, num_virtual_tokens=engine.context_tokens // 2)
    history = [f"turn {number} of many" for number in range(121)]
    assert (await answer(chat(), said(*history))).finish_reason == "length"
    assert engine.requests[-1].num_virtual_tokens + len(engine.requests[-1].token_ids) < engine.context_tokens


@pytest.mark.parametrize("failure", [EngineFailedError("on purpose"), ZeroDivisionError("on purpose")])
async def test_a_stream_that_fails_ends_with_an_error_and_no_exception_text(
    tiny_model_dir: Path, redis_url: str, tmp_path: Path, log_file: Path, failure: Exception
) -> None:
    @asynccontextmanager
    async def failing_engine(loaded: LoadedModel, settings: Settings) -> AsyncIterator[Engine]:
        async with torch_engine(loaded, settings) as running:
            failing = RecordingEngine(running)
            failing.fails_after, failing.failure = 2, failure
            yield failing

    settings = Settings(base_model=str(tiny_model_dir), dtype="float32", redis_url=redis_url, data_dir=tmp_path)
    body = {"model": "banking", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with open_service(settings, make_engine=failing_engine) as service:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as http:
            response = await http.post("/v1/chat/completions", json=body)
    lines = [line for line in response.text.splitlines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == EngineFailedError.sentence
    assert "[DONE]" not in response.text
    assert "on purpose" not in response.text
    assert [finish_reason for _, _, finish_reason in logged(log_file)] == ["error"]


async def test_a_consumer_that_stops_listening_is_logged_as_cancelled(
    chat: MakeChat, engine: RecordingEngine, log_file: Path
) -> None:
    asked = chat()
    long = Overrides(temperature=0, max_tokens=200)
    events = asked.answer(ChatRequest(said("Hello"), "banking", overrides=long), Caller("test"))
    for _ in range(4):
        await anext(events)
    await events.aclose()
    await asked.close()
    ((question, partial, finish_reason),) = logged(log_file)
    assert (question, finish_reason) == ("Hello", "cancelled")
    assert len(partial) > 0


def alternatives(log_file: Path) -> list[tuple[str, list[str], str]]:
    """Answer, alternatives and finish reason of every turn."""
    with closing(sqlite3.connect(log_file)) as database:
        rows = database.execute("SELECT answer, alternatives, finish_reason FROM turns ORDER BY created_at").fetchall()
    return [(answer, json.loads(others), finish_reason) for answer, others, finish_reason in rows]


def asked_thrice(max_tokens: int) -> ChatRequest:
    overrides = Overrides(temperature=1.5, seed=3, max_tokens=max_tokens)
    return ChatRequest(said("Hello"), "banking", overrides=overrides, num_answers=3)


async def test_several_answers_are_decoded_together_with_seeds_and_grammars_of_their_own(
    chat: MakeChat, engine: RecordingEngine, log_file: Path
) -> None:
    overrides = Overrides(temperature=1.5, seed=3, max_tokens=4, json_schema='{"type": "string", "minLength": 300}')
    events = [
        event
        async for event in chat().answer(
            ChatRequest(said("Hello"), "banking", overrides=overrides, num_answers=3), Caller("test")
        )
    ]
    assert [request.sampling.seed for request in engine.requests] == [3, 4, 5]
    assert len({id(request.logits_processors[0]) for request in engine.requests}) == 3
    finished = events[-1]
    assert isinstance(finished, TurnFinished)
    texts = [answer.text for answer in finished.answers]
    for index, text in enumerate(texts):
        assert "".join(event.text for event in events if isinstance(event, TextDelta) and event.index == index) == text
    assert alternatives(log_file) == [(texts[0], texts[1:], "length")]


async def test_an_answer_that_fails_fails_them_all(chat: MakeChat, engine: RecordingEngine, log_file: Path) -> None:
    """The first one is whole by then, but nobody was given it: the caller asks again."""
    calls = 0

    def fails(text_ids: object, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise ZeroDivisionError("on purpose")
        return logits

    generate = engine.generate

    def with_limits(request: GenerationRequest) -> AsyncGenerator[GeneratedToken, None]:
        is_first = request.sampling.seed == 3
        return generate(replace(request, max_tokens=2) if is_first else replace(request, logits_processors=[fails]))

    engine.generate = with_limits  # type: ignore[method-assign]
    with pytest.raises(EngineFailedError, match="on purpose"):
        async for _ in chat().answer(asked_thrice(100), Caller("test")):
            pass
    ((answer, others, finish_reason),) = alternatives(log_file)
    assert (len(others), finish_reason) == (2, "error")
    assert all([answer, *others])
    assert engine.stats().num_active <= 2  # the engine drops them at its next step


async def test_a_consumer_of_several_that_stops_listening_cancels_them_all(
    chat: MakeChat, engine: RecordingEngine, log_file: Path
) -> None:
    asked = chat()
    events = asked.answer(asked_thrice(300), Caller("test"))
    for _ in range(8):
        await anext(events)
    assert engine.stats().num_active == 3
    await events.aclose()
    await asked.close()
    while engine.stats().num_active:  # noqa: ASYNC110  the engine's thread sets it
        await asyncio.sleep(0.01)
    assert engine.stats().num_generated_tokens < 3 * 300 / 2
    ((_, others, finish_reason),) = alternatives(log_file)
    assert (len(others), finish_reason) == (2, "cancelled")


async def test_a_schema_that_cannot_be_served_is_refused_before_anything_is_generated(
    chat: MakeChat, engine: RecordingEngine, log_file: Path
) -> None:
    with pytest.raises(BadRequestError, match="Invalid type: objekt"):
        await answer(chat(), said("Hello"), overrides=Overrides(json_schema='{"type": "objekt"}'))
    assert (engine.requests, logged(log_file)) == ([], [])


async def test_the_router_abstains_or_the_default_domain_answers(
    chat: MakeChat, reader: LogReader, bank: Bank, tiny_served: ServedModel
) -> None:
    question = said("What is the capital of Mongolia?")
    asked_back = await answer(chat(), question, domain=None)
    titles = [(await bank.live(domain, tiny_served)).card.title for domain in ("banking", "healthcare", "translation")]
    assert asked_back.answer == clarifying_question(titles)
    assert (asked_back.domain, asked_back.version, asked_back.digest, asked_back.routing_reason) == (
        None,
        None,
        None,
        "abstained",
    )
    assert asked_back.token_ids == ()
    answered = await answer(chat(default_domain="healthcare"), question, domain=None)
    assert (answered.domain, answered.version, answered.routing_reason) == ("healthcare", 1, "default")
    assert 0 < answered.routing_score < 0.47  # type: ignore[operator]
    (first, second) = [one async for one in reader.export()]
    assert (first.messages[1].domain, second.messages[1].domain) == (None, "healthcare")


async def test_blank_answers_do_not_break_the_export(conversations: ConversationLog, reader: LogReader) -> None:
    state = await conversations.create(Caller("test"))
    assert state is not None
    common = {"fingerprint": "f", "routing_reason": "explicit", "finish_reason": "stop", "total_ms": 1.0, "domain": "banking"}
    for question, text in (("first", "\n "), ("second", "Yes."), ("third", "")):
        turn = LoggedTurn(conversation_id=state.id, question=question, answer=text, **common)  # type: ignore[arg-type]
        await conversations.append(turn, said(question, text), state.fence)
    (conversation,) = [one async for one in reader.export()]
    assert [message.content for message in conversation.messages] == ["second", "Yes."]


def test_the_clarifying_question_names_what_there_is() -> None:
    assert clarifying_question([]) == "I cannot help with anything yet. Please come back later."
    assert "Is it Banking?" in clarifying_question(["Banking"])
    assert "Is it Banking, Cooking or Travel?" in clarifying_question(["Banking", "Cooking", "Travel"])
