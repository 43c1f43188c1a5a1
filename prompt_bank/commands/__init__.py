"""The commands of the bank: `frontdesk models` and `frontdesk bank`. Heavy imports wait until a command runs."""

import typer

from prompt_bank.commands.bank import bank_app
from prompt_bank.commands.interchange import interchange_app
from prompt_bank.commands.life import life_app
from prompt_bank.commands.models import models_app


def register(app: typer.Typer) -> None:
    app.add_typer(models_app, name="models")
    bank_app.add_typer(life_app)
    bank_app.add_typer(interchange_app)
    app.add_typer(bank_app, name="bank")
