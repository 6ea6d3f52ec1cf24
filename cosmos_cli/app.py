"""Define the command `cosmos` and its subcommands; turn errors into exit codes."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
from types import FrameType
from typing import Annotated

import typer

from cosmos_cli import __version__, console, files, signals
from cosmos_cli.commands import (
    download,
    evaluate,
    generate,
    prep,
    promote,
    recipes,
    setup,
    train,
)
from cosmos_cli.errors import ExitCode, Interrupted, UserError

# More than rank 0 needs to print its error on a busy machine.
RANK_0_SECONDS = 10

app = typer.Typer(
    name="cosmos",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-train Cosmos-Predict1 Text2World on your own videos and generate videos with it. "
    "Every command takes a recipe: a YAML file or a name from `cosmos recipes list`.",
)
for _verb in (setup, download, prep, train, promote, generate, evaluate):
    app.command()(getattr(_verb, _verb.__name__.rpartition(".")[2]))
app.add_typer(recipes.app, name="recipes")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cosmos {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None: ...


def _interrupt(number: int, _frame: FrameType | None) -> None:
    if signals.requests.note(number):
        raise Interrupted(ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM)


def _let_rank_0_explain() -> None:
    """Wait for rank 0 to print the error: the launcher stops all ranks once one has exited."""
    with contextlib.suppress(Interrupted):
        time.sleep(RANK_0_SECONDS)


def main() -> None:
    """Run the command line and exit with a documented exit code."""
    for number in signals.ending():
        signal.signal(number, _interrupt)
    as_json = "--json" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Print file names that are not UTF-8 unchanged, instead of failing.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        with files.path_errors():
            app()
    except UserError as error:
        if console.is_muted() and not error.told:
            _let_rank_0_explain()
        console.emit(console.failure(error), as_json=as_json)
        sys.exit(error.code)
    except SystemExit as end:
        if as_json and end.code == ExitCode.USAGE:
            console.emit(
                console.Result(code=ExitCode.USAGE, error="wrong options; see --help"), as_json=True
            )
        raise
    except Interrupted as interruption:
        result = console.Result(
            artifacts=list(interruption.artifacts),
            figures=dict(interruption.figures),
            code=interruption.code,
            error="interrupted; the same command resumes where it stopped",
        )
        console.emit(result, as_json=as_json)
        sys.exit(interruption.code)
    except Exception as bug:
        if as_json:
            console.emit(console.Result(code=ExitCode.BUG, error=repr(bug)), as_json=True)
        raise
