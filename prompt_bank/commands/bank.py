"""`frontdesk bank add|list|show|history`: what is in the bank. Other modules add their commands to `bank_app`."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from prompt_bank.actor import actor

if TYPE_CHECKING:
    from prompt_bank.pointers import PointerTable
    from prompt_bank.store import Store
    from prompt_bank.version import Version

bank_app = typer.Typer(no_args_is_help=True, help="Domain versions: add, look at, promote, roll back, try out, move, remove.")


def version_number(text: str) -> int:
    number = text.removeprefix("v")
    if not number.isdecimal() or int(number) < 1:
        raise typer.BadParameter(f"{text!r} is no version; give its number, e.g. 3 or v3")
    return int(number)


Domain = Annotated[str, typer.Argument(help="Name of a domain, e.g. banking.", show_default=False)]
Number = Annotated[
    int, typer.Argument(help="Number of a version, e.g. 3.", parser=version_number, metavar="VERSION", show_default=False)
]


def number_unless(help_: str) -> Any:
    """An argument that may be left out; `help_` says what is taken then."""
    return typer.Argument(help=help_, parser=version_number, metavar="VERSION", show_default=False)


NewestNumber = Annotated[int | None, number_unless("The newest when left out.")]
LiveNumber = Annotated[int | None, number_unless("The live one when left out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_store() -> "Store":
    from prompt_bank import store
    from prompt_bank.settings import BankSettings

    return store.open_store(BankSettings.load())


@bank_app.command("add")
def bank_add(
    card: Annotated[Path, typer.Argument(help="A card.toml.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why, for the record; the card's path when left out.", show_default=False)] = "",
    keep_prompt: Annotated[
        bool, typer.Option("--keep-prompt/--drop-prompt", help="Keep the domain's trained prompt, or answer from the brief.")
    ] = True,
) -> None:
    """Add a domain, or edit one, by its card: a new version, live at once."""
    from prompt_bank.card import read_card
    from prompt_bank.editing import add_card
    from prompt_bank.opening import load_model, open_bank
    from prompt_bank.settings import BankSettings

    settings = BankSettings.load()
    new_card = read_card(card)
    model = load_model(settings).served

    async def add() -> "Version":
        async with open_bank(settings) as bank:
            return await add_card(bank, new_card, model, actor(), reason or f"card {card}", keep_prompt)

    version = asyncio.run(add())
    train = f"frontdesk train {new_card.name} --data FILE.jsonl"
    if version.digest is None:
        typer.echo(f"{version.name} is live, answering from its brief; train it: {train}")
    else:
        typer.echo(f"{version.name} is live with the trained prompt of v{version.manifest.parent}")
        typer.echo(f"a changed brief counts once it is trained again ({train}) or added with --drop-prompt")


@bank_app.command("list")
def bank_list() -> None:
    """List every version of every domain, and which are live, canary, shadow or retired."""
    from prompt_bank.errors import VersionCorruptError

    store = open_store()
    pointers = store.pointer_table()
    typed = [
        Column(name, no_wrap=True) for name in ("domain", "version", "in use", "kind")
    ]  # a narrow terminal shortens others
    table = Table(*typed, "virtual tokens", Column("digest", no_wrap=True), "base model", "created")
    for domain in store.domains():
        for number in store.versions(domain):
            try:
                row = _version_row(store.read_version(domain, number), pointers)
            except VersionCorruptError:  # `bank show` says why; the others are still to be listed
                row = [domain, f"v{number}", ", ".join(pointers.uses_of(domain, number).values()), "[red]corrupt[/]"]
            table.add_row(*row)
    if not table.row_count:
        typer.echo("the bank is empty: `frontdesk serve` adds the starter domains, `frontdesk bank add card.toml` yours")
        return
    Console().print(table)


def _version_row(version: "Version", pointers: "PointerTable") -> list[str]:
    manifest = version.manifest
    prompt = manifest.soft_prompt
    return [
        manifest.domain,
        f"v{manifest.version}",
        _use_of(version, pointers),
        prompt.kind if prompt else "brief",
        str(prompt.num_virtual_tokens) if prompt else "",
        prompt.digest[:12] if prompt else "",
        _printable(manifest.base_model.name),
        f"{manifest.created_at:%Y-%m-%d %H:%M}",
    ]


def _use_of(version: "Version", table: "PointerTable") -> str:
    manifest = version.manifest
    record = table.record(manifest.domain)
    if manifest.version in record.deleted:
        return "half deleted"  # the command was ended in the middle; given again, it finishes
    if manifest.version in record.retired:
        return "retired"
    return table.pointers(manifest.domain, manifest.base_model.fingerprint).use_of(manifest.version)


@bank_app.command("show")
def bank_show(domain: Domain, version: NewestNumber = None, as_json: AsJson = False) -> None:
    """Show one version: its card, where it came from, and how well it did on held-out conversations."""
    from prompt_bank.errors import UnknownDomainError

    store = open_store()
    numbers = store.versions(domain)
    if not numbers:
        raise UnknownDomainError(f"no domain {domain!r} in the bank; there are: {', '.join(store.domains()) or 'none'}")
    shown = store.read_version(domain, numbers[-1] if version is None else version)
    if as_json:
        card = shown.card.model_dump(mode="json")
        Console().print_json(data={"manifest": shown.manifest.model_dump(mode="json"), "card": card})
        return
    _print_version(shown, store.pointer_table())


def _print_version(version: "Version", pointers: "PointerTable") -> None:
    console = Console()
    manifest = version.manifest
    rows = Table(show_header=False, box=None)
    names = ["domain", "version", "in use", "kind", "virtual tokens", "digest", "base model", "created"]
    for name, value in zip(names, _version_row(version, pointers), strict=True):
        rows.add_row(f"[bold]{name}[/]", value)
    rows.add_row("[bold]published by[/]", _printable(f"{manifest.actor}: {manifest.reason}"))
    rows.add_row("[bold]parent[/]", f"v{manifest.parent}" if manifest.parent else "none")
    rows.add_row("[bold]description[/]", escape(version.card.description))
    rows.add_row("[bold]examples[/]", str(len(version.card.examples)))
    console.print(rows)
    training = manifest.training
    if training is None:
        return
    trained = "trained"
    if training.imported_from:
        trained = f"by its own word, which nobody here has checked (from {_printable(training.imported_from)}), trained"
    console.print(
        f"\n{trained} in {training.seconds:.0f} s on {training.num_conversations} conversations "
        f"(data {_printable(training.data_digest[:12])}, seed {training.seed})"
    )
    names = sorted({metric for figures in training.metrics.values() for metric in figures})
    table = Table("held-out", *map(_printable, names))
    for setup, figures in training.metrics.items():
        table.add_row(_printable(setup), *(f"{figures[name]:.3f}" if name in figures else "" for name in names))
    console.print(table)


def _printable(text: str) -> str:
    """A manifest from elsewhere can hold any text; a terminal must obey none of it."""
    return escape("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))


@bank_app.command("history")
def bank_history(domain: Domain, as_json: AsJson = False) -> None:
    """Show everything that happened to a domain: when, what, who and why."""
    from dataclasses import asdict

    from prompt_bank.history import read_history

    entries = read_history(open_store(), domain)
    if as_json:
        Console().print_json(data=[asdict(entry) for entry in entries], default=str)
        return
    has_models = len({entry.fingerprint for entry in entries}) > 1
    table = Table(Column("when (UTC)", no_wrap=True), Column("what", no_wrap=True), "version", "who", "why")
    if has_models:
        table.add_column("base model")
    for entry in entries:
        share = f" {entry.share:.4g}" if entry.share else ""
        row = [f"{entry.at:%Y-%m-%d %H:%M:%S}", f"{entry.action.replace('_', ' ')}{share}"]
        row += [f"v{entry.version}" if entry.version else "", _printable(entry.actor), _printable(entry.reason)]
        table.add_row(*row, *([entry.fingerprint[:12]] if has_models else []))
    Console().print(table)
