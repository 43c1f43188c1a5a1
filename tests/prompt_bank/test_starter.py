"""The shipped domains on a new bank, and every domain on another base model."""

import asyncio
from dataclasses import replace

import pytest

from prompt_bank import starter
from prompt_bank.bank import Bank
from prompt_bank.conversation import read_conversations
from prompt_bank.editing import add_card
from prompt_bank.starter import STARTER_DIR, TRAINED, install_starters, starter_domains
from prompt_bank.store import FolderStore
from prompt_bank.version import Draft, ServedModel, write_version
from tests.prompt_bank.conftest import BankOpener, make_card, make_prompt


async def live_versions(bank: Bank, model: ServedModel) -> dict[str, int]:
    return (await bank.claim_table()).live_versions(model.fingerprint)


async def test_empty_bank_gets_all_three_live_and_answers_from_their_briefs_on_another_base_model(
    bank: Bank, store: FolderStore, tiny_served: ServedModel
) -> None:
    await install_starters(bank, tiny_served)
    assert await live_versions(bank, tiny_served) == {"banking": 1, "healthcare": 1, "translation": 1}
    for domain in starter_domains():
        version = await bank.live(domain, tiny_served)
        assert version.digest is None
        assert version.card.brief
        assert store.read_version(domain, 1) == version


async def test_second_installation_changes_nothing(bank: Bank, store: FolderStore, tiny_served: ServedModel) -> None:
    await install_starters(bank, tiny_served)
    table = store.pointer_table()
    await install_starters(bank, tiny_served)
    assert store.pointer_table() == table
    assert [store.versions(domain) for domain in starter_domains()] == [[1]] * 3


async def test_two_services_that_start_at_once_install_each_starter_once(
    bank: Bank, store: FolderStore, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel
) -> None:
    other = open_bank_at(redis_url)
    await other.start()
    await asyncio.gather(install_starters(bank, tiny_served), install_starters(other, tiny_served))
    assert [store.versions(domain) for domain in starter_domains()] == [[1]] * 3
    assert await live_versions(other, tiny_served) == {"banking": 1, "healthcare": 1, "translation": 1}


async def test_operator_s_own_version_of_a_starter_domain_is_left_alone(bank: Bank, tiny_served: ServedModel) -> None:
    card = make_card("banking", brief="You are our bank's assistant.")
    await add_card(bank, card, tiny_served, "ann", "ours")
    await install_starters(bank, tiny_served)
    assert (await bank.live("banking", tiny_served)).card == card


async def test_operator_s_domain_answers_from_its_brief_on_a_new_base_model(
    bank: Bank, store: FolderStore, tiny_served: ServedModel
) -> None:
    await install_starters(bank, tiny_served)
    version = await bank.publish(Draft(make_card("travel"), tiny_served, make_prompt(tiny_served.shape)), "ann", "trained")
    await bank.promote("travel", version.manifest.version, "ann", "trained")
    other = replace(tiny_served, name="other", fingerprint="e" * 64)
    await install_starters(bank, other)
    assert await live_versions(bank, other) == {"banking": 2, "healthcare": 2, "translation": 2, "travel": 2}
    fallen_back = await bank.live("travel", other)
    assert fallen_back.digest is None
    assert fallen_back.card == version.card
    assert (await bank.live("travel", tiny_served)).digest == version.digest
    change = store.pointer_table().change
    assert change is not None
    assert change.reason == "first start with base model other"


async def test_operator_s_card_of_a_starter_domain_goes_along_to_a_new_base_model(bank: Bank, tiny_served: ServedModel) -> None:
    await install_starters(bank, tiny_served)
    card = make_card("banking", brief="You are our bank's assistant.")
    await add_card(bank, card, tiny_served, "ann", "ours")
    other = replace(tiny_served, name="other", fingerprint="e" * 64)
    await install_starters(bank, other)
    assert (await bank.live("banking", other)).card == card


async def test_trained_starter_is_served_on_the_model_it_was_trained_for(
    bank: Bank, tiny_served: ServedModel, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path_factory.mktemp("starter")
    monkeypatch.setattr(starter, "STARTER_DIR", shipped)
    trained = shipped / "travel" / TRAINED
    trained.mkdir(parents=True)
    (trained.parent / "card.toml").write_text(make_card("travel").to_toml())
    prompt = make_prompt(tiny_served.shape)
    write_version(Draft(make_card("travel"), tiny_served, prompt), 1, trained, "ann", "trained")
    await install_starters(bank, tiny_served)
    version = await bank.live("travel", tiny_served)
    assert version.digest == prompt.digest
    assert (await bank.soft_prompt(version, tiny_served)).digest == prompt.digest
    # With another chat format the same prompt would read other tokens than it was trained on.
    for other in (replace(tiny_served, fingerprint="e" * 64), replace(tiny_served, fingerprint="d" * 64, chat_format="a" * 64)):
        await install_starters(bank, other)
        assert (await bank.live("travel", other)).digest is None


def test_shipped_conversations_can_be_read() -> None:
    for domain in starter_domains():
        for split in ("train", "validation", "test"):
            assert len(read_conversations(STARTER_DIR / domain / f"{split}.jsonl")) >= 30
