"""The shape of the product: which package may import which, and how large a module may be."""

import ast
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    path for package in ("prompt_bank", "trainers", "bot") for path in (ROOT / package).rglob("*.py") if path.stat().st_size
)
MAX_LINES = 400


def test_imports_run_one_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_module_says_what_it_is_for_and_is_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    assert docstring, "no docstring"
    assert docstring.split("\n\n")[0].endswith((".", ":")), f"docstring opens with no sentence: {docstring!r}"
    assert len(source.splitlines()) <= MAX_LINES
