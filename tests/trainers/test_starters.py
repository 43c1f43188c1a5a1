"""The shipped data, and the versions trained on it."""

import json
import math
from pathlib import Path

import pytest

from prompt_bank.base_model import BaseModel
from prompt_bank.card import read_card
from prompt_bank.chat_format import ChatFormat
from prompt_bank.conversation import Conversation, read_conversations
from prompt_bank.settings import BankSettings
from prompt_bank.starter import STARTER_DIR, TRAINED, starter_domains
from prompt_bank.version import ServedModel, Version, read_soft_prompt, read_version
from tests.trainers.conftest import SPOKEN, Recorder, write_jsonl
from trainers.dataset import read_dataset
from trainers.publishing import Workbench
from trainers.runs import max_conversation_tokens
from trainers.settings import TuningSettings
from trainers.starters import RESULTS_FILE, train_starter

DOMAINS = ("banking", "healthcare", "translation")
PARTS = ("train", "validation", "test")


def part(domain: str, name: str) -> list[Conversation]:
    return read_conversations(STARTER_DIR / domain / f"{name}.jsonl")


def five_grams(conversation: Conversation) -> set[str]:
    text = " ".join(" ".join(message.content for message in conversation.messages).lower().split())
    return {text[start : start + 5] for start in range(len(text) - 4)}


def overlap(one: set[str], other: set[str]) -> float:
    """Share of the smaller set that is in the larger one."""
    return len(one & other) / min(len(one), len(other))


def test_the_starters_are_these() -> None:
    assert tuple(starter_domains()) == DOMAINS


@pytest.mark.parametrize("domain", DOMAINS)
def test_there_are_enough_conversations(domain: str) -> None:
    sizes = [len(part(domain, name)) for name in PARTS]
    assert all(size >= least for size, least in zip(sizes, (150, 20, 40), strict=True)), sizes


def test_there_are_enough_sentences_to_translate() -> None:
    answers = [m for name in PARTS for c in part("translation", name) for m in c.messages if m.role == "assistant"]
    assert len(answers) >= 600


@pytest.mark.parametrize("domain", DOMAINS)
def test_nothing_trained_on_is_close_to_a_test_conversation(domain: str) -> None:
    test = [(five_grams(conversation), conversation) for conversation in part(domain, "test")]
    seen = [conversation for name in ("train", "validation") for conversation in part(domain, name)]
    close = [(mine, theirs) for mine in seen for grams, theirs in test if overlap(five_grams(mine), grams) > 0.5]
    assert not close, f"{len(close)} pairs, the first: {close[0]}"


def test_overlap_sees_a_copy_and_a_contained_text() -> None:
    copied, other = part("banking", "test")[:2]
    assert overlap(five_grams(copied), five_grams(copied)) == 1
    first_turn = Conversation(messages=copied.messages[:2])
    assert overlap(five_grams(first_turn), five_grams(copied)) > 0.9
    assert overlap(five_grams(copied), five_grams(other)) < 0.5


def trained_version(domain: str) -> Version:
    return read_version(STARTER_DIR / domain / TRAINED)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_trained_version_beats_its_brief(domain: str, smollm2: BaseModel) -> None:
    version = trained_version(domain)
    record = version.manifest.training
    assert record is not None
    loss = {setup: figures["loss"] for setup, figures in record.metrics.items()}
    accuracy = {setup: figures["accuracy"] for setup, figures in record.metrics.items()}
    assert loss["trained"] < loss["brief"] < loss["frozen"]
    assert accuracy["trained"] > accuracy["brief"]
    model = ServedModel.of(smollm2, ChatFormat(smollm2.tokenizer))
    assert read_soft_prompt(STARTER_DIR / domain / TRAINED, version, model).digest == version.digest


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_trained_version_is_of_the_data_and_card_that_ship_with_it(domain: str, smollm2: BaseModel) -> None:
    version = trained_version(domain)
    folder = STARTER_DIR / domain
    assert version.card == read_card(folder / "card.toml")
    settings, record = TuningSettings(), version.manifest.training
    assert record is not None
    train, validation, test = (folder / f"{name}.jsonl" for name in PARTS)
    chat_format = ChatFormat(smollm2.tokenizer)
    dataset = read_dataset(train, validation, test, chat_format, max_conversation_tokens(smollm2, settings), record.seed)
    assert record.data_digest == dataset.digest
    assert record.num_conversations == len(dataset.train)


@pytest.mark.parametrize("domain", DOMAINS)
def test_results_stand_beside_the_trained_version(domain: str) -> None:
    results = json.loads((STARTER_DIR / domain / RESULTS_FILE).read_text(encoding="utf-8"))
    record = trained_version(domain).manifest.training
    assert record is not None
    assert results["held_out"] == record.metrics
    assert all({"frozen", "brief", "trained", "reference"} <= set(sample) for sample in results["samples"])
    if domain == "translation":
        assert results["chrf"]["trained"] > results["chrf"]["brief"]


def test_a_starter_is_trained_again_in_its_place(tiny: BaseModel, tmp_path: Path) -> None:
    card = (STARTER_DIR / "translation" / "card.toml").read_text(encoding="utf-8")
    (tmp_path / "card.toml").write_text(card, encoding="utf-8")
    for name in PARTS:
        write_jsonl(tmp_path / f"{name}.jsonl", SPOKEN)
    (tmp_path / TRAINED).mkdir()
    (tmp_path / TRAINED / "stale").touch()
    chat_format = ChatFormat(tiny.tokenizer)
    bench = Workbench(BankSettings.load(), tiny, chat_format, ServedModel.of(tiny, chat_format))
    settings = TuningSettings(num_virtual_tokens=8, num_epochs=1)

    trained = train_starter(bench, tmp_path, settings, Recorder())

    version = read_version(tmp_path / TRAINED)
    assert version.manifest.version == 1
    assert read_soft_prompt(tmp_path / TRAINED, version, bench.served).digest == trained.prompt.digest
    assert not (tmp_path / TRAINED / "stale").exists()
    results = json.loads((tmp_path / RESULTS_FILE).read_text(encoding="utf-8"))
    assert set(results["chrf"]) == {"frozen", "brief", "trained"}
    assert len(results["samples"]) == len(SPOKEN)
    assert math.isfinite(results["held_out"]["trained"]["loss"])
