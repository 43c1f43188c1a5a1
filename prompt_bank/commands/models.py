"""`frontdesk models`: fetch and list the models Frontdesk comes with."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

models_app = typer.Typer(no_args_is_help=True, help="Fetch and list the models Frontdesk comes with.")


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
