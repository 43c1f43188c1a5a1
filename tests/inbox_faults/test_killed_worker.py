"""A worker that is killed at any step of a turn: another process goes on, and nothing is lost, doubled or out of order."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.inbox_faults.killed_worker import STATES


def run(every: int, folder: Path, redis_url: str, model_dir: Path, models_dir: Path) -> dict[str, Any]:
    """What the process of killed workers found; see its module."""
    command = [sys.executable, "-m", "tests.inbox_faults.killed_worker", str(folder), redis_url]
    command += [str(model_dir), str(models_dir), str(every)]
    done = subprocess.run(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], check=True, timeout=900)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("every", [200, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_any_step_another_process_goes_on(
    every: int, tmp_path: Path, redis_url: str, tiny_model_dir: Path, models_dir: Path
) -> None:
    found = run(every, tmp_path, redis_url, tiny_model_dir, models_dir)
    assert found["problems"] == []
    assert set(found["seen"]) == set(STATES)
