"""`frontdesk bank export|import`: versions to and from PEFT folders, other installations, and the hub."""

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from prompt_bank.actor import actor
from prompt_bank.commands.bank import Domain, LiveNumber, open_store

if TYPE_CHECKING:
    from prompt_bank.card import Card
    from prompt_bank.importing import Imported
    from prompt_bank.settings import BankSettings
    from prompt_bank.store import Store
    from prompt_bank.version import ServedModel, Version

interchange_app = typer.Typer()  # its commands are part of `frontdesk bank`


@interchange_app.command("export")
def bank_export(
    domain: Domain,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new .zip for another installation, or a new folder for PEFT.")
    ],
    version: LiveNumber = None,
) -> None:
    """Write a version as a PEFT folder, or as one .zip that `frontdesk bank import` reads."""
    from prompt_bank.archive import write_archive, write_folder

    store = open_store()
    exported = store.read_version(domain, _live_version(store, domain) if version is None else version)
    write = write_archive if output.suffix == ".zip" else write_folder
    write(store.read_files(exported), output)
    typer.echo(f"{exported.name} is in {output}")
    if exported.digest is None:
        typer.echo("it answers from its brief: there is no soft prompt in it")


def _live_version(store: "Store", domain: str) -> int:
    from prompt_bank.errors import UnknownVersionError

    pointers = store.pointer_table().record(domain).by_model.values()
    live = sorted({each.live for each in pointers if each.live is not None})
    if len(live) != 1:
        which = f"versions {live} live, for different base models" if live else "no live version"
        known = ", ".join(map(str, store.versions(domain))) or "none"
        raise UnknownVersionError(f"{domain} has {which}; give the number of a version: {known}")
    return live[0]


@interchange_app.command("import")
def bank_import(
    source: Annotated[str, typer.Argument(help="A PEFT folder, an exported .zip or folder, or a hub id owner/name@revision.")],
    domain: Annotated[str, typer.Option(help="The domain it becomes a version of.")],
    card: Annotated[
        Path | None,
        typer.Option(help="A card.toml; else the exported version's card, else the domain's live one.", show_default=False),
    ] = None,
    task: Annotated[int | None, typer.Option(help="Task id of a multitask prompt.", show_default=False)] = None,
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Make it live at once.")] = False,
    reason: Annotated[str, typer.Option(help="Why, for the record; its origin when left out.", show_default=False)] = "",
) -> None:
    """Publish a version from elsewhere, once it is checked against the base model. Nothing in it is run."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from prompt_bank.card import DOMAIN_PATTERN, ROUTED, read_card
    from prompt_bank.errors import CardError
    from prompt_bank.importing import read_import
    from prompt_bank.opening import load_model
    from prompt_bank.settings import BankSettings

    if not re.fullmatch(DOMAIN_PATTERN, domain) or domain == ROUTED:
        raise typer.BadParameter(
            f"{domain!r} cannot be a domain's name; take lower-case letters, digits, - and _, not {ROUTED}"
        )
    given = read_card(card) if card else None
    if given and given.name != domain:
        raise CardError(f"{card} is the card of {given.name}, not of {domain}; change its name or --domain")
    settings = BankSettings.load()
    console = Console(stderr=True)
    disable_progress_bars()  # the hub's would be drawn over ours
    with console.status(f"loading {settings.base_model}"):
        model = load_model(settings, console.print).served
    with console.status("reading and checking the prompt"):
        imported = read_import(source, model, task)
    version = asyncio.run(_publish(settings, domain, given or imported.card, imported, model, promote, reason))
    prompt = version.manifest.soft_prompt
    held = (
        f"{prompt.kind}, {prompt.num_virtual_tokens} virtual tokens, digest {prompt.digest[:12]}"
        if prompt
        else "no soft prompt"
    )
    typer.echo(f"{version.name}: {held}, from {imported.origin}")
    command = f"frontdesk bank promote {domain} {version.manifest.version}"
    typer.echo(f"{version.name} is live" if promote else f"it answers nobody yet; make it live: {command}")


async def _publish(
    settings: "BankSettings",
    domain: str,
    card: "Card | None",
    imported: "Imported",
    model: "ServedModel",
    promote: bool,
    reason: str,
) -> "Version":
    from prompt_bank.errors import CardError
    from prompt_bank.opening import open_bank
    from prompt_bank.version import Draft

    async with open_bank(settings) as bank:
        live = (await bank.claim_table()).pointers(domain, model.fingerprint).live
        parent = None  # nothing of it is of a version here, but the card it may take
        if card is None:
            if live is None:
                raise CardError(f"{domain} is not live here and there is no card in the import; give one with --card card.toml")
            card = (await bank.version(domain, live)).card
            parent = live
        draft = Draft(card.model_copy(update={"name": domain}), model, imported.prompt, imported.training, parent)
        why = reason or f"imported from {imported.origin}"
        version = await bank.publish(draft, actor(), why)
        if promote:
            await bank.promote(domain, version.manifest.version, actor(), why, served=model)
    return version
