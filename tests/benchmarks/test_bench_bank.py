"""The benchmark of the bank runs: its figures are for people, its running is for us."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_quick_benchmark_measures_everything(models_dir: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.bench_bank", "--quick"]
    environment = os.environ | {"COLUMNS": "160"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for row in (
        "brief only",
        "pointer read over TCP on loopback",
        "pointer read while a change is pending",
        "promotes a second",
        "the router's vectors and weights",
        "publish() called to first chunk received",
    ):
        assert row in done.stdout
