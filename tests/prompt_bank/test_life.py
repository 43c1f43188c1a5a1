"""The life of a version over a real store and a real Valkey: promote, roll back, canary, shadow, retire, delete, history."""

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from prompt_bank.bank import Bank
from prompt_bank.cache import RedisCache
from prompt_bank.editing import add_card
from prompt_bank.errors import ChatFormatMismatchError, UnknownDomainError, UnknownVersionError, VersionInUseError
from prompt_bank.history import HistoryEntry
from prompt_bank.pointers import PointerChange, PointerTable
from prompt_bank.starter import install_starters, starter_domains
from prompt_bank.store import FolderStore
from prompt_bank.version import CARD_FILE, MANIFEST_FILE, Draft, ServedModel
from tests.prompt_bank.conftest import BankOpener, make_card, make_prompt, publish

CONVERSATIONS = [f"conversation-{n}" for n in range(400)]
spawn = multiprocessing.get_context("spawn")


async def published(bank: Bank, model: ServedModel, count: int, promoted: int = 1) -> None:
    """So many versions of banking with prompts of their own; the first ones promoted in turn."""
    for seed in range(count):
        version = await publish(bank, model, seed)
        if seed < promoted:
            await bank.promote("banking", version.manifest.version, "ann", "test")


async def live_number(bank: Bank, model: ServedModel) -> int:
    return (await bank.live("banking", model)).manifest.version


async def canary_members(bank: Bank, model: ServedModel, canary: int) -> set[str]:
    table = await bank.claim_table()
    answered_by = {id_: (await bank.answering(table, "banking", id_, model)).manifest.version for id_ in CONVERSATIONS}
    live = table.pointers("banking", model.fingerprint).live
    assert set(answered_by.values()) <= {canary, live}
    return {id_ for id_, number in answered_by.items() if number == canary}


async def another_bank(open_bank_at: BankOpener, redis_url: str) -> Bank:
    bank = open_bank_at(redis_url)
    await bank.start()
    return bank


# Promote and roll back.


async def test_rollback_is_seen_at_the_next_claim_by_another_bank(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel
) -> None:
    await published(bank, tiny_served, 3, promoted=3)
    other = await another_bank(open_bank_at, redis_url)
    seen = [await live_number(other, tiny_served)]
    for _ in range(2):
        await bank.rollback("banking", tiny_served.fingerprint, "ann", "worse")
        seen.append(await live_number(other, tiny_served))
    assert seen == [3, 2, 1]
    with pytest.raises(UnknownVersionError, match=r"no previous live version to go back to \(v1 is live\)"):
        await bank.rollback("banking", tiny_served.fingerprint, "ann", "worse still")


async def test_rollback_undoes_a_card_edit_and_keeps_the_prompt(bank: Bank, tiny_served: ServedModel) -> None:
    await published(bank, tiny_served, 1)
    before = await bank.live("banking", tiny_served)
    edited = await add_card(bank, make_card(brief="Edited."), tiny_served, "ann", "a new brief")
    assert (await bank.live("banking", tiny_served)).card.brief == "Edited."
    await bank.rollback("banking", tiny_served.fingerprint, "ann", "undone")
    after = await bank.live("banking", tiny_served)
    assert after == before
    assert after.card.brief != edited.card.brief
    assert after.digest == edited.digest


async def test_changes_at_once_from_two_banks_each_find_the_table_they_need(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel
) -> None:
    """A change that another one forbids meanwhile is refused, not made on an older table."""
    await published(bank, tiny_served, 2, promoted=2)
    other = await another_bank(open_bank_at, redis_url)
    await other.claim_table()
    await bank.retire("banking", 1, "ann", "")
    with pytest.raises(UnknownVersionError, match="no previous live version"):
        await other.rollback("banking", tiny_served.fingerprint, "bob", "")
    with pytest.raises(VersionInUseError, match="banking v1 is retired"):
        await other.promote("banking", 1, "bob", "")
    assert await live_number(other, tiny_served) == 2


async def test_a_version_of_another_chat_format_is_not_pointed_at(bank: Bank, tiny_served: ServedModel) -> None:
    """It would take the domain down: no service could answer with it."""
    other = replace(tiny_served, chat_format="d" * 64)
    await published(bank, tiny_served, 1)
    await publish(bank, other, seed=5)
    both = f"banking v2 was made for chat format dddddddddddd, the live v1 has {tiny_served.chat_format[:12]}, so .*; train it"
    for change in (
        bank.promote("banking", 2, "ann", ""),
        bank.start_canary("banking", 2, 0.5, "ann", ""),
        bank.start_shadow("banking", 2, "ann", ""),
    ):
        with pytest.raises(ChatFormatMismatchError, match=both):
            await change
    assert (await bank.claim_table()).epoch == 1
    with pytest.raises(ChatFormatMismatchError, match=f"{tiny_served.name} is served here with {tiny_served.chat_format[:12]}"):
        await bank.promote("banking", 2, "ann", "", served=tiny_served)


async def test_after_an_upgrade_of_the_chat_format_the_new_version_is_promoted_and_the_old_one_is_not(
    bank: Bank, tiny_served: ServedModel
) -> None:
    upgraded = replace(tiny_served, chat_format="d" * 64)
    await published(bank, tiny_served, 1)  # v1 is live, and can no longer be served
    await publish(bank, upgraded, seed=5)
    await bank.promote("banking", 2, "ann", "trained again", served=upgraded)
    assert await live_number(bank, tiny_served) == 2
    for served in (None, upgraded):
        with pytest.raises(ChatFormatMismatchError, match="banking v1 was made for"):
            await bank.rollback("banking", tiny_served.fingerprint, "ann", "", served)
    with pytest.raises(ChatFormatMismatchError, match="banking v1 was made for"):
        await bank.promote("banking", 1, "ann", "", served=upgraded)
    brief = await publish(bank, tiny_served, seed=None)  # of before, too, but text
    await bank.promote("banking", brief.manifest.version, "ann", "", served=upgraded)
    await bank.promote("banking", 2, "ann", "", served=upgraded)


@pytest.mark.parametrize("is_gone", [False, True])
async def test_a_broken_live_version_keeps_no_other_from_being_promoted(
    bank: Bank, store: FolderStore, tiny_served: ServedModel, is_gone: bool
) -> None:
    await published(bank, tiny_served, 2)
    manifest = store._folder("banking", 1) / MANIFEST_FILE
    manifest.unlink() if is_gone else manifest.write_text("{")
    await bank.promote("banking", 2, "ann", "instead")
    assert await live_number(bank, tiny_served) == 2


# Canary.


def members_in_this_process(root: Path, redis_url: str, model: ServedModel, canary: int) -> set[str]:
    import asyncio

    async def members() -> set[str]:
        store = FolderStore(root)
        cache = RedisCache.connect(redis_url, store.id, blob_ttl_s=3600, timeout_s=5)
        try:
            bank = Bank(store, cache)
            await bank.start()
            return await canary_members(bank, model, canary)
        finally:
            await cache.aclose()

    return asyncio.run(members())


async def test_canary_answers_the_same_share_of_conversations_in_every_bank_and_process(
    bank: Bank, open_bank_at: BankOpener, store: FolderStore, redis_url: str, tiny_served: ServedModel
) -> None:
    await published(bank, tiny_served, 2)
    await bank.start_canary("banking", 2, 0.25, "ann", "a trial")
    members = await canary_members(bank, tiny_served, 2)
    assert abs(len(members) - 100) < 4 * math.sqrt(400 * 0.25 * 0.75)
    assert await canary_members(await another_bank(open_bank_at, redis_url), tiny_served, 2) == members
    with spawn.Pool(1) as pool:
        arguments = (store._versions.parent, redis_url, tiny_served, 2)
        assert pool.apply_async(members_in_this_process, arguments).get(60) == members
    await bank.start_canary("banking", 2, 0.5, "ann", "going well")
    assert await canary_members(bank, tiny_served, 2) > members
    await bank.end_canary("banking", tiny_served.fingerprint, "ann", "over")
    assert await canary_members(bank, tiny_served, 2) == set()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
async def test_share_that_is_none_writes_nothing_that_cannot_be_read_back(
    bank: Bank, store: FolderStore, tiny_served: ServedModel, share: float
) -> None:
    await published(bank, tiny_served, 2)
    with pytest.raises(ValueError, match="share"):
        await bank.start_canary("banking", 2, share, "ann", "")
    assert FolderStore(store._versions.parent).pointer_table().epoch == 1


async def test_promoted_canary_answers_everybody(bank: Bank, tiny_served: ServedModel) -> None:
    await published(bank, tiny_served, 2)
    await bank.start_canary("banking", 2, 0.25, "ann", "")
    await bank.promote("banking", 2, "ann", "")
    table = await bank.claim_table()
    assert table.pointers("banking", tiny_served.fingerprint).canary is None
    answering = [await bank.answering(table, "banking", id_, tiny_served) for id_ in CONVERSATIONS]
    assert {version.manifest.version for version in answering} == {2}


async def test_canaries_that_differ_in_their_card_alone_draw_apart_when_served_by_briefs(
    bank: Bank, tiny_served: ServedModel
) -> None:
    for brief in ("One.", "Two.", "Three."):
        await bank.publish(Draft(make_card(brief=brief), tiny_served), "ann", "test")
    await bank.promote("banking", 1, "ann", "")
    members = []
    for candidate in (2, 3):
        await bank.start_canary("banking", candidate, 0.25, "ann", "")
        members.append(await canary_members(bank, tiny_served, candidate))
    # Of two independent draws of a quarter, a sixteenth is in both.
    assert abs(len(members[0] & members[1]) - 25) < 4 * math.sqrt(400 / 16 * 15 / 16)


@pytest.mark.parametrize("broken", [CARD_FILE, MANIFEST_FILE])
async def test_canary_whose_files_are_broken_answers_nobody_and_is_logged(
    bank: Bank,
    open_bank_at: BankOpener,
    store: FolderStore,
    redis_url: str,
    tiny_served: ServedModel,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    await published(bank, tiny_served, 2)
    await bank.start_canary("banking", 2, 1.0, "ann", "")
    (store._folder("banking", 2) / broken).write_text("broken")
    fresh = await another_bank(open_bank_at, redis_url)
    assert await canary_members(fresh, tiny_served, 2) == set()
    assert "banking v2 is left out" in caplog.text


async def test_canary_of_another_chat_format_answers_nobody_and_is_logged(
    bank: Bank, tiny_served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    await published(bank, tiny_served, 1)
    other = replace(tiny_served, chat_format="a" * 64)
    await publish(bank, other, 1)
    await bank.start_canary("banking", 2, 1.0, "ann", "", served=other)  # and then another is served
    await bank.start_shadow("banking", 2, "ann", "", served=other)
    assert await canary_members(bank, tiny_served, 2) == set()
    assert await bank.shadow(await bank.claim_table(), "banking", tiny_served) is None
    assert "banking v2 is left out: banking v2 was made for chat format aaaaaaaaaaaa" in caplog.text


# Shadow.


async def test_shadow_is_told_beside_the_live_version(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel
) -> None:
    await published(bank, tiny_served, 2)
    assert await bank.shadow(await bank.claim_table(), "banking", tiny_served) is None
    await bank.start_shadow("banking", 2, "ann", "")
    for one in (bank, await another_bank(open_bank_at, redis_url)):
        table = await one.claim_table()
        shadow = await one.shadow(table, "banking", tiny_served)
        assert shadow is not None
        assert shadow.manifest.version == 2
        answering = [await one.answering(table, "banking", id_, tiny_served) for id_ in CONVERSATIONS[:50]]
        assert {version.manifest.version for version in answering} == {1}
    await bank.end_shadow("banking", tiny_served.fingerprint, "ann", "")
    assert await bank.shadow(await bank.claim_table(), "banking", tiny_served) is None


async def test_shadow_whose_files_are_broken_is_left_out_and_logged(
    bank: Bank, store: FolderStore, tiny_served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    await published(bank, tiny_served, 2)
    await bank.start_shadow("banking", 2, "ann", "")
    (store._folder("banking", 2) / CARD_FILE).write_text("broken")
    assert await bank.shadow(await bank.claim_table(), "banking", tiny_served) is None
    assert "banking v2 is left out" in caplog.text


# Retire and restore.


async def test_retired_live_version_takes_its_domain_offline_and_a_restart_does_not_bring_it_back(
    bank: Bank, open_bank_at: BankOpener, redis_url: str, tiny_served: ServedModel
) -> None:
    await install_starters(bank, tiny_served)
    await bank.retire("banking", 1, "ann", "wrong answers")
    restarted = await another_bank(open_bank_at, redis_url)
    await install_starters(restarted, tiny_served)
    for one in (bank, restarted):
        with pytest.raises(UnknownDomainError, match="no domain 'banking' is live; there are: healthcare, translation"):
            await one.live("banking", tiny_served)
    with pytest.raises(VersionInUseError, match="`frontdesk bank restore banking 1` first"):
        await restarted.promote("banking", 1, "ann", "")
    await restarted.restore("banking", 1, "ann", "it was right")
    with pytest.raises(UnknownDomainError):
        await bank.live("banking", tiny_served)
    await restarted.promote("banking", 1, "ann", "")
    assert await live_number(bank, tiny_served) == 1


async def test_retired_canary_and_shadow_answer_nobody(bank: Bank, tiny_served: ServedModel) -> None:
    await published(bank, tiny_served, 3)
    await bank.start_canary("banking", 2, 1.0, "ann", "")
    await bank.start_shadow("banking", 3, "ann", "")
    for number in (2, 3):
        await bank.retire("banking", number, "ann", "")
    assert await canary_members(bank, tiny_served, 2) == set()
    assert await bank.shadow(await bank.claim_table(), "banking", tiny_served) is None


async def test_version_with_broken_files_can_be_taken_out_of_service_and_deleted(
    bank: Bank, store: FolderStore, tiny_served: ServedModel
) -> None:
    """It is just the one an operator wants to be rid of."""
    await published(bank, tiny_served, 2, promoted=2)
    path = store._folder("banking", 2) / CARD_FILE
    path.write_text(path.read_text() + "# edited")
    await bank.retire("banking", 2, "ann", "its card was edited")
    await bank.delete("banking", 2, "ann", "its card was edited")
    assert store.versions("banking") == [1]


# Delete.


@pytest.mark.parametrize("use", ["live", "canary", "shadow"])
async def test_delete_is_refused_while_the_version_is_in_use_for_any_base_model(
    bank: Bank, open_bank_at: BankOpener, store: FolderStore, redis_url: str, tiny_served: ServedModel, use: str
) -> None:
    other = replace(tiny_served, name="other", fingerprint="e" * 64)
    await published(bank, tiny_served, 1)
    for seed in (1, 2):
        await publish(bank, other, seed)
    await bank.promote("banking", 2, "ann", "")
    if use == "canary":
        await bank.start_canary("banking", 3, 0.1, "ann", "")
    if use == "shadow":
        await bank.start_shadow("banking", 3, "ann", "")
    number = 2 if use == "live" else 3
    elsewhere = await another_bank(open_bank_at, redis_url)
    epoch = store.pointer_table().epoch
    with pytest.raises(VersionInUseError, match=f"banking v{number} is the {use} version and cannot be deleted"):
        await elsewhere.delete("banking", number, "bob", "")
    assert store.pointer_table().epoch == epoch
    assert store.read_soft_prompt(store.read_version("banking", number), other)


async def test_deleted_version_is_gone_from_the_store_and_from_redis(
    bank: Bank, store: FolderStore, tiny_served: ServedModel, redis_url: str
) -> None:
    await published(bank, tiny_served, 2)
    version = await bank.version("banking", 2)
    await bank.soft_prompt(version, tiny_served)
    cache = RedisCache.connect(redis_url, store.id, blob_ttl_s=60, timeout_s=2)
    try:
        assert await cache.get_blob(str(version.digest)) is not None
        await bank.delete("banking", 2, "ann", "a trial")
        assert await cache.get_blob(str(version.digest)) is None
    finally:
        await cache.aclose()
    assert store.versions("banking") == [1]
    assert list(store._folder("banking", 2).iterdir()) == []
    with pytest.raises(UnknownVersionError, match="banking v2 was deleted; publish it again"):
        await bank.promote("banking", 2, "ann", "")
    await bank.claim_table()
    with pytest.raises(UnknownVersionError, match="banking has no version 2; it has: 1"):
        await bank.version("banking", 2)


async def test_deleting_one_of_two_versions_with_the_same_prompt_harms_not_the_other(
    bank: Bank, tiny_served: ServedModel
) -> None:
    await published(bank, tiny_served, 1)
    kept = await add_card(bank, make_card(brief="Edited."), tiny_served, "ann", "")
    await bank.soft_prompt(kept, tiny_served)
    await bank.delete("banking", 1, "ann", "")
    prompt = await bank.soft_prompt(await bank.live("banking", tiny_served), tiny_served)
    assert prompt.digest == kept.digest == make_prompt(tiny_served.shape, seed=0).digest


@pytest.mark.parametrize("deleted", [2, 3], ids=["in the middle", "the newest"])
async def test_number_of_a_deleted_version_is_never_given_again(
    bank: Bank, store: FolderStore, tiny_served: ServedModel, deleted: int
) -> None:
    await published(bank, tiny_served, 3)
    await bank.delete("banking", deleted, "ann", "")
    assert (await publish(bank, tiny_served, 4)).manifest.version == 4
    assert FolderStore(store._versions.parent).add_version(Draft(make_card(), tiny_served), "", "").manifest.version == 5


async def test_delete_that_was_interrupted_is_finished_by_deleting_again(
    bank: Bank, open_bank_at: BankOpener, store: FolderStore, redis_url: str, tiny_served: ServedModel
) -> None:
    await published(bank, tiny_served, 2)
    change = PointerChange(
        action="delete",
        domain="banking",
        fingerprint=tiny_served.fingerprint,
        version=2,
        actor="ann",
        reason="a trial",
        deleted=store.read_version("banking", 2).manifest,
    )
    store.commit(change, store.pointer_table().epoch + 1)  # and then the process dies
    restarted = await another_bank(open_bank_at, redis_url)
    with pytest.raises(UnknownVersionError, match="banking v2 was deleted"):
        await restarted.promote("banking", 2, "ann", "")
    (store._folder("banking", 2) / MANIFEST_FILE).unlink()  # or it dies a little later
    table = await restarted.delete("banking", 2, "bob", "again")
    assert list(store._folder("banking", 2).iterdir()) == []
    for point in (restarted.promote("banking", 2, "ann", ""), restarted.start_canary("banking", 2, 0.5, "ann", "")):
        with pytest.raises(UnknownVersionError, match="banking v2 was deleted; publish it again as a new version"):
            await point
    assert table.change == change  # it is recorded once
    deletions = [entry for entry in await bank.history("banking") if entry.action == "delete"]
    assert [(entry.actor, entry.version) for entry in deletions] == [("ann", 2)]


async def test_version_that_never_was_cannot_be_deleted(bank: Bank, tiny_served: ServedModel) -> None:
    await published(bank, tiny_served, 1)
    with pytest.raises(UnknownVersionError, match="banking has no version 7; it has: 1"):
        await bank.delete("banking", 7, "ann", "")
    with pytest.raises(UnknownVersionError, match="travel has no version 1, nor any other; the bank has the domains: banking"):
        await bank.delete("travel", 1, "ann", "")


# History.


def told(entry: HistoryEntry) -> tuple[str, int | None, str, str]:
    return entry.action, entry.version, entry.actor, entry.reason


async def test_history_tells_who_did_what_and_why(bank: Bank, tiny_served: ServedModel) -> None:
    fingerprint = tiny_served.fingerprint
    for seed, actor in enumerate(("ann", "bob")):
        draft = Draft(make_card(), tiny_served, make_prompt(tiny_served.shape, seed=seed))
        await bank.publish(draft, actor, f"trial {seed}")
    await bank.promote("banking", 1, "ann", "first")
    await bank.start_canary("banking", 2, 0.25, "bob", "a trial")
    await bank.end_canary("banking", fingerprint, "bob", "good")
    await bank.start_shadow("banking", 2, "bob", "unseen")
    await bank.end_shadow("banking", fingerprint, "bob", "seen")
    await bank.promote("banking", 2, "bob", "better")
    await bank.rollback("banking", fingerprint, "ann", "worse")
    await bank.retire("banking", 2, "ann", "bad")
    await bank.restore("banking", 2, "ann", "not so bad")
    await publish(bank, tiny_served, domain="loans")
    await bank.promote("loans", 1, "eve", "")
    history = await bank.history("banking")
    assert [told(entry) for entry in history] == [
        ("publish", 1, "ann", "trial 0"),
        ("publish", 2, "bob", "trial 1"),
        ("promote", 1, "ann", "first"),
        ("canary", 2, "bob", "a trial"),
        ("end_canary", 2, "bob", "good"),
        ("shadow", 2, "bob", "unseen"),
        ("end_shadow", 2, "bob", "seen"),
        ("promote", 2, "bob", "better"),
        ("rollback", 1, "ann", "worse"),
        ("retire", 2, "ann", "bad"),
        ("restore", 2, "ann", "not so bad"),
    ]
    assert [entry.share for entry in history if entry.share is not None] == [0.25]
    assert {entry.fingerprint for entry in history} == {fingerprint}
    assert [entry.at for entry in history] == sorted(entry.at for entry in history)
    with pytest.raises(UnknownDomainError, match="no domain 'travel' in the bank; there are: banking, loans"):
        await bank.history("travel")


async def test_history_keeps_what_a_deleted_version_was(bank: Bank, store: FolderStore, tiny_served: ServedModel) -> None:
    prompt = make_prompt(tiny_served.shape)
    version = await bank.publish(Draft(make_card(), tiny_served, prompt), "ann", "a trial")
    await bank.delete("banking", 1, "bob", "it was no good")
    assert store.domains() == []
    assert [told(entry) for entry in await bank.history("banking")] == [
        ("publish", 1, "ann", "a trial"),
        ("delete", 1, "bob", "it was no good"),
    ]
    (change,) = FolderStore(store._versions.parent).changes()
    assert change.deleted == version.manifest
    written = json.loads((store._changes / "000000000001.json").read_text())
    assert written["deleted"]["soft_prompt"]["digest"] == prompt.digest


async def test_history_is_told_although_a_version_s_card_was_edited(
    bank: Bank, store: FolderStore, tiny_served: ServedModel
) -> None:
    await published(bank, tiny_served, 2)
    (store._folder("banking", 2) / CARD_FILE).write_text("edited")
    entries = [told(entry)[:2] for entry in await bank.history("banking")]
    assert ("promote", 1) in entries
    assert ("publish", 1) in entries


async def test_every_change_is_an_epoch(bank: Bank, store: FolderStore, tiny_served: ServedModel) -> None:
    await published(bank, tiny_served, 2)
    tables: list[PointerTable] = [await bank.claim_table()]
    tables.append(await bank.start_canary("banking", 2, 0.5, "ann", ""))
    tables.append(await bank.promote("banking", 2, "ann", ""))
    tables.append(await bank.rollback("banking", tiny_served.fingerprint, "ann", ""))
    tables.append(await bank.delete("banking", 2, "ann", ""))
    assert [table.epoch for table in tables] == [1, 2, 3, 4, 5]
    assert await bank.claim_table() == store.pointer_table() == tables[-1]


async def test_starters_are_recorded(bank: Bank, tiny_served: ServedModel) -> None:
    await install_starters(bank, tiny_served)
    for domain in starter_domains():
        assert [told(entry) for entry in await bank.history(domain)] == [
            ("publish", 1, "frontdesk", "starter domain"),
            ("promote", 1, "frontdesk", "starter domain"),
        ]
