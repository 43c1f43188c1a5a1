"""The README tells the truth: its tables are those of the code, and every command in it runs."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bot.settings import Settings
from tests import readme

ROOT = readme.README.parent
TEXT = readme.README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
_TIMEOUT_S = 600


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> dict[str, str]:
    """An operator's shell: `frontdesk` and `python` of this environment on the path, data in a folder of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FRONTDESK_")}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FRONTDESK_DATA_DIR": str(tmp_path_factory.mktemp("data")),
        "FRONTDESK_MODELS_DIR": str(models_dir),
    }


@pytest.fixture(scope="module")
def service_url(environment: dict[str, str]) -> Iterator[str]:
    """`make run`, on a free port."""
    # Not through the recipe's own prerequisites: this environment is the installed one.
    command = ["make", "run", "--old-file=install", f"BIN={Path(sys.executable).parent}"]
    with subprocess.Popen(
        command, cwd=ROOT, env={**environment, "FRONTDESK_PORT": "0"}, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"ready in [\d.]+ s on (http://127\.0\.0\.1:\d+)", line):
                yield found[1]
                break
        else:
            pytest.fail("".join(said))
        os.killpg(process.pid, signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
        assert process.wait(60) in (0, -signal.SIGINT, 2, 130)  # make says that it was interrupted, or what it ran said


def test_generated_parts_are_up_to_date() -> None:
    assert readme.rendered(TEXT) == TEXT, "run `python -m tests.readme`"


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_every_make_target_named_exists() -> None:
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, flags=re.MULTILINE))
    assert named >= {"run", "test", "chat", "install", "help"}
    for target in named:
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_pictures_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", TEXT)
    assert len(pictures) >= 2
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_every_command_runs(environment: dict[str, str], service_url: str, tmp_path: Path) -> None:
    """In the order of the README, in one folder, against the running service."""
    port = service_url.rpartition(":")[2]
    ran = []
    for language, block in BLOCKS:
        script = block.replace("http://127.0.0.1:8080", service_url)
        command = ["bash", "-euo", "pipefail", "-c", script] if language == "sh" else [sys.executable, "-c", script]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, "FRONTDESK_PORT": port},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        ran.append(done.stdout)
    said = "".join(ran)
    assert "data: [DONE]" in said
    assert "library v2 is live" in said
    assert '"domain": "translation"' in said
    assert (tmp_path / "from-the-log.jsonl").stat().st_size > 0
