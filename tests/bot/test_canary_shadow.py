"""A canary answers its share of the conversations and stays with them; a shadow answers unseen and costs nobody anything."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bot.answering import Answerer, Overrides
from bot.chat import Chat
from bot.conversations.database import Database, open_database, sqlite_url
from bot.conversations.inbox import Inbox
from bot.conversations.log import ConversationLog
from bot.conversations.reading import LogReader
from bot.conversations.records import Caller, LoggedTurn
from bot.engine.torch_engine import TorchEngine
from bot.routing.encoder import Encoder
from bot.routing.live import LiveRouter
from bot.shadow import Shadows
from bot.telemetry import Telemetry
from bot.turn import ChatEvent, ChatRequest, TextDelta, TurnFinished, TurnStarted
from prompt_bank.bank import Bank
from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Message
from prompt_bank.opening import open_bank
from prompt_bank.pointers import is_in_canary
from prompt_bank.settings import BankSettings
from prompt_bank.version import Draft, ServedModel, Version
from tests.bot.conftest import Frontdesk
from tests.prompt_bank.conftest import make_card, make_prompt

FEW = Overrides(temperature=0, max_tokens=6)


@pytest.fixture
async def bank(tmp_path: Path, redis_url: str) -> AsyncIterator[Bank]:
    async with open_bank(BankSettings(data_dir=tmp_path / "data", redis_url=redis_url)) as opened:
        yield opened


@pytest.fixture
async def versions(bank: Bank, tiny_served: ServedModel) -> list[Version]:
    """v1 live; v2 and v3 with other prompts, answering nobody."""
    drafts = [Draft(make_card(), tiny_served, make_prompt(tiny_served.shape, seed=seed)) for seed in range(3)]
    published = [await bank.publish(draft, "ann", "test") for draft in drafts]
    await bank.promote("banking", 1, "ann", "test")
    return published


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with open_database(sqlite_url(tmp_path / "data" / "conversations.db")) as opened:
        yield opened


@pytest.fixture
def conversations(database: Database) -> ConversationLog:
    return ConversationLog(database)


@pytest.fixture
def reader(database: Database) -> LogReader:
    return LogReader(database)


@pytest.fixture
async def engine(tiny: BaseModel) -> AsyncIterator[TorchEngine]:
    async with TorchEngine(tiny, context_tokens=256) as running:
        yield running


class Desk:
    """A chat on the tiny model, and what a caller sees of it."""

    def __init__(
        self,
        bank: Bank,
        engine: TorchEngine,
        encoder: Encoder,
        log: ConversationLog,
        reader: LogReader,
        tiny: BaseModel,
        served: ServedModel,
        has_room: bool = True,
        drain_s: float = 10,
    ) -> None:
        self.telemetry = Telemetry(engine.stats, bank.read_stats)
        answerer = Answerer(bank, engine, served, ChatFormat(tiny.tokenizer), tiny.stop_token_ids)
        shadows = Shadows(answerer, log, self.telemetry, lambda: has_room, drain_s)
        inbox = Inbox(bank.cache.redis, bank.cache.prefix, bank.cache.table_key)
        self.chat = Chat(bank, answerer, LiveRouter(bank, encoder), log, inbox, self.telemetry, shadows, served)
        self.reader = reader

    async def events(self, question: str, conversation_id: str | None = None, overrides: Overrides = FEW) -> list[ChatEvent]:
        request = ChatRequest([Message(role="user", content=question)], "banking", None, conversation_id, overrides)
        return [event async for event in self.chat.answer(request, Caller("test"))]

    async def answer(self, question: str, conversation_id: str | None = None) -> LoggedTurn:
        last = (await self.events(question, conversation_id))[-1]
        assert isinstance(last, TurnFinished)
        return last.turn

    async def shadows(self, count: int) -> list[dict[str, object]]:
        """Once there are `count` of them."""
        for _ in range(1000):
            if len(found := await self.reader.shadows("banking")) >= count:
                return found
            await asyncio.sleep(0.02)
        raise AssertionError(f"no {count} shadow answers were logged")

    def metric(self, name: str) -> float:
        lines = self.telemetry.exposition().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


async def until(is_so: Callable[[], object]) -> None:
    for _ in range(1000):
        if is_so():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come to be")


@pytest.fixture
def desk(
    bank: Bank,
    versions: list[Version],
    engine: TorchEngine,
    encoder: Encoder,
    conversations: ConversationLog,
    reader: LogReader,
    tiny: BaseModel,
    tiny_served: ServedModel,
) -> Desk:
    return Desk(bank, engine, encoder, conversations, reader, tiny, tiny_served)


async def test_a_canary_answers_the_conversations_drawn_for_it_and_no_others(
    desk: Desk, bank: Bank, versions: list[Version]
) -> None:
    await bank.start_canary("banking", 2, 0.5, "ann", "try")
    candidate = versions[1].content_digest
    seen = {f"c{n}": (await desk.answer("Block my card", f"c{n}")).version for n in range(24)}
    assert seen == {id_: 2 if is_in_canary(id_, candidate, 0.5) else 1 for id_ in seen}
    assert set(seen.values()) == {1, 2}
    again = {id_: (await desk.answer("And then?", id_)).version for id_ in seen}
    assert again == seen
    await bank.start_canary("banking", 2, 0.9, "ann", "more")
    more = {id_: (await desk.answer("And now?", id_)).version for id_ in seen}
    assert all(more[id_] == 2 for id_, version in seen.items() if version == 2)
    assert list(more.values()).count(2) > list(seen.values()).count(2)


async def test_a_canary_ends_when_it_is_ended_or_promoted(desk: Desk, bank: Bank, tiny_served: ServedModel) -> None:
    await bank.start_canary("banking", 2, 1.0, "ann", "all of them")
    assert (await desk.answer("Hello", "one")).version == 2
    await bank.end_canary("banking", tiny_served.fingerprint, "ann", "enough")
    assert (await desk.answer("Hello", "one")).version == 1
    await bank.start_canary("banking", 3, 1.0, "ann", "another")
    await bank.promote("banking", 3, "ann", "good")
    assert (await desk.answer("Hello", "two")).version == 3
    assert (await bank.claim_table()).pointers("banking", tiny_served.fingerprint).canary is None


async def test_a_canary_that_cannot_be_read_answers_nobody(
    desk: Desk, bank: Bank, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await bank.start_canary("banking", 3, 1.0, "ann", "try")
    (tmp_path / "data/bank/versions/banking/3/card.toml").write_text("broken", encoding="utf-8")
    assert (await desk.answer("Hello", "one")).version == 1
    assert "banking v3 is left out" in caplog.text


async def test_a_canary_whose_prompt_cannot_be_loaded_answers_nobody(
    desk: Desk, bank: Bank, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await bank.start_canary("banking", 3, 1.0, "ann", "try")
    (tmp_path / "data/bank/versions/banking/3/adapter_model.safetensors").write_bytes(b"broken")
    turn = await desk.answer("Hello", "one")
    assert (turn.version, turn.finish_reason) == (1, "length")
    assert "banking v1 answers instead of banking v3" in caplog.text


async def test_a_version_deleted_since_the_claim_is_replaced_by_the_live_one(
    desk: Desk, bank: Bank, engine: TorchEngine, tiny_served: ServedModel
) -> None:
    request = ChatRequest([Message(role="user", content="Hello")], "banking", None, "one", FEW)
    events = desk.chat.answer(request, Caller("test"))
    claimed = bank.answering

    async def then_deleted(*arguments: Any) -> Version:
        version = await claimed(*arguments)
        await bank.promote("banking", 2, "ann", "better")
        await bank.delete("banking", 1, "ann", "no longer wanted")
        return version

    bank.answering = then_deleted  # type: ignore[method-assign]
    started = await anext(events)
    assert isinstance(started, TurnStarted)
    assert started.version is not None
    assert started.version.manifest.version == 2
    await events.aclose()


async def test_a_shadow_answers_every_turn_unseen(desk: Desk, bank: Bank, versions: list[Version]) -> None:
    alone = await desk.answer("What is my balance?")
    await bank.start_shadow("banking", 2, "ann", "compare")
    events = await desk.events("What is my balance?")
    finished = events[-1]
    assert isinstance(finished, TurnFinished)
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == alone.answer
    (shadow,) = await desk.shadows(1)
    assert (shadow["turn_id"], shadow["version"], shadow["shadow_version"]) == (finished.turn.id, 1, 2)
    assert shadow["answer"] == alone.answer
    await bank.promote("banking", 2, "ann", "what it would have said")
    assert (await desk.answer("What is my balance?")).answer == shadow["shadow_answer"] != alone.answer
    # Not in what training reads, and none is left once the shadow was promoted.
    exported = "".join([record.model_dump_json() async for record in desk.reader.export(frozenset({"banking"}))])
    assert json.dumps(alone.answer) in exported
    assert len(await desk.shadows(1)) == 1


async def test_a_shadow_that_fails_is_counted_and_seen_by_nobody(desk: Desk, bank: Bank, tmp_path: Path) -> None:
    await bank.start_shadow("banking", 2, "ann", "compare")
    (tmp_path / "data/bank/versions/banking/2/adapter_model.safetensors").write_bytes(b"broken")
    turn = await desk.answer("Hello")
    assert (turn.version, turn.finish_reason) == (1, "length")
    await until(lambda: desk.metric('frontdesk_shadow_answers_total{domain="banking",outcome="failed",version="2"}'))
    assert await desk.reader.shadows() == []


async def test_a_shadow_that_finds_no_room_is_left_out_and_counted(
    bank: Bank,
    versions: list[Version],
    engine: TorchEngine,
    encoder: Encoder,
    conversations: ConversationLog,
    reader: LogReader,
    tiny: BaseModel,
    tiny_served: ServedModel,
) -> None:
    desk = Desk(bank, engine, encoder, conversations, reader, tiny, tiny_served, has_room=False)
    await bank.start_shadow("banking", 2, "ann", "compare")
    await desk.answer("Hello")
    assert desk.metric('frontdesk_shadow_answers_total{domain="banking",outcome="skipped",version="2"}') == 1


async def test_closing_waits_for_shadows_under_way(desk: Desk, bank: Bank) -> None:
    await bank.start_shadow("banking", 2, "ann", "compare")
    await desk.events("Hello")
    await desk.chat.close()
    (shadow,) = await desk.reader.shadows()
    assert shadow["shadow_version"] == 2
    assert desk.metric('frontdesk_shadow_answers_total{domain="banking",outcome="answered",version="2"}') == 1


async def test_closing_ends_shadows_that_take_too_long(
    bank: Bank,
    versions: list[Version],
    engine: TorchEngine,
    encoder: Encoder,
    conversations: ConversationLog,
    reader: LogReader,
    tiny: BaseModel,
    tiny_served: ServedModel,
) -> None:
    desk = Desk(bank, engine, encoder, conversations, reader, tiny, tiny_served, drain_s=0.01)
    await bank.start_shadow("banking", 2, "ann", "compare")
    await desk.events("Hello", overrides=replace(FEW, max_tokens=200))
    await until(lambda: engine.stats().num_active)  # the shadow
    generated = engine.stats().num_generated_tokens
    await desk.chat.close()
    await until(lambda: not engine.stats().num_active)
    assert engine.stats().num_generated_tokens - generated < 190
    assert await desk.reader.shadows() == []
    assert desk.metric('frontdesk_shadow_answers_total{domain="banking",outcome="cancelled",version="2"}') == 1


async def test_shadow_answers_are_written_as_lines(desk: Desk, bank: Bank, tmp_path: Path, frontdesk: Frontdesk) -> None:
    await bank.start_shadow("banking", 2, "ann", "compare")
    await desk.answer("Block my card, please")
    await desk.shadows(1)
    status, out, err = await asyncio.to_thread(frontdesk, "logs", "shadows", "--domain", "banking")
    (line,) = out.splitlines()
    assert (status, err.strip()) == (0, "1 turns")
    assert json.loads(line)["question"] == "Block my card, please"
    assert (await asyncio.to_thread(frontdesk, "logs", "shadows", "--domain", "travel"))[1] == ""
