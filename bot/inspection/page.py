"""An inspection as one HTML page with plots. It loads nothing, and everything that others wrote is escaped."""

import io
import os
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bot.inspection.report import Inspection, PromptReport
from prompt_bank.errors import BadFileError

_BLUE, _ORANGE = "#2c6fbb", "#d9822b"
_MAX_WRITTEN_OUT = 12  # domains whose cosines are written into the matrix
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "frontdesk",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def render_page(inspection: Inspection) -> str:
    """The whole page; the same inspection gives the same text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    plots = _plots(inspection.prompt) if inspection.prompt else {}
    return template.render(inspection=inspection, prompt=inspection.prompt, plots=plots)


def check_target(path: Path) -> None:
    """Raises BadFileError before the work rather than after it."""
    if not path.parent.is_dir():
        raise BadFileError(f"{path}: there is no folder {path.parent}; make it first or give another path")


def write_page(path: Path, page: str) -> None:
    """Replaces `path` whole or not at all. Raises BadFileError."""
    scratch = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        scratch.write_text(page, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise BadFileError(f"{path}: cannot be written ({error.strerror}); give another path") from error
    finally:
        scratch.unlink(missing_ok=True)


def _plots(prompt: PromptReport) -> dict[str, Markup]:
    with matplotlib.rc_context(_STYLE):
        plots = {"attention": _svg(_attention(prompt)), "vectors": _svg(_vectors(prompt))}
        if prompt.similarity.others:
            plots["similarity"] = _svg(_similarity(prompt))
    return plots


def _svg(figure: Figure) -> Markup:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = out.getvalue()
    return Markup(drawn[drawn.index("<svg") :])  # matplotlib escapes the texts in it


def _attention(prompt: PromptReport) -> Figure:
    """Bars of each virtual token over a heat map of layers."""
    by_layer = prompt.attention.by_layer
    height = 1.6 + min(4.5, 0.6 + 0.16 * len(by_layer))
    figure = Figure(figsize=(8.6, height), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.4, height - 1.4])
    _bars(top, [token.attention for token in prompt.tokens], "share of\nattention", _BLUE)
    top.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    # The root brings out the weak: one virtual token often receives more than all others.
    image = bottom.imshow(by_layer, aspect="auto", interpolation="nearest", cmap="Blues", norm=PowerNorm(0.5, vmin=0))
    bottom.set(xlabel="virtual token", ylabel="layer")
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=bottom, format=PercentFormatter(1.0, decimals=0), fraction=0.03, pad=0.01)
    return figure


def _vectors(prompt: PromptReport) -> Figure:
    drifts = [token.drift for token in prompt.tokens if token.drift is not None]
    figure = Figure(figsize=(8.6, 3.2 if drifts else 1.8), layout="constrained")
    axes = figure.subplots(2 if drifts else 1, 1, sharex=True, squeeze=False)[:, 0]
    _bars(axes[0], [token.norm for token in prompt.tokens], "norm", _BLUE)
    if drifts:
        _bars(axes[1], drifts, "drift", _ORANGE)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes[-1].set_xlabel("virtual token")
    return figure


def _bars(axes: Axes, values: list[float], label: str, colour: str) -> None:
    axes.bar(range(len(values)), values, color=colour, width=0.75)
    axes.set(ylabel=label, xlim=(-0.5, len(values) - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _similarity(prompt: PromptReport) -> Figure:
    domains, matrix = prompt.similarity.domains, prompt.similarity.matrix
    size = 1.8 + 0.5 * len(domains)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="Blues", vmin=min(0.0, *map(min, matrix)), vmax=1)
    axes.set_xticks(range(len(domains)), domains, rotation=40, ha="right")
    axes.set_yticks(range(len(domains)), domains)
    if len(domains) <= _MAX_WRITTEN_OUT:
        for row, cosines in enumerate(matrix):
            for column, cosine in enumerate(cosines):
                colour = "white" if cosine > 0.6 else "black"
                axes.text(column, row, f"{cosine:.2f}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, fraction=0.045, pad=0.03)
    return figure
