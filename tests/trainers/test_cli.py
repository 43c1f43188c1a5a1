"""The training commands, end to end, on the real model, a real store and a real Valkey."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from prompt_bank.errors import ConversationFileError, TrainingError, UnknownDomainError
from prompt_bank.settings import BankSettings
from prompt_bank.store import FolderStore
from tests.trainers.conftest import SPOKEN, write_jsonl
from trainers.cli import register


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> typer.Typer:
    monkeypatch.setenv("FRONTDESK_REDIS_URL", redis_url)
    app = typer.Typer()
    register(app)
    return app


def invoke(app: typer.Typer, *arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def store() -> FolderStore:
    return FolderStore(BankSettings.load().data_dir / "bank")


def live_number(domain: str) -> int:
    (pointers,) = store().pointer_table().record(domain).by_model.values()
    assert pointers.live is not None
    return pointers.live


# PEFT 0.21 asks transformers for a name it has deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_train_publishes_and_promotes_a_version_with_its_record(app: typer.Typer, tmp_path: Path, smollm2_dir: Path) -> None:
    data, test = write_jsonl(tmp_path / "data.jsonl", SPOKEN[:3]), write_jsonl(tmp_path / "test.jsonl", SPOKEN[3:5])
    output = invoke(app, "train", "banking", "--data", data, "--test", test, "--epochs", 1, "--virtual-tokens", 16, "--seed", 7)
    assert output.strip().endswith("banking v2 is live")
    assert all(setup in output for setup in ("frozen", "brief", "trained"))

    version = store().read_version("banking", live_number("banking"))
    manifest = version.manifest
    assert (manifest.version, manifest.parent) == (2, 1)
    assert manifest.soft_prompt is not None
    assert (manifest.soft_prompt.kind, manifest.soft_prompt.num_virtual_tokens) == ("prefix_kv", 16)
    record = manifest.training
    assert record is not None
    assert (record.seed, record.num_conversations, len(record.data_digest)) == (7, 2, 64)
    assert {setup: set(figures) for setup, figures in record.metrics.items()} == {
        setup: {"loss", "accuracy"} for setup in ("frozen", "brief", "trained")
    }
    assert record.settings["learning_rate"] == 0.02
    assert (record.settings["num_steps"], record.settings["held_out"], record.settings["num_held_out"]) == (1, "test", 2)
    assert store().pointer_table().change.reason == "trained on 2 conversations"  # type: ignore[union-attr]
    assert_peft_loads(store()._folder("banking", 2), smollm2_dir)


def assert_peft_loads(folder: Path, model_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), folder)
    assert loaded.active_peft_config.num_virtual_tokens == 16


def test_no_promote_leaves_the_live_version_alone(app: typer.Typer, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", SPOKEN[:2])
    options = ["--kind", "embeds", "--init", "random", "--virtual-tokens", 4, "--epochs", 1]
    output = invoke(app, "train", "healthcare", "--data", data, "--no-promote", *options)
    assert "healthcare v2 is published; make it live: frontdesk bank promote healthcare 2" in output
    assert store().versions("healthcare") == [1, 2]
    assert live_number("healthcare") == 1


def test_nothing_is_published_when_the_loss_is_no_number(app: typer.Typer, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", SPOKEN)
    with pytest.raises(TrainingError, match="nothing was published"):
        invoke(app, "train", "banking", "--data", data, "--learning-rate", 3e37, "--batch-size", 1, "--epochs", 1)
    assert store().versions("banking") == [1]


def test_an_unknown_domain_is_named_with_those_there_are(app: typer.Typer, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", SPOKEN)
    with pytest.raises(UnknownDomainError, match="there are: banking, healthcare, translation"):
        invoke(app, "train", "gardening", "--data", data)
    with pytest.raises(UnknownDomainError, match="there are: banking, healthcare, translation"):
        invoke(app, "train-starters", "../banking")


def test_a_missing_file_is_named(app: typer.Typer, tmp_path: Path) -> None:
    with pytest.raises(ConversationFileError, match=r"nowhere\.jsonl: cannot be read"):
        invoke(app, "train", "banking", "--data", tmp_path / "nowhere.jsonl")


def test_help_names_every_option_and_default(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    for text in ("--data", "--validation", "--test", "--kind", "prefix_kv", "--no-promote", "--max-minutes", "default: 32"):
        assert text in result.output
