"""The commands of training: `frontdesk train` and `frontdesk train-starters`. Heavy imports wait until a command runs."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from trainers.settings import LEARNING_RATES, TuningSettings

if TYPE_CHECKING:
    from prompt_bank.manifest import TrainingRecord

_DEFAULTS = TuningSettings()
_RATES = ", ".join(f"{rate} for {kind}" for kind, rate in LEARNING_RATES.items())


def register(app: typer.Typer) -> None:
    app.command("train")(train)
    app.command("train-starters")(train_starters)


def train(
    domain: Annotated[str, typer.Argument(help="Name of a domain in the bank, e.g. banking.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help='Conversations to learn from: JSONL, {"messages": [{"role", "content"}, ...]} a line.', show_default=False
        ),
    ],
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Conversations that choose the best moment to stop; a tenth of the data when left out.", show_default=False
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(help="Conversations to report figures on; the validation ones when left out.", show_default=False),
    ] = None,
    kind: Annotated[
        Literal["prefix_kv", "embeds"], typer.Option(help="Prefix tuning (keys and values of every layer) or prompt tuning.")
    ] = _DEFAULTS.kind,
    virtual_tokens: Annotated[
        int, typer.Option(min=1, max=1024, help="Length of the prompt; a multiple of 16 fills whole cache blocks.")
    ] = _DEFAULTS.num_virtual_tokens,
    init: Annotated[
        Literal["brief", "random"], typer.Option(help="Start from the text of the card's brief, or from random numbers.")
    ] = _DEFAULTS.init,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data, at most.")] = _DEFAULTS.num_epochs,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help=f"Peak learning rate; by default {_RATES}.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations a step.")] = _DEFAULTS.batch_size,
    seed: Annotated[int, typer.Option(help="The same seed and data give the same prompt.")] = _DEFAULTS.seed,
    promote: Annotated[bool, typer.Option("--promote/--no-promote", help="Make the new version live.")] = True,
    max_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Finish within about this time, on fewer steps.", show_default=False)
    ] = None,
) -> None:
    """Train a domain's soft prompt on conversations and publish it as a new version.

    Only the prompt is trained, never the model. Prints held-out loss and accuracy of the model alone, with the card's brief
    as system message, and with the trained prompt.
    """
    from prompt_bank.settings import BankSettings
    from trainers.dataset import read_dataset
    from trainers.progress import TerminalProgress
    from trainers.publishing import Workbench, live_version, publish
    from trainers.runs import max_conversation_tokens, train_domain

    settings = TuningSettings(
        kind=kind,
        num_virtual_tokens=virtual_tokens,
        init=init,
        num_epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        max_seconds=None if max_minutes is None else max_minutes * 60,
    )
    bench = Workbench.open(BankSettings.load())
    max_tokens = max_conversation_tokens(bench.base, settings)
    dataset = read_dataset(data, validation, test, bench.chat_format, max_tokens, seed)
    parent = asyncio.run(live_version(bench, domain))
    with TerminalProgress(domain, Console(stderr=True)) as progress:
        trained = train_domain(bench.base, bench.chat_format, parent.card, dataset, settings, progress)
    version = asyncio.run(publish(bench, parent, trained, promote))
    _print_figures(trained.record)
    if promote:
        typer.echo(f"{version.name} is live")
    else:
        number = version.manifest.version
        typer.echo(f"{version.name} is published; make it live: frontdesk bank promote {domain} {number}")


def train_starters(
    domains: Annotated[list[str] | None, typer.Argument(help="Starter domains; all when left out.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same prompts.")] = _DEFAULTS.seed,
) -> None:
    """Train the shipped domains again from nothing, in place of the versions that come with Frontdesk.

    For work on Frontdesk itself: writes `trained/` and `results.json` into the folders of prompt_bank/starter.
    """
    from prompt_bank.errors import UnknownDomainError
    from prompt_bank.settings import BankSettings
    from prompt_bank.starter import STARTER_DIR, starter_domains
    from trainers.progress import TerminalProgress
    from trainers.publishing import Workbench
    from trainers.starters import BATCH_SIZES, train_starter

    chosen = domains or starter_domains()
    for domain in chosen:
        if domain not in starter_domains():
            raise UnknownDomainError(f"no starter domain {domain!r}; there are: {', '.join(starter_domains())}")
    bench = Workbench.open(BankSettings.load())
    for domain in chosen:
        settings = TuningSettings(batch_size=BATCH_SIZES[domain], seed=seed)
        with TerminalProgress(domain, Console(stderr=True)) as progress:
            trained = train_starter(bench, STARTER_DIR / domain, settings, progress)
        typer.echo(f"{domain}:")
        _print_figures(trained.record)


def _print_figures(record: "TrainingRecord") -> None:
    used = record.settings
    table = Table(f"held out ({used['num_held_out']} {used['held_out']} conversations)", "loss", "accuracy")
    for setup, figures in record.metrics.items():
        table.add_row(setup, f"{figures['loss']:.3f}", f"{figures['accuracy']:.3f}")
    Console().print(table)
    typer.echo(
        f"trained on {record.num_conversations} conversations in {record.seconds:.0f} s: {used['num_steps']} steps, "
        f"best after {used['best_step']}"
    )
    if record.metrics["trained"]["loss"] >= record.metrics["brief"]["loss"]:
        typer.echo("note: the brief does better on these conversations than the trained prompt", err=True)
