"""Running services for tests: the whole of `frontdesk serve` as a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import OpenAI

_START_TIMEOUT_S = 120  # a service beside a training needs a while
_STOP_TIMEOUT_S = 60


@dataclass(frozen=True)
class RunningService:
    url: str
    data_dir: Path
    process: "subprocess.Popen[bytes]"
    log_file: Path

    @property
    def openai(self) -> OpenAI:
        """The official client, unchanged but for its retries, which would hide a refusal."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def stop(self) -> int:
        """Sends SIGTERM and gives the exit status."""
        self.process.terminate()
        return self.process.wait(_STOP_TIMEOUT_S)


def environment(models_dir: Path, data_dir: Path, settings: Mapping[str, str]) -> dict[str, str]:
    given = {"FRONTDESK_MODELS_DIR": str(models_dir), "FRONTDESK_DATA_DIR": str(data_dir), **settings}
    return {**{name: value for name, value in os.environ.items() if not name.startswith("FRONTDESK_")}, **given}


@contextmanager
def starting_service(
    models_dir: Path, data_dir: Path, settings: Mapping[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """`frontdesk serve` on a free port, perhaps not ready yet, and the file of its stderr.

    Killed at the end if it still runs.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    log_file = data_dir / "stderr.log"
    with log_file.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "prompt_bank.command_line", "serve", "--port", "0"],
            env=environment(models_dir, data_dir, settings),
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
        )
    try:
        yield process, log_file
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def running_service(models_dir: Path, data_dir: Path, **settings: str) -> Iterator[RunningService]:
    """A service that is ready; ended with SIGTERM, and its exit status checked, unless the test has ended it already."""
    with starting_service(models_dir, data_dir, settings) as (process, log_file):
        service = RunningService(_wait_until_ready(process, log_file), data_dir, process, log_file)
        yield service
        if process.poll() is None:
            assert service.stop() == 0, log_file.read_text()


def _wait_until_ready(process: "subprocess.Popen[bytes]", log_file: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        for line in log_file.read_text().splitlines():
            if "frontdesk ready in" in line:
                return line.split()[-1]
        time.sleep(0.05)
    raise AssertionError(f"the service did not become ready:\n{log_file.read_text()}")
