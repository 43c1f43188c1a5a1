"""The `frontdesk` command: one Typer app whose subcommands every package registers through the entry-point group."""

import logging
import os
import sys
from importlib.metadata import entry_points, version

import typer
from rich.console import Console
from rich.markup import escape

from prompt_bank.errors import FrontdeskError

GROUP = "frontdesk.commands"

log = logging.getLogger(__name__)


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="frontdesk",
        help="Self-hosted chatbot backend: one frozen language model, a trained soft prompt for every domain.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    @app.callback(invoke_without_command=True)
    def frontdesk(show_version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if show_version:
            typer.echo(f"frontdesk {version('frontdesk')}")
            raise typer.Exit

    for entry_point in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        entry_point.load()(app)
    return app


def main() -> None:
    """Runs the command; an error is one line on stderr and exit status 1, never a traceback."""
    # Before torch is loaded. Its threads spin while they wait; on shared cores that made short forwards 10 times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        build_app()()
    except FrontdeskError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of our output went away (`frontdesk ... | head`); there is nobody left to tell.
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get("FRONTDESK_LOG_LEVEL", "").lower() == "debug":
            log.exception("unexpected")
        _fail(f"unexpected {type(error).__name__}: {error}; set FRONTDESK_LOG_LEVEL=debug to see where")


def _fail(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print("[bold red]error:[/]", escape(" ".join(text.split())))
    sys.exit(1)


if __name__ == "__main__":
    main()
