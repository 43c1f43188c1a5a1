"""The parts of the README that are made from the code and from results: `python -m tests.readme` writes them anew."""

import json
import re
from pathlib import Path
from typing import Any

from bot.settings import Settings
from prompt_bank.starter import STARTER_DIR, starter_domains

README = Path(__file__).parent.parent / "README.md"
_SETUPS = {"frozen": "frozen model", "brief": "brief as system message", "trained": "trained prompt"}
_SHOWN_SAMPLES = 2


def settings_rows() -> str:
    """One row a setting, in the order of the code."""
    home = str(Path.home())
    rows = ["| variable | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = "unset" if default is None else f"`{str(default).replace(home, '~')}`"
        rows.append(f"| `FRONTDESK_{name.upper()}` | {shown} | {field.description} |")
    return "\n".join(rows)


def starters_section() -> str:
    """Held-out figures and answers side by side, from each starter's results."""
    results = {domain: json.loads((STARTER_DIR / domain / "results.json").read_text()) for domain in starter_domains()}
    return f"{_figures_table(results)}\n\n{_answers_tables(results)}"


def _figures_table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "Held-out loss per answer token, token accuracy, and chrF for translation, on the test conversations; none shares more",
        "than half of its character 5-grams with one that was trained on. A trained prompt is 32 virtual tokens, a brief 130",
        "to 230 text tokens. One seed each, four epochs, 8 to 11 minutes a domain on two busy cores.",
        "",
        "| domain | " + " | ".join(_SETUPS.values()) + " |",
        "|---|---|---|---|",
    ]
    for domain, result in results.items():
        cells = []
        for setup in _SETUPS:
            figures = result["held_out"][setup]
            cell = f"loss {figures['loss']:.2f}, accuracy {figures['accuracy']:.2f}"
            if "chrf" in result:
                cell += f", chrF {result['chrf'][setup]:.1f}"
            cells.append(cell)
        lines.append(f"| {domain} ({result['num_held_out']} conversations) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _answers_tables(results: dict[str, dict[str, Any]]) -> str:
    """The first samples of the test set, not chosen; greedy answers of the same model."""
    lines = ["Greedy answers to the first sampled test questions, not chosen:", ""]
    lines += ["| asked | " + " | ".join(_SETUPS.values()) + " |", "|---|---|---|---|"]
    for result in results.values():
        for sample in result["samples"][:_SHOWN_SAMPLES]:
            asked = sample["messages"][-1]["content"]
            lines.append("| " + " | ".join(_cell(text) for text in (asked, *(sample[setup] for setup in _SETUPS))) + " |")
    return "\n".join(lines)


def _cell(text: str, longest: int = 240) -> str:
    joined = " ".join(text.split()).replace("|", "\\|")
    return joined if len(joined) <= longest else f"{joined[: longest - 1]}…"


def rendered(text: str) -> str:
    """`text` with every generated part made anew."""
    for name, part in {"settings": settings_rows(), "starters": starters_section()}.items():
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, num_found = re.subn(pattern, lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text, flags=re.DOTALL)
        assert num_found == 1, f"README has {num_found} parts called {name}, expected 1"
    return text


if __name__ == "__main__":
    README.write_text(rendered(README.read_text(encoding="utf-8")), encoding="utf-8")
