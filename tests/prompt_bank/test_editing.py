"""Adding and editing a domain by its card."""

import pytest

from prompt_bank.bank import Bank
from prompt_bank.editing import add_card
from prompt_bank.errors import UnknownVersionError
from prompt_bank.manifest import TrainingRecord
from prompt_bank.store import FolderStore
from prompt_bank.version import Draft, ServedModel
from tests.prompt_bank.conftest import make_card, make_prompt, publish

TRAINING = TrainingRecord(
    seed=7, data_digest="d" * 64, num_conversations=12, settings={}, metrics={"trained": {"nll": 1.25}}, seconds=61
)


async def trained(bank: Bank, model: ServedModel) -> None:
    """banking v1, live, with a soft prompt."""
    await bank.publish(Draft(make_card(), model, make_prompt(model.shape), TRAINING), "ann", "trained")
    await bank.promote("banking", 1, "ann", "trained")


async def test_new_domain_is_live_by_its_brief(bank: Bank, tiny_served: ServedModel) -> None:
    version = await add_card(bank, make_card("travel"), tiny_served, "ann", "asked for")
    assert await bank.live("travel", tiny_served) == version
    manifest = version.manifest
    assert (manifest.version, manifest.parent, manifest.soft_prompt, manifest.training) == (1, None, None, None)
    history = [(entry.action, entry.actor, entry.reason) for entry in await bank.history("travel")]
    assert history == [("publish", "ann", "asked for"), ("promote", "ann", "asked for")]
    with pytest.raises(UnknownVersionError, match="no previous live version"):
        await bank.rollback("travel", tiny_served.fingerprint, "ann", "")


async def test_edited_card_keeps_the_trained_prompt_and_its_record(
    bank: Bank, store: FolderStore, tiny_served: ServedModel
) -> None:
    await trained(bank, tiny_served)
    version = await add_card(bank, make_card(brief="Edited."), tiny_served, "bob", "clearer")
    assert await bank.live("banking", tiny_served) == version == store.read_version("banking", 2)
    assert version.card.brief == "Edited."
    assert (version.manifest.parent, version.manifest.training) == (1, TRAINING)
    assert (version.manifest.actor, version.manifest.reason) == ("bob", "clearer")
    prompt = store.read_soft_prompt(version, tiny_served)
    assert prompt.digest == version.digest == make_prompt(tiny_served.shape).digest


async def test_edited_card_can_drop_the_trained_prompt(bank: Bank, tiny_served: ServedModel) -> None:
    await trained(bank, tiny_served)
    version = await add_card(bank, make_card(brief="Edited."), tiny_served, "bob", "anew", keep_prompt=False)
    assert version.digest is None
    assert (version.manifest.parent, version.manifest.training) == (1, None)
    again = await add_card(bank, make_card(brief="Edited again."), tiny_served, "bob", "", keep_prompt=True)
    assert (again.digest, again.manifest.parent) == (None, 2)  # its parent has no prompt to keep


async def test_parent_is_the_live_version_not_the_newest(bank: Bank, tiny_served: ServedModel) -> None:
    await trained(bank, tiny_served)
    newest = await publish(bank, tiny_served, seed=9)
    version = await add_card(bank, make_card(brief="Edited."), tiny_served, "bob", "")
    assert (version.manifest.version, version.manifest.parent) == (3, 1)
    assert version.digest != newest.digest


async def test_card_of_a_domain_that_was_taken_offline_brings_it_back_by_its_brief(
    bank: Bank, tiny_served: ServedModel
) -> None:
    await trained(bank, tiny_served)
    await bank.retire("banking", 1, "ann", "bad prompt")
    version = await add_card(bank, make_card(brief="Edited."), tiny_served, "ann", "")
    assert (version.digest, version.manifest.parent) == (None, None)
    assert await bank.live("banking", tiny_served) == version
