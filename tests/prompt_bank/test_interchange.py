"""Export and import: from one installation to another, from PEFT and from the hub; what does not fit is refused by name."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from prompt_bank.archive import write_archive, write_folder
from prompt_bank.base_model import BaseModel
from prompt_bank.errors import (
    ArchiveError,
    BaseModelMismatchError,
    ChatFormatMismatchError,
    FrontdeskError,
    HubError,
    SoftPromptError,
)
from prompt_bank.importing import read_import
from prompt_bank.manifest import TrainingRecord
from prompt_bank.peft_format import CONFIG_FILE, WEIGHTS_FILE, write_peft
from prompt_bank.settings import BankSettings
from prompt_bank.soft_prompt import KINDS, Kind, SoftPrompt
from prompt_bank.store import FolderStore
from prompt_bank.version import CARD_FILE, MANIFEST_FILE, Draft, ServedModel, Version
from tests.conftest import random_llama
from tests.prompt_bank.conftest import make_card, make_prompt
from tests.prompt_bank.hub import COMMIT, OLD_COMMIT, Hub, serve_hub
from tests.prompt_bank.test_commands import Done, Run, fails_in_one_line, run

__all__ = ["run"]

TRAINING = TrainingRecord(
    seed=7, data_digest="d" * 64, num_conversations=12, settings={"steps": 30}, metrics={"trained": {"nll": 1.25}}, seconds=61.0
)


def publish(store: FolderStore, model: ServedModel, kind: Kind | None = "prefix_kv", domain: str = "banking") -> Version:
    prompt = make_prompt(model.shape, kind) if kind else None
    return store.add_version(Draft(make_card(domain), model, prompt, TRAINING if kind else None), "tester", "a test")


def exported(store: FolderStore, model: ServedModel, target: Path, kind: Kind | None = "prefix_kv") -> Path:
    write = write_archive if target.suffix == ".zip" else write_folder
    write(store.read_files(publish(store, model, kind)), target)
    return target


@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("name", ["version.zip", "version"])
def test_an_exported_version_comes_back_whole(
    store: FolderStore, tiny_served: ServedModel, tmp_path: Path, kind: Kind | None, name: str
) -> None:
    source = exported(store, tiny_served, tmp_path / name, kind)
    read = read_import(str(source), tiny_served)
    assert read.card == make_card()
    told = TRAINING.model_copy(update={"imported_from": f"banking v1 in {source}"})
    assert read.training == (told if kind else None)
    assert read.origin == f"banking v1 in {source}"
    assert (read.prompt and read.prompt.digest) == (make_prompt(tiny_served.shape, kind).digest if kind else None)


@pytest.mark.parametrize("drift", [[], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3], [0.1] * 5])
def test_a_drift_that_is_not_one_number_for_each_virtual_token_is_refused(
    store: FolderStore, tiny_served: ServedModel, tmp_path: Path, drift: list[float]
) -> None:
    source = exported(store, tiny_served, tmp_path / "version")
    manifest = json.loads((source / MANIFEST_FILE).read_text())
    manifest["training"]["drift"] = drift
    (source / MANIFEST_FILE).write_text(json.dumps(manifest))
    if len(drift) in (0, 4):
        assert read_import(str(source), tiny_served).training is not None
        return
    with pytest.raises(ArchiveError, match=rf"has the drift of {len(drift)} virtual tokens, there are 4"):
        read_import(str(source), tiny_served)


@pytest.mark.parametrize("name", ["version.zip", "version"])
def test_a_version_of_another_model_or_chat_format_is_refused(
    store: FolderStore, tiny_served: ServedModel, tmp_path: Path, name: str
) -> None:
    source = str(exported(store, tiny_served, tmp_path / name))
    with pytest.raises(BaseModelMismatchError, match="was made for base model random-llama-0"):
        read_import(source, replace(tiny_served, fingerprint="0" * 64))
    with pytest.raises(ChatFormatMismatchError, match="was made for chat format"):
        read_import(source, replace(tiny_served, chat_format="0" * 64))


def test_a_version_without_a_prompt_moves_to_any_model(store: FolderStore, tiny_served: ServedModel, tmp_path: Path) -> None:
    source = exported(store, tiny_served, tmp_path / "brief.zip", None)
    assert read_import(str(source), replace(tiny_served, fingerprint="0" * 64)).card == make_card()


def other_weights(folder: Path, model: ServedModel) -> None:
    write_peft(make_prompt(model.shape, seed=9), folder, model.shape, model.name)


def change_manifest(folder: Path, **fields: object) -> None:
    path = folder / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def append(name: str, text: str) -> Callable[[Path, ServedModel], None]:
    def change(folder: Path, model: ServedModel) -> None:
        (folder / name).write_text((folder / name).read_text() + text)

    return change


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (other_weights, ArchiveError, r"has digest \w{12}, its manifest says \w{12}; export it again"),
        (append(CARD_FILE, "# edited\n"), ArchiveError, "was changed after it was published"),
        (append(CARD_FILE, "x = ["), ArchiveError, "not valid TOML"),
        (append(MANIFEST_FILE, "}"), ArchiveError, "Invalid JSON"),
        (lambda folder, _: (folder / WEIGHTS_FILE).unlink(), SoftPromptError, "safetensors cannot be read"),
        (lambda folder, _: (folder / CARD_FILE).unlink(), ArchiveError, "cannot be read"),
        (lambda folder, _: change_manifest(folder, domain="loans"), ArchiveError, "was changed after"),
        (lambda folder, _: change_manifest(folder, soft_prompt=None), ArchiveError, "its manifest does not name"),
        (
            lambda folder, _: change_manifest(folder, **{"\x1b[31m" + "x" * 5000: 1}),
            ArchiveError,
            r"manifest.json: \\x1b\[31mx",
        ),
    ],
)
def test_a_spoiled_version_is_refused_with_its_own_name(
    store: FolderStore,
    tiny_served: ServedModel,
    tmp_path: Path,
    change: Callable[[Path, ServedModel], None],
    error: type[FrontdeskError],
    problem: str,
) -> None:
    source = exported(store, tiny_served, tmp_path / "version")
    change(source, tiny_served)
    with pytest.raises(error, match=problem) as refused:
        read_import(str(source), tiny_served)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) <= 1000
    assert "frontdesk-" not in str(refused.value), "the name of our scratch folder says nothing to anybody"


def test_a_peft_folder_has_no_manifest(tiny_served: ServedModel, tmp_path: Path) -> None:
    prompt = make_prompt(tiny_served.shape, "embeds")
    write_peft(prompt, tmp_path, tiny_served.shape, "tiny")
    read = read_import(str(tmp_path), tiny_served)
    assert read.prompt is not None
    assert (read.prompt.digest, read.card, read.training) == (prompt.digest, None, None)
    assert read.origin == f"PEFT folder {tmp_path}"
    with pytest.raises(SoftPromptError, match="has no tasks"):
        read_import(str(tmp_path), tiny_served, 0)


def test_an_exported_version_has_no_tasks(store: FolderStore, tiny_served: ServedModel, tmp_path: Path) -> None:
    source = exported(store, tiny_served, tmp_path / "version.zip")
    with pytest.raises(SoftPromptError, match="is an exported version, which has no tasks"):
        read_import(str(source), tiny_served, 0)


def test_nothing_is_left_in_the_temporary_folder(
    store: FolderStore, tiny_served: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = exported(store, tiny_served, tmp_path / "version")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    read_import(str(source), tiny_served)
    (source / CARD_FILE).write_text("spoiled")
    with pytest.raises(ArchiveError):
        read_import(str(source), tiny_served)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.fixture
def hub(tiny_served: ServedModel, tmp_path: Path) -> Iterator[Hub]:
    """acme/banking-prompt: a prefix of seed 1 on main, of seed 2 at v1."""
    with serve_hub() as hub:
        for commit, seed in ((COMMIT, 1), (OLD_COMMIT, 2)):
            folder = tmp_path / commit
            folder.mkdir()
            write_peft(make_prompt(tiny_served.shape, seed=seed), folder, tiny_served.shape, "tiny")
            hub.files |= {(commit, path.name): path.read_bytes() for path in folder.iterdir()}
            hub.files[commit, "adapter_model.bin"] = b"never asked for"
        yield hub


@pytest.mark.parametrize(
    ("revision", "commit", "seed"), [("", COMMIT, 1), ("@v1", OLD_COMMIT, 2), (f"@{OLD_COMMIT}", OLD_COMMIT, 2)]
)
def test_a_prompt_comes_from_the_hub(hub: Hub, tiny_served: ServedModel, revision: str, commit: str, seed: int) -> None:
    source = f"acme/banking-prompt{revision}"
    read = read_import(source, tiny_served, hub_endpoint=hub.url)
    assert read.prompt is not None
    assert read.prompt.digest == make_prompt(tiny_served.shape, seed=seed).digest
    assert read.origin == f"hub {source}, commit {commit}"
    assert {path.rsplit("/")[-1] for _, path in hub.requests} == {CONFIG_FILE, WEIGHTS_FILE}
    assert all(commit in path for method, path in hub.requests if method == "GET"), "a push in between must not mix two commits"


def test_a_huge_file_on_the_hub_is_not_downloaded(hub: Hub, tiny_served: ServedModel) -> None:
    hub.declared_bytes = 10**12
    with pytest.raises(HubError, match=r"adapter_config.json of acme/banking-prompt has 1000000000000 bytes, \d+ are the most"):
        read_import("acme/banking-prompt", tiny_served, hub_endpoint=hub.url)
    assert [method for method, _ in hub.requests] == ["HEAD"]


def test_a_hub_that_sends_more_than_it_declared_is_refused(hub: Hub, tiny_served: ServedModel) -> None:
    hub.declared_bytes = 10
    with pytest.raises(HubError, match="the hub did not give it: "):
        read_import("acme/banking-prompt", tiny_served, hub_endpoint=hub.url)


def test_a_prompt_for_another_model_is_refused_also_from_the_hub(hub: Hub, tiny_served: ServedModel) -> None:
    other = replace(tiny_served, shape=replace(tiny_served.shape, num_layers=3))
    with pytest.raises(SoftPromptError, match=r"^acme/banking-prompt/adapter_config.json has num_layers 2"):
        read_import("acme/banking-prompt", other, hub_endpoint=hub.url)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("acme/nothing", "the hub did not give it: .*; where no hub can be reached, download its adapter_config.json"),
        ("acme/banking-prompt@v9", "the hub did not give it: "),
        ("acme/..", "the hub did not give it: "),
        ("../acme", "the hub did not give it: "),
        ("no such thing", "'no such thing' is no file or folder here, and no hub id such as owner/name"),
        ("a/b/c", "is no file or folder here, and no hub id"),
        ("~nobody-here/prompt", "is no file or folder here, and no hub id"),
        ("a" * 800, "is no file or folder here, and no hub id"),
        ("a" * 300 + "/b", "the hub did not give it: "),
        ("acme/ban\0king", "is no file or folder here, and no hub id"),
        ("acme/banking-prompt@", "is no file or folder here, and no hub id"),
        ("http://127.0.0.1/acme/x", "is no file or folder here, and no hub id"),
    ],
)
def test_what_the_hub_has_not_is_told(hub: Hub, tiny_served: ServedModel, source: str, problem: str) -> None:
    with pytest.raises(HubError, match=problem):
        read_import(source, tiny_served, hub_endpoint=hub.url)


def test_a_repository_of_pickles_is_told(hub: Hub, tiny_served: ServedModel) -> None:
    del hub.files[COMMIT, WEIGHTS_FILE]
    with pytest.raises(HubError, match="the hub did not give it: "):
        read_import("acme/banking-prompt", tiny_served, hub_endpoint=hub.url)
    assert not [path for _, path in hub.requests if path.endswith(".bin")]


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_fails_is_told(hub: Hub, tiny_served: ServedModel, status: int) -> None:
    hub.status = status
    with pytest.raises(HubError, match="the hub did not give it: "):
        read_import("acme/banking-prompt", tiny_served, hub_endpoint=hub.url)


@pytest.fixture
def installation(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> FolderStore:
    """The empty store of an installation whose base model is the tiny one."""
    folder = tmp_path / "model"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    capsys.readouterr()
    monkeypatch.setenv("FRONTDESK_BASE_MODEL", str(folder))
    monkeypatch.setenv("FRONTDESK_DEVICE", "cpu")
    return FolderStore(BankSettings.load().data_dir / "bank")


def test_a_version_moves_to_another_installation(
    run: Run, installation: FolderStore, tiny_served: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(installation, tiny_served, None)
    digest = str(publish(installation, tiny_served).digest)
    run("bank", "promote", "banking", "1")
    archive = tmp_path / "banking.zip"
    done = run("bank", "export", "banking", "2", "--output", str(archive))
    assert (done.status, done.out) == (0, f"banking v2 is in {archive}\n")
    monkeypatch.setenv("FRONTDESK_DATA_DIR", str(tmp_path / "other"))
    done = run("bank", "import", str(archive), "--domain", "accounts", "--reason", "from the other one")
    assert done.status == 0
    assert done.out == (
        f"accounts v1: prefix_kv, 4 virtual tokens, digest {digest[:12]}, from banking v2 in {archive}\n"
        "it answers nobody yet; make it live: frontdesk bank promote accounts 1\n"
    )
    other = FolderStore(tmp_path / "other" / "bank")
    version = other.read_version("accounts", 1)
    told = TRAINING.model_copy(update={"imported_from": f"banking v2 in {archive}"})
    assert (version.digest, version.manifest.training, version.manifest.reason) == (digest, told, "from the other one")
    assert "by its own word, which nobody here has checked" in run("bank", "show", "accounts").out
    assert version.card == make_card().model_copy(update={"name": "accounts"})
    assert other.pointer_table().record("accounts").by_model == {}
    assert run("bank", "promote", "accounts", "1").out.startswith("accounts v1 is live on ")


def test_an_import_takes_the_card_of_the_live_version_and_may_be_live_at_once(
    run: Run, installation: FolderStore, tiny_served: ServedModel, tmp_path: Path
) -> None:
    publish(installation, tiny_served, None)
    run("bank", "promote", "banking", "1")
    prompt = make_prompt(tiny_served.shape, "embeds")
    (tmp_path / "peft").mkdir()
    write_peft(prompt, tmp_path / "peft", tiny_served.shape, "tiny")
    done = run("bank", "import", str(tmp_path / "peft"), "--domain", "banking", "--promote")
    assert done.out.splitlines()[-1] == "banking v2 is live"
    version = installation.read_version("banking", 2)
    assert (version.digest, version.card, version.manifest.parent) == (prompt.digest, make_card(), 1)
    assert version.manifest.reason == f"imported from PEFT folder {tmp_path / 'peft'}"
    assert installation.pointer_table().pointers("banking", tiny_served.fingerprint).live == 2
    # The live one is exported when no version is named.
    run("bank", "promote", "banking", "1")
    done = run("bank", "export", "banking", "--output", str(tmp_path / "out"))
    assert done.out == f"banking v1 is in {tmp_path / 'out'}\nit answers from its brief: there is no soft prompt in it\n"


def test_a_new_domain_needs_a_card(run: Run, installation: FolderStore, tiny_served: ServedModel, tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    write_peft(make_prompt(tiny_served.shape), tmp_path / "peft", tiny_served.shape, "tiny")
    words = ("bank", "import", str(tmp_path / "peft"), "--domain", "travel")
    assert fails_in_one_line(run(*words), "travel is not live here and there is no card in the import; give one with --card")
    assert installation.domains() == []
    card = tmp_path / "travel.toml"
    card.write_text(make_card("travel").to_toml())
    assert run(*words, "--card", str(card)).out.startswith("travel v1: prefix_kv, 4 virtual tokens, digest ")
    card.write_text(make_card("loans").to_toml())
    assert fails_in_one_line(run(*words, "--card", str(card)), "is the card of loans, not of travel")


@pytest.mark.parametrize("domain", ["auto", "../banking", "Banking", ""])
def test_a_bad_name_is_refused_before_a_model_is_loaded(run: Run, domain: str) -> None:
    done: Done = run("bank", "import", "acme/x", "--domain", domain)
    assert done.status == 2
    assert "cannot be a domain's name" in done.err


def test_export_of_what_is_not_there_is_told(
    run: Run, installation: FolderStore, tiny_served: ServedModel, tmp_path: Path
) -> None:
    output = ("--output", str(tmp_path / "out"))
    assert fails_in_one_line(
        run("bank", "export", "travel", *output), "travel has no live version", "number of a version: none"
    )
    publish(installation, tiny_served)
    assert fails_in_one_line(run("bank", "export", "banking", *output), "banking has no live version", "number of a version: 1")
    assert fails_in_one_line(run("bank", "export", "banking", "7", *output), "banking has no version 7; it has: 1")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_exported_folder_is_loaded_by_peft(
    run: Run, installation: FolderStore, tiny_served: ServedModel, smollm2_dir: Path, tmp_path: Path
) -> None:
    prompt = make_prompt(tiny_served.shape)
    publish(installation, tiny_served)
    assert run("bank", "export", "banking", "v1", "-o", str(tmp_path / "peft")).status == 0
    model = PeftModel.from_pretrained(random_llama(smollm2_dir).model, tmp_path / "peft")
    with torch.no_grad():
        keys = model.get_prompt(1).layers[0].keys[0]
    assert torch.equal(keys, prompt.tensor[0, 0])
    assert not torch.equal(keys, SoftPrompt("prefix_kv", prompt.tensor).tensor[0, 1])


def import_from(endpoint: str, installation: FolderStore, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("frontdesk")), "bank", "import", *words]
    environment = os.environ | {"HF_ENDPOINT": endpoint, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


def test_import_from_the_hub_as_it_is_installed(
    hub: Hub, installation: FolderStore, tiny_served: ServedModel, tmp_path: Path
) -> None:
    """`HF_ENDPOINT` is read when the hub's library is imported, so a process of its own."""
    card = tmp_path / "card.toml"
    card.write_text(make_card().to_toml())
    done = import_from(hub.url, installation, "acme/banking-prompt@v1", "--domain", "banking", "--card", str(card), "--promote")
    assert done.returncode == 0, done.stderr
    digest = make_prompt(tiny_served.shape, seed=2).digest[:12]
    assert done.stdout == (
        f"banking v1: prefix_kv, 4 virtual tokens, digest {digest}, from hub acme/banking-prompt@v1, commit {OLD_COMMIT}\n"
        "banking v1 is live\n"
    )


def test_no_hub_is_told_with_what_to_do(installation: FolderStore) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    done = import_from(f"http://127.0.0.1:{port}", installation, "acme/banking-prompt", "--domain", "banking")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "the hub did not give it" in done.stderr
    assert "where no hub can be reached, download its adapter_config.json and adapter_model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_card_of_an_archive_that_is_a_link_is_not_followed(
    store: FolderStore, tiny_served: ServedModel, tmp_path: Path
) -> None:
    source = exported(store, tiny_served, tmp_path / "version")
    shutil.move(source / CARD_FILE, tmp_path / "card.toml")
    (source / CARD_FILE).symlink_to(tmp_path / "card.toml")
    with pytest.raises(ArchiveError, match=r"card.toml cannot be read: .* no link"):
        read_import(str(source), tiny_served)
