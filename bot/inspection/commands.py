"""`frontdesk bank inspect|diff`: looking into prompts. Heavy imports wait until a command runs."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from prompt_bank.commands.bank import AsJson, Domain, LiveNumber, open_store, version_number

if TYPE_CHECKING:
    from bot.inspection.diff import VersionDiff
    from bot.inspection.report import Inspection, PromptReport
    from prompt_bank.model_files import Report
    from prompt_bank.opening import LoadedModel
    from prompt_bank.store import Store

inspection_app = typer.Typer()  # its commands are part of `frontdesk bank`

_DIFF_COLOURS = {"+": "green", "-": "red", "@": "cyan"}


@inspection_app.command("inspect")
def bank_inspect(
    domain: Domain,
    version: LiveNumber = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one page with plots to this file.", dir_okay=False, show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look into a version's soft prompt: its virtual tokens' nearest words, norms, drift and share of attention."""
    from prompt_bank.opening import load_model
    from prompt_bank.settings import BankSettings

    store = open_store()
    _check_known(store, domain)
    with _status() as report:
        from bot.inspection.page import check_target, render_page, write_page  # they take seconds to import
        from bot.inspection.report import inspect

        if html is not None:
            check_target(html)
        report("base model")
        loaded = load_model(BankSettings.load(), report)
        number = version or _live_version(store, loaded, domain)
        inspection = inspect(store, loaded, store.read_version(domain, number), report)
        if html is not None:
            report("plots")
            write_page(html, render_page(inspection))
    if as_json:
        Console().print_json(data=asdict(inspection))
    else:
        _print_inspection(inspection)
    if html is not None:
        Console(stderr=True, soft_wrap=True).print(f"wrote {escape(str(html))}")


@inspection_app.command("diff")
def bank_diff(
    domain: Domain,
    a: Annotated[int, typer.Argument(help="Number of one version, e.g. 3.", parser=version_number, metavar="A")],
    b: Annotated[int, typer.Argument(help="Number of the other.", parser=version_number, metavar="B")],
    as_json: AsJson = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; each card's own limit when left out.", show_default=False)
    ] = None,
) -> None:
    """Compare two versions of a domain: their cards, their vectors, and their answers to the card's sample questions.

    Both answer as served, but greedily (temperature 0), so that only the versions differ.
    """
    from prompt_bank.opening import load_model

    store = open_store()
    _check_known(store, domain)
    version_a, version_b = store.read_version(domain, a), store.read_version(domain, b)
    with _status() as report:
        from bot.inspection.diff import diff_versions
        from bot.settings import Settings

        settings = Settings.load()
        report("base model")
        loaded = load_model(settings, report)
        diff = asyncio.run(diff_versions(settings, loaded, version_a, version_b, max_tokens, report))
    if as_json:
        Console().print_json(data={"domain": domain, "a": a, "b": b, **asdict(diff)})
    else:
        _print_diff(diff, [version_a.name, version_b.name])


def _check_known(store: "Store", domain: str) -> None:
    from prompt_bank.errors import UnknownDomainError

    if not store.versions(domain):
        raise UnknownDomainError(f"no domain {domain!r} in the bank; there are: {', '.join(store.domains()) or 'none'}")


def _live_version(store: "Store", loaded: "LoadedModel", domain: str) -> int:
    from prompt_bank.errors import UnknownVersionError

    live = store.pointer_table().live_versions(loaded.served.fingerprint)
    if domain not in live:
        known = ", ".join(map(str, store.versions(domain)))
        raise UnknownVersionError(f"{domain} has no live version for {loaded.base.name}; give one of its versions: {known}")
    return live[domain]


@contextmanager
def _status() -> "Iterator[Report]":
    """What is being done, on a terminal's stderr while it is done."""
    with Console(stderr=True).status("starting") as status:
        yield lambda text: status.update(escape(text))


def _facts_table(*headers: str) -> Table:
    columns = [Column(header, overflow="fold") for header in headers]
    return Table(*columns, show_header=any(headers), box=None, pad_edge=False)


def _print_inspection(inspection: "Inspection") -> None:
    console = Console()
    console.print(f"[bold]{escape(inspection.title)}[/]  {inspection.domain} v{inspection.version}", highlight=False)
    for line in inspection.summary():
        console.print(f"  {line}", highlight=False)
    facts = _facts_table("", "")
    for name, value in inspection.facts().items():
        facts.add_row(f"[bold]{name}[/]", escape(value))
    console.print("", facts, "")
    if inspection.prompt is None:
        console.print("[bold]brief[/]", escape(inspection.brief), highlight=False)
        return
    console.print(_tokens_table(inspection.prompt))
    similarity = Table("live domain", "similarity")
    for domain, cosine in inspection.prompt.similarity.others:
        similarity.add_row(domain, f"{cosine:.3f}")
    if similarity.row_count:
        console.print(similarity)


def _tokens_table(prompt: "PromptReport") -> Table:
    headers = [f"nearest words (cosine of {each.compared}; by chance {each.by_chance:.2f})" for each in prompt.nearest]
    table = Table("token", "attention", "norm", "drift", *headers)
    for index, token in enumerate(prompt.tokens):
        drift = "not recorded" if token.drift is None else f"{token.drift:.1%}"
        words = [escape("  ".join(f"{word.quoted} {word.cosine:.2f}" for word in each.words[index])) for each in prompt.nearest]
        table.add_row(str(index), f"{token.attention:.2%}", f"{token.norm:.2f}", drift, *words)
    return table


def _print_diff(diff: "VersionDiff", names: list[str]) -> None:
    console = Console(highlight=False)
    for line in diff.summary():
        console.print(line)
    facts = _facts_table("", *names)
    for name, (a, b) in diff.facts.items():
        colour = "" if a == b else "[yellow]"
        facts.add_row(f"[bold]{name}[/]", colour + escape(a), colour + escape(b))
    console.print("", facts, "")
    for line in diff.card:
        console.print(Text(line, style=_DIFF_COLOURS.get(line[:1], "")), soft_wrap=True)
    if diff.vectors and diff.vectors.cosines:
        table = Table("token", "cosine", "relative distance")
        for index, pair in enumerate(zip(diff.vectors.cosines, diff.vectors.distances, strict=True)):
            table.add_row(str(index), *(f"{value:.3f}" for value in pair))
        console.print(table)
    answers = Table("question", *names, show_lines=True)
    for row in diff.answers:
        answers.add_row(escape(row.question), escape(row.a), escape(row.b) if row.a != row.b else "[dim]the same[/]")
    console.print(answers)
