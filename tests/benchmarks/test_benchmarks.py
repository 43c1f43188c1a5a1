"""Whether the benchmarks of the service run; how fast it is, they tell only on a machine that does nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench_server", "bench_log"])
def test_a_quick_run_measures_everything(name: str, tmp_path: Path, models_dir: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", "--quick", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(figures.read_text(encoding="utf-8"))
    assert {"sqlite", "postgresql"} <= set(measured)
    if name == "bench_server":
        rows = [*measured["sqlite"], *measured["postgresql"]]
        assert sum(row["failed"] for row in rows) == 0
        assert measured["saturation"]["refused"] == measured["saturation"]["refused_with_retry_after"] > 0
