"""Publishers that are killed at every step, and publishers at once: a bank never shows anything half done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prompt_bank.store import FolderStore
from tests.prompt_bank.killed_publisher import CHANGES, DOMAIN, half_published, make_bank


@pytest.fixture(scope="module")
def found(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process of killed publishers found; see its module."""
    command = [sys.executable, "-m", "tests.prompt_bank.killed_publisher", str(tmp_path_factory.mktemp("killed")), valkey_url]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], check=True, timeout=300)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("name", CHANGES)
def test_killed_at_any_step_a_change_is_made_or_not_and_others_go_on(found: dict[str, Any], name: str) -> None:
    killed = found["killed"][name]
    assert killed["problems"] == []
    assert killed["last"] == "changed"
    assert killed["num_states"] >= 5  # a change writes at least one file by way of another, and Redis
    expected = {"nothing", "published", "changed"} if name in ("first", "publish") else {"unchanged", "changed"}
    assert set(killed["seen"]) == expected
    assert min(killed["seen"].values()) >= 3


def test_publishers_at_once_get_versions_and_epochs_of_their_own(found: dict[str, Any]) -> None:
    at_once = found["at_once"]
    given = at_once["given"]
    assert at_once["statuses"] == [0] * 6
    assert sorted(each["version"] for each in given) == [4, 5, 6, 7, 8, 9]
    assert len({each["digest"] for each in given}) == 6
    assert at_once["versions"] == list(range(1, 10))
    assert at_once["half_published"] == []
    assert sorted(each["epoch"] for each in given) == [2, 3, 4, 5, 6, 7]
    by_epoch = {each["epoch"]: (seed, each["version"]) for seed, each in enumerate(given)}
    recorded = [["promote", version, f"publisher {seed}"] for _, (seed, version) in sorted(by_epoch.items())]
    assert at_once["changes"][1:] == recorded
    assert at_once["live"] == by_epoch[7][1]
    assert at_once["redis_epoch"] == 7


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "card.toml", "manifest.json"])
def test_the_check_finds_a_version_that_is_cut_short(tmp_path: Path, file: str) -> None:
    make_bank(tmp_path, num_changes=1)
    store = FolderStore(tmp_path / "bank")
    assert half_published(store, DOMAIN) == []
    path = tmp_path / "bank" / "versions" / DOMAIN / "2" / file
    path.write_bytes(path.read_bytes()[:-20])
    assert [problem.split(":")[0] for problem in half_published(store, DOMAIN)] == ["v2"]
