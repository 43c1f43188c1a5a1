"""`frontdesk bank promote|rollback|canary|shadow|retire|restore|delete`: the life of a version."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated

import typer

from prompt_bank.actor import actor
from prompt_bank.commands.bank import Domain, Number, number_unless, open_store

if TYPE_CHECKING:
    from prompt_bank.bank import Bank
    from prompt_bank.pointers import DomainPointers, PointerTable
    from prompt_bank.settings import BankSettings
    from prompt_bank.version import ServedModel

life_app = typer.Typer()  # its commands are part of `frontdesk bank`

_LEAST_SHARE = 0.0001

Reason = Annotated[str, typer.Option(help="Why, for the record.")]
NumberOrEnd = Annotated[int | None, number_unless("Number of a version; leave it out with --end.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
End = Annotated[bool, typer.Option("--end", help="End it.")]


def share_of(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not _LEAST_SHARE <= share <= 1:
        raise typer.BadParameter(f"{text!r} is no share; give a number from {_LEAST_SHARE} to 1, e.g. 0.1")
    return share


@life_app.command("promote")
def bank_promote(domain: Domain, version: Number, reason: Reason = "promoted by hand") -> None:
    """Make a version live; running services answer with it from the next turn on."""
    _point(lambda bank, served: bank.promote(domain, version, actor(), reason, served=served))
    base_model = open_store().read_manifest(domain, version).base_model.name
    typer.echo(f"{domain} v{version} is live on {base_model}")


@life_app.command("rollback")
def bank_rollback(domain: Domain, reason: Reason = "rolled back by hand") -> None:
    """Make the previous live version live again, prompt and card."""
    from prompt_bank.settings import BankSettings

    fingerprint = _fingerprint(domain, BankSettings.load())
    tables = _point(lambda bank, served: bank.rollback(domain, fingerprint, actor(), reason, served))
    before, after = (table.pointers(domain, fingerprint) for table in tables)
    was = f"v{before.live}" if before.live else "none"
    typer.echo(f"{domain} v{after.live} is live again, {was} no longer")


@life_app.command("canary")
def bank_canary(
    domain: Domain,
    version: NumberOrEnd = None,
    share: Annotated[
        float, typer.Option(parser=share_of, metavar="SHARE", help="Share of the conversations it answers.")
    ] = 0.1,
    end: End = False,
    reason: Reason = "by hand",
) -> None:
    """Have a version answer a share of the conversations; a conversation stays with it, also when the share is raised."""
    if _is_end(version, end):
        _change_pointers(domain, lambda bank, model: bank.end_canary(domain, model, actor(), reason))
        typer.echo(f"{domain} has no canary any more")
        return
    _point(lambda bank, served: bank.start_canary(domain, version or 0, share, actor(), reason, served))
    typer.echo(f"{domain} v{version} answers {share:.4g} of the conversations; promote it, or end it with --end")


@life_app.command("shadow")
def bank_shadow(domain: Domain, version: NumberOrEnd = None, end: End = False, reason: Reason = "by hand") -> None:
    """Have a version answer beside the live one while there is room, logged and never shown (`frontdesk logs shadows`)."""
    if _is_end(version, end):
        _change_pointers(domain, lambda bank, model: bank.end_shadow(domain, model, actor(), reason))
        typer.echo(f"{domain} has no shadow any more")
        return
    _point(lambda bank, served: bank.start_shadow(domain, version or 0, actor(), reason, served))
    typer.echo(f"{domain} v{version} answers unseen; compare with `frontdesk logs shadows --domain {domain}`")


def _is_end(version: int | None, end: bool) -> bool:
    if end == (version is not None):
        raise typer.BadParameter("give either a version or --end")
    return end


@life_app.command("retire")
def bank_retire(domain: Domain, version: Number, reason: Reason = "retired by hand", yes: Yes = False) -> None:
    """Take a version out of service, live or not; it stays in the bank and can be restored."""
    if not yes and "live" in open_store().pointer_table().uses_of(domain, version).values():
        typer.confirm(f"{domain} v{version} is live, and {domain} goes offline without it. Retire it?", abort=True)
    before, after = _change(lambda bank: bank.retire(domain, version, actor(), reason))
    typer.echo(f"{domain} v{version} is retired")
    for fingerprint, use in before.uses_of(domain, version).items():
        if use == "live" and after.pointers(domain, fingerprint).live is None:
            typer.echo(f"{domain} has no live version now: nobody is routed to it until one is promoted")


@life_app.command("restore")
def bank_restore(domain: Domain, version: Number, reason: Reason = "restored by hand") -> None:
    """Undo a retirement; the version can be promoted again."""
    _change(lambda bank: bank.restore(domain, version, actor(), reason))
    typer.echo(f"{domain} v{version} is restored")


@life_app.command("delete")
def bank_delete(
    domain: Domain,
    version: Number,
    reason: Reason = "deleted by hand",
    yes: Yes = False,
) -> None:
    """Delete a version's files for good; its record stays in the history. Refused while it is live, canary or shadow."""
    if not yes:
        typer.confirm(f"Delete the files of {domain} v{version} for good?", abort=True)
    _change(lambda bank: bank.delete(domain, version, actor(), reason))
    typer.echo(f"{domain} v{version} is deleted")


def _change(change: "Callable[[Bank], Awaitable[PointerTable]]") -> "tuple[PointerTable, PointerTable]":
    """The pointer tables before and after."""
    from prompt_bank.opening import open_bank
    from prompt_bank.settings import BankSettings

    async def run() -> "tuple[PointerTable, PointerTable]":
        async with open_bank(BankSettings.load()) as bank:
            return await bank.claim_table(), await change(bank)

    return asyncio.run(run())


def _point(
    change: "Callable[[Bank, ServedModel | None], Awaitable[PointerTable]]",
) -> "tuple[PointerTable, PointerTable]":
    """A change after which another version answers; the pointer tables before and after.

    Where its chat format is not the live version's, that of the settings' base model counts. It takes seconds to load.
    """
    from prompt_bank.errors import ChatFormatMismatchError
    from prompt_bank.opening import load_model
    from prompt_bank.settings import BankSettings

    try:
        return _change(lambda bank: change(bank, None))
    except ChatFormatMismatchError:
        served = load_model(BankSettings.load()).served
        return _change(lambda bank: change(bank, served))


def _change_pointers(
    domain: str, change: "Callable[[Bank, str], Awaitable[PointerTable]]"
) -> "tuple[DomainPointers, DomainPointers]":
    """A change that names no version: for the one base model the domain answers on, else for the settings' one."""
    from prompt_bank.settings import BankSettings

    fingerprint = _fingerprint(domain, BankSettings.load())
    before, after = _change(lambda bank: change(bank, fingerprint))
    return before.pointers(domain, fingerprint), after.pointers(domain, fingerprint)


def _fingerprint(domain: str, settings: "BankSettings") -> str:
    from prompt_bank.errors import UnknownDomainError

    store = open_store()
    by_model = store.pointer_table().record(domain).by_model
    if not by_model:
        raise UnknownDomainError(f"no version of {domain!r} was ever live; there are: {', '.join(store.domains()) or 'none'}")
    if len(by_model) == 1:
        return next(iter(by_model))
    from prompt_bank.opening import load_model

    return load_model(settings).served.fingerprint
