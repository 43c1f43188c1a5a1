"""The commands of the bank: `frontdesk models` and `frontdesk bank`. Heavy imports wait until a command runs."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from prompt_bank.actor import actor

if TYPE_CHECKING:
    from prompt_bank.store import PointerTable
    from prompt_bank.version import Version

models_app = typer.Typer(no_args_is_help=True, help="Fetch and list the models Frontdesk comes with.")
bank_app = typer.Typer(no_args_is_help=True, help="Add, list, show and promote domain versions.")

Domain = Annotated[str, typer.Argument(help="Name of a domain, e.g. banking.", show_default=False)]
Reason = Annotated[str, typer.Option(help="Why, for the record.")]


def register(app: typer.Typer) -> None:
    app.add_typer(models_app, name="models")
    app.add_typer(bank_app, name="bank")


@models_app.command("pull")
def models_pull(
    name: Annotated[
        str | None,
        typer.Argument(help="Embedded model or hub id; all embedded ones when left out.", show_default=False),
    ] = None,
) -> None:
    """Fetch models, so that everything works offline afterwards."""
    from prompt_bank.model_files import EMBEDDED, find_model
    from prompt_bank.settings import BankSettings

    settings = BankSettings.load()
    console = Console(stderr=True)
    for model in [name] if name else list(EMBEDDED):
        folder = find_model(model, settings.models_dir, lambda text: console.print(f"  {text}"))
        typer.echo(f"{model}: {folder}")


@models_app.command("list")
def models_list() -> None:
    """List the embedded models and whether they are here."""
    from prompt_bank.model_files import EMBEDDED, is_fetched
    from prompt_bank.settings import BankSettings

    settings = BankSettings.load()
    table = Table("model", "what it is", "comes from", "here")
    for model in EMBEDDED.values():
        here = "yes" if is_fetched(model, settings.models_dir) else "no"
        table.add_row(model.name, model.about, model.requirement, here)
    Console().print(table)


@bank_app.command("add")
def bank_add(card: Annotated[Path, typer.Argument(help="A card.toml.", show_default=False)]) -> None:
    """Add a domain, or edit one, by its card: it answers at once from the card's brief."""
    from prompt_bank.card import read_card
    from prompt_bank.opening import load_model, open_bank
    from prompt_bank.settings import BankSettings
    from prompt_bank.starter import add_card

    settings = BankSettings.load()
    new_card = read_card(card)
    model = load_model(settings).served

    async def add() -> int:
        async with open_bank(settings) as bank:
            return await add_card(bank, new_card, model, actor(), f"card {card}")

    number = asyncio.run(add())
    train = f"frontdesk train {new_card.name} --data FILE.jsonl"
    typer.echo(f"{new_card.name} v{number} is live, answering from its brief; train it: {train}")


@bank_app.command("promote")
def bank_promote(
    domain: Domain,
    version: Annotated[int, typer.Argument(help="Number of a version.", show_default=False)],
    reason: Reason = "promoted by hand",
) -> None:
    """Make a version live; running services answer with it from the next turn on."""
    from prompt_bank.opening import open_bank
    from prompt_bank.settings import BankSettings

    settings = BankSettings.load()

    async def promote() -> None:
        async with open_bank(settings) as bank:
            await bank.promote(domain, version, actor(), reason)

    asyncio.run(promote())
    typer.echo(f"{domain} v{version} is live")


@bank_app.command("list")
def bank_list() -> None:
    """List every version of every domain."""
    from prompt_bank.errors import VersionCorruptError
    from prompt_bank.settings import BankSettings
    from prompt_bank.store import FolderStore

    store = FolderStore(BankSettings.load().data_dir / "bank")
    pointers = store.pointer_table()
    typed = [Column(name, no_wrap=True) for name in ("domain", "version", "live", "kind")]  # a narrow terminal shortens others
    table = Table(*typed, "virtual tokens", Column("digest", no_wrap=True), "base model", "created")
    for domain in store.domains():
        for number in store.versions(domain):
            try:
                row = _version_row(store.read_version(domain, number), pointers)
            except VersionCorruptError:  # `bank show` says why; the others are still to be listed
                row = [domain, f"v{number}", "", "[red]corrupt[/]"]
            table.add_row(*row)
    if not table.row_count:
        typer.echo("the bank is empty: `frontdesk serve` adds the starter domains, `frontdesk bank add card.toml` yours")
        return
    Console().print(table)


def _version_row(version: "Version", pointers: "PointerTable") -> list[str]:
    manifest = version.manifest
    prompt = manifest.soft_prompt
    live = pointers.live.get(manifest.domain, {}).get(manifest.base_model.fingerprint) == manifest.version
    return [
        manifest.domain,
        f"v{manifest.version}",
        "live" if live else "",
        prompt.kind if prompt else "brief",
        str(prompt.num_virtual_tokens) if prompt else "",
        prompt.digest[:12] if prompt else "",
        escape(manifest.base_model.name),
        f"{manifest.created_at:%Y-%m-%d %H:%M}",
    ]


@bank_app.command("show")
def bank_show(
    domain: Domain,
    version: Annotated[int | None, typer.Argument(help="The newest when left out.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print manifest and card as JSON.")] = False,
) -> None:
    """Show one version: its card, where it came from, and how well it did on held-out conversations."""
    from prompt_bank.errors import UnknownDomainError
    from prompt_bank.settings import BankSettings
    from prompt_bank.store import FolderStore

    store = FolderStore(BankSettings.load().data_dir / "bank")
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
    rows = Table(show_header=False, box=None)
    names = ["domain", "version", "live", "kind", "virtual tokens", "digest", "base model", "created"]
    for name, value in zip(names, _version_row(version, pointers), strict=True):
        rows.add_row(f"[bold]{name}[/]", value)
    rows.add_row("[bold]description[/]", escape(version.card.description))
    rows.add_row("[bold]examples[/]", str(len(version.card.examples)))
    console.print(rows)
    training = version.manifest.training
    if training is None:
        return
    console.print(
        f"\ntrained in {training.seconds:.0f} s on {training.num_conversations} conversations "
        f"(data {training.data_digest[:12]}, seed {training.seed})"
    )
    names = sorted({metric for figures in training.metrics.values() for metric in figures})
    table = Table("held-out", *names)
    for setup, figures in training.metrics.items():
        table.add_row(setup, *(f"{figures[name]:.3f}" if name in figures else "" for name in names))
    console.print(table)
