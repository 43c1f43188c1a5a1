"""Versions and pointers on disk: whole or not there, numbered once, never changed."""

import json
import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prompt_bank.base_model import ModelShape
from prompt_bank.errors import (
    BaseModelMismatchError,
    ChatFormatMismatchError,
    PointerConflictError,
    SoftPromptError,
    UnknownVersionError,
    VersionCorruptError,
    VersionInUseError,
)
from prompt_bank.manifest import TrainingRecord
from prompt_bank.peft_format import CONFIG_FILE, WEIGHTS_FILE
from prompt_bank.pointers import PointerChange, PointerTable
from prompt_bank.store import FolderStore
from prompt_bank.version import CARD_FILE, MANIFEST_FILE, Draft, ServedModel, create_exclusively, read_version
from tests.prompt_bank.conftest import make_card, make_prompt

SHAPE = ModelShape(num_layers=2, num_kv_heads=2, head_size=4, hidden_size=16)
MODEL = ServedModel("tiny", "f" * 64, "c" * 64, SHAPE)
spawn = multiprocessing.get_context("spawn")  # fork would copy this process's threads' locks


def trained_draft(seed: int = 0) -> Draft:
    training = TrainingRecord(
        seed=seed,
        data_digest="d" * 64,
        num_conversations=8,
        settings={"kind": "prefix_kv", "lr": 0.02},
        metrics={"brief": {"nll": 2.5}, "trained": {"nll": 1.5}},
        seconds=12.5,
    )
    return Draft(make_card(), MODEL, make_prompt(SHAPE, seed=seed), training)


def brief_draft(brief: str = "You answer questions about accounts.") -> Draft:
    return Draft(make_card(brief=brief), MODEL)


def promotion(version: int, domain: str = "banking", actor: str = "ann") -> PointerChange:
    return PointerChange(action="promote", domain=domain, fingerprint="f", version=version, actor=actor, reason="test")


def promote_in_turn(store: FolderStore, count: int) -> PointerTable:
    """So many promotions, of versions 1 and 2 in turn."""
    for epoch in range(1, count + 1):
        store.commit(promotion(epoch % 2 + 1), epoch)
    return store.pointer_table()


def folder_of(store: FolderStore, domain: str = "banking", number: int = 1) -> Path:
    return store._folder(domain, number)


def test_version_round_trip(store: FolderStore) -> None:
    draft = trained_draft()
    published = store.add_version(draft, "ann", "test")
    read = store.read_version("banking", 1)
    assert read == published
    assert read.card == draft.card
    assert read.manifest.training == draft.training
    assert draft.soft_prompt is not None
    assert store.read_soft_prompt(read, MODEL).digest == draft.soft_prompt.digest == read.digest
    assert store.domains() == ["banking"]
    assert read.name == "banking v1"


def test_version_of_a_brief_has_no_checkpoint(store: FolderStore) -> None:
    version = store.add_version(brief_draft(), "ann", "test")
    assert version.digest is None
    assert sorted(path.name for path in folder_of(store).iterdir()) == [CARD_FILE, MANIFEST_FILE]


def test_metric_that_is_not_a_number_can_be_read_back(store: FolderStore) -> None:
    draft = trained_draft()
    assert draft.training is not None
    metrics = {"brief": {"nll": float("inf"), "calibration": float("nan")}}
    store.add_version(replace(draft, training=draft.training.model_copy(update={"metrics": metrics})), "ann", "test")
    training = store.read_version("banking", 1).manifest.training
    assert training is not None
    assert str(training.metrics) == str(metrics)


def test_files_can_be_read_by_the_service_s_user(store: FolderStore) -> None:
    store.add_version(trained_draft(), "ann", "test")
    promote_in_turn(store, 64)  # at which the store also writes a table
    umask = os.umask(0)
    os.umask(umask)
    root = store._versions.parent
    files = [root / "store.json", folder_of(store) / MANIFEST_FILE, *store._changes.iterdir(), *store._tables.iterdir()]
    assert len(files) == 1 + 1 + 64 + 1
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_folder_without_a_manifest_is_no_version(store: FolderStore) -> None:
    store.add_version(brief_draft(), "ann", "test")
    (folder_of(store) / MANIFEST_FILE).unlink()
    assert store.versions("banking") == []
    assert store.domains() == []
    with pytest.raises(UnknownVersionError, match="banking has no version 1, nor any other; the bank has the domains: none"):
        store.read_version("banking", 1)
    assert store.add_version(brief_draft(), "ann", "test").manifest.version == 2  # its number stays unused


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
import prompt_bank.version
from prompt_bank.store import FolderStore
from tests.prompt_bank.test_store import brief_draft

# Stops where the manifest would be linked into place.
prompt_bank.version.os.link = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
FolderStore(Path(sys.argv[1])).add_version(brief_draft(), "ann", "test")
"""


def test_writer_killed_before_its_manifest_leaves_no_version(store: FolderStore, tmp_path: Path) -> None:
    died = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(tmp_path / "bank")], check=False, timeout=60)
    assert died.returncode == -9
    assert (folder_of(store) / CARD_FILE).is_file()
    assert store.versions("banking") == []
    assert store.add_version(brief_draft(), "ann", "test").manifest.version == 2
    assert store.versions("banking") == [2]


@pytest.mark.parametrize("stray", [".DS_Store", "1.bak", "notes.txt", "007"])
def test_what_others_leave_in_the_folders_is_passed_over(store: FolderStore, stray: str) -> None:
    store.add_version(brief_draft(), "ann", "test")
    shutil.copytree(folder_of(store), store._versions / "banking" / stray)
    (store._versions / stray).write_text("not ours")
    for folder in (store._changes, store._tables):
        (folder / f".{stray}").write_text("not ours")
    assert store.domains() == ["banking"]
    assert store.versions("banking") == [1]
    assert store.add_version(brief_draft(), "ann", "test").manifest.version == 2
    assert store.pointer_table() == FolderStore(store._versions.parent).pointer_table() == PointerTable()


@pytest.mark.parametrize("name", ["../versions/banking", "banking/../banking", "/etc", "", ".", "banking\n", "Banking"])
def test_name_that_is_no_domain_leads_nowhere(store: FolderStore, name: str) -> None:
    store.add_version(brief_draft(), "ann", "test")
    assert store.versions(name) == []
    with pytest.raises(UnknownVersionError):
        store.read_version(name, 1)


def test_two_threads_publishing_at_once_get_two_versions(store: FolderStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        published = list(pool.map(lambda seed: store.add_version(trained_draft(seed), "ann", "test"), range(16)))
    assert sorted(version.manifest.version for version in published) == list(range(1, 17))
    for version in published:
        assert store.read_version("banking", version.manifest.version).digest == version.digest


def publish_many(root: Path, author: str, count: int) -> list[tuple[int, str]]:
    store = FolderStore(root)
    versions = [store.add_version(brief_draft(f"{author} {n}"), "ann", "test") for n in range(count)]
    return [(version.manifest.version, version.card.brief) for version in versions]


def promote_many(root: Path, actor: str, count: int) -> int:
    """As `Bank.promote` does it: read, change, commit, and again on a conflict. Returns the number of conflicts."""
    store, num_conflicts = FolderStore(root), 0
    for number in range(1, count + 1):
        while True:
            try:
                store.commit(promotion(number, domain=actor, actor=actor), store.pointer_table().epoch + 1)
            except PointerConflictError:
                num_conflicts += 1
                continue
            break
    return num_conflicts


def test_two_processes_at_once_lose_nothing(store: FolderStore, tmp_path: Path) -> None:
    root = tmp_path / "bank"
    with spawn.Pool(2) as pool:
        publishing = [pool.apply_async(publish_many, (root, author, 20)) for author in ("ann", "bob")]
        published = [version for result in publishing for version in result.get(60)]
        promoting = [pool.apply_async(promote_many, (root, actor, 20)) for actor in ("ann", "bob")]
        for result in promoting:
            result.get(60)
    assert sorted(number for number, _ in published) == list(range(1, 41))
    assert all(store.read_version("banking", number).card.brief == brief for number, brief in published)

    assert sorted(path.name for path in store._changes.iterdir()) == [f"{epoch:012}.json" for epoch in range(1, 41)]
    for actor in ("ann", "bob"):
        changes = [change for change in store.changes() if change.actor == actor]
        assert [change.version for change in changes] == list(range(1, 21))
    assert store.pointer_table().epoch == 40
    assert store.pointer_table().live_versions("f") == {"ann": 20, "bob": 20}


def test_second_writer_of_an_epoch_is_refused(store: FolderStore) -> None:
    store.commit(promotion(1), 1)
    for epoch in (1, 3):
        with pytest.raises(PointerConflictError, match=f"the pointer table is at epoch 1, not {epoch - 1}; try again"):
            store.commit(promotion(2), epoch)
    assert store.pointer_table().live_versions("f") == {"banking": 1}
    assert len(list(store._changes.iterdir())) == 1


def test_writer_that_comes_between_another_s_read_and_write_is_first(store: FolderStore) -> None:
    other = FolderStore(store._versions.parent)

    class Slow(FolderStore):
        def pointer_table(self) -> PointerTable:
            table = super().pointer_table()
            other.commit(promotion(2), 1)
            return table

    with pytest.raises(PointerConflictError, match="pointer epoch 1 was taken by another writer; try again"):
        Slow(store._versions.parent).commit(promotion(1), 1)
    assert [change.version for change in store.changes()] == [2]


def test_change_that_is_not_allowed_is_not_written(store: FolderStore) -> None:
    store.commit(promotion(1), 1)
    with pytest.raises(VersionInUseError, match="banking v1 is the live version and cannot be deleted"):
        store.commit(promotion(1).model_copy(update={"action": "delete"}), 2)
    assert store.pointer_table().epoch == 1
    assert len(list(store._changes.iterdir())) == 1


def test_stores_on_one_folder_have_one_id_and_others_another(store: FolderStore, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {opened.id for opened in pool.map(FolderStore, [tmp_path / "new"] * 16)}
    assert len(ids) == 1
    assert {FolderStore(tmp_path / "new").id} == ids
    assert store.id not in ids


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_broken_store_id_is_refused_by_file(store: FolderStore, content: bytes) -> None:
    (store._versions.parent / "store.json").write_bytes(content)
    with pytest.raises(VersionCorruptError, match=r"store\.json.*restore it from a backup"):
        FolderStore(store._versions.parent)


def test_table_is_the_same_with_and_without_the_tables_written_in_between(store: FolderStore) -> None:
    table = promote_in_turn(store, 150)
    assert (table.epoch, len(list(store._changes.iterdir()))) == (150, 150)
    root = store._versions.parent
    assert [path.name for path in sorted(store._tables.iterdir())] == ["000000000064.json", "000000000128.json"]
    assert FolderStore(root).pointer_table() == table
    (store._tables / "000000000128.json").write_text("{")  # the one before it is taken
    assert FolderStore(root).pointer_table() == table
    shutil.rmtree(store._tables)
    assert FolderStore(root).pointer_table() == table
    assert [change.version for change in store.changes()] == [epoch % 2 + 1 for epoch in range(1, 151)]


def test_opening_a_store_folds_only_what_came_after_the_last_table(store: FolderStore) -> None:
    table = promote_in_turn(store, 70)
    for epoch in range(1, 65):
        (store._changes / f"{epoch:012}.json").write_text("not read again")
    reopened = FolderStore(store._versions.parent)
    assert reopened.pointer_table() == table
    with pytest.raises(VersionCorruptError, match=r"000000000001\.json.*restore it from a backup"):
        list(reopened.changes())


def test_table_from_after_a_restored_backup_is_not_taken(store: FolderStore) -> None:
    """The changes count: a folder of them that was set back to an older state takes the table back with it."""
    promote_in_turn(store, 64)
    for epoch in range(11, 65):
        (store._changes / f"{epoch:012}.json").unlink()
    assert FolderStore(store._versions.parent).pointer_table().epoch == 10


@pytest.mark.parametrize("gone", [1, 5, 66])
def test_missing_change_in_the_middle_is_refused_by_name(store: FolderStore, gone: int) -> None:
    promote_in_turn(store, 70 if gone > 64 else 8)
    (store._changes / f"{gone:012}.json").unlink()
    with pytest.raises(VersionCorruptError, match=rf"{gone:012}\.json is missing, but later changes are there; restore it"):
        FolderStore(store._versions.parent).pointer_table()


def test_deleted_version_is_gone_and_its_number_stays_taken(store: FolderStore) -> None:
    for _ in range(2):
        store.add_version(trained_draft(), "ann", "test")
    (folder_of(store, number=2) / "notes").mkdir()
    (folder_of(store, number=2) / "notes" / "file").write_text("left by someone")
    for _ in range(2):  # again is no error
        store.delete_version("banking", 2)
    assert store.versions("banking") == [1]
    assert list(folder_of(store, number=2).iterdir()) == []
    assert FolderStore(store._versions.parent).add_version(brief_draft(), "ann", "test").manifest.version == 3


def test_deleting_follows_no_link_out_of_the_store(store: FolderStore, tmp_path: Path) -> None:
    store.add_version(brief_draft(), "ann", "test")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("not ours")
    (folder_of(store) / "link").symlink_to(outside)
    store.delete_version("banking", 1)
    store.delete_version("../outside", 1)
    store.delete_version("banking", 9)
    assert (outside / "file").read_text() == "not ours"
    assert list(folder_of(store).iterdir()) == []


def test_actor_and_reason_are_recorded(store: FolderStore) -> None:
    store.add_version(replace(trained_draft(), parent=7), "ann", "a better brief")
    manifest = store.read_version("banking", 1).manifest
    assert (manifest.actor, manifest.reason, manifest.parent) == ("ann", "a better brief", 7)


def test_exclusive_creation_leaves_nothing_beside(tmp_path: Path) -> None:
    create_exclusively(tmp_path / "a", "one")
    with pytest.raises(FileExistsError):
        create_exclusively(tmp_path / "a", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "one"


def test_edited_card_is_refused(store: FolderStore) -> None:
    store.add_version(trained_draft(), "ann", "test")
    path = folder_of(store) / CARD_FILE
    path.write_text(path.read_text().replace("accounts", "loans"))
    with pytest.raises(VersionCorruptError, match="was changed after it was published"):
        store.read_version("banking", 1)


@pytest.mark.parametrize("content", [b"", b"name = ", b"\xff"])
def test_broken_card_is_refused(store: FolderStore, content: bytes) -> None:
    store.add_version(trained_draft(), "ann", "test")
    (folder_of(store) / CARD_FILE).write_bytes(content)
    with pytest.raises(VersionCorruptError, match="publish it again"):
        store.read_version("banking", 1)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"version": 1}'])
def test_broken_manifest_is_refused(store: FolderStore, content: bytes) -> None:
    store.add_version(trained_draft(), "ann", "test")
    (folder_of(store) / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(VersionCorruptError):
        store.read_version("banking", 1)


@pytest.mark.parametrize("field", ["domain", "version"])
def test_version_moved_to_another_place_is_refused(store: FolderStore, field: str) -> None:
    store.add_version(trained_draft(), "ann", "test")
    domain, number = ("banking", 2) if field == "version" else ("loans", 1)
    shutil.copytree(folder_of(store), folder_of(store, domain, number))
    with pytest.raises(VersionCorruptError, match="holds banking v1"):
        store.read_version(domain, number)


def test_altered_soft_prompt_is_refused(store: FolderStore) -> None:
    version = store.add_version(trained_draft(), "ann", "test")
    path = folder_of(store) / WEIGHTS_FILE
    tensors = load_file(path)
    tensors["prompt_embeddings"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(VersionCorruptError, match="the soft prompt of banking v1 has digest"):
        store.read_soft_prompt(version, MODEL)


def test_exchanged_soft_prompt_is_refused(store: FolderStore) -> None:
    """A good prompt of this very model, but not the one that was published."""
    version, other = store.add_version(trained_draft(0), "ann", "test"), store.add_version(trained_draft(1), "ann", "test")
    shutil.copy(folder_of(store, number=other.manifest.version) / WEIGHTS_FILE, folder_of(store) / WEIGHTS_FILE)
    with pytest.raises(VersionCorruptError):
        store.read_soft_prompt(version, MODEL)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_missing_or_truncated_checkpoint_is_refused(store: FolderStore, name: str) -> None:
    version = store.add_version(trained_draft(), "ann", "test")
    path = folder_of(store) / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SoftPromptError, match=name):
        store.read_soft_prompt(version, MODEL)
    path.unlink()
    with pytest.raises(SoftPromptError, match=name):
        store.read_soft_prompt(version, MODEL)


def test_prompt_of_another_base_model_is_refused_by_name(store: FolderStore) -> None:
    version = store.add_version(trained_draft(), "ann", "test")
    other = replace(MODEL, name="smollm2", fingerprint="e" * 64)
    with pytest.raises(
        BaseModelMismatchError, match=r"banking v1 was made for base model tiny \(f{12}\), .* smollm2 \(e{12}\)"
    ):
        store.read_soft_prompt(version, other)


def test_prompt_of_another_chat_format_is_refused_by_name(store: FolderStore) -> None:
    version = store.add_version(trained_draft(), "ann", "test")
    with pytest.raises(ChatFormatMismatchError, match=r"banking v1 was made for chat format c{12}, this service uses a{12}"):
        store.read_soft_prompt(version, replace(MODEL, chat_format="a" * 64))


def test_manifest_that_lies_about_the_base_model_is_refused_by_the_shape(store: FolderStore) -> None:
    version = store.add_version(trained_draft(), "ann", "test")
    with pytest.raises(SoftPromptError, match="num_layers 2, this base model has 3; it was trained for another model"):
        store.read_soft_prompt(version, replace(MODEL, shape=replace(SHAPE, num_layers=3)))


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"action": "promoted"}'])
def test_broken_change_is_refused_by_file(store: FolderStore, content: bytes) -> None:
    promote_in_turn(store, 2)
    (store._changes / "000000000001.json").write_bytes(content)
    store = FolderStore(store._versions.parent)
    with pytest.raises(VersionCorruptError, match=r"000000000001\.json.*restore it from a backup"):
        store.pointer_table()


def test_manifest_is_plain_json(store: FolderStore) -> None:
    store.add_version(trained_draft(), "ann", "test")
    manifest = json.loads((folder_of(store) / MANIFEST_FILE).read_text())
    assert manifest["soft_prompt"] == {
        "kind": "prefix_kv",
        "digest": make_prompt(SHAPE).digest,
        "num_virtual_tokens": 4,
        "num_bytes": 2 * 2 * 2 * 4 * 4 * 4,
    }
    assert read_version(folder_of(store)).manifest.base_model.name == "tiny"
    assert torch.equal(
        load_file(folder_of(store) / WEIGHTS_FILE)["prompt_embeddings"][0, :4], make_prompt(SHAPE).tensor[0, 0, 0, 0]
    )
