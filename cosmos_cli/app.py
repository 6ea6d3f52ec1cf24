"""Define the command `cosmos` and its subcommands; turn errors into exit codes."""

from __future__ import annotations

import contextlib
import io
import shlex
import signal
import sys
import time
from types import FrameType
from typing import Annotated, Any, cast

import typer

from cosmos_cli import __version__, console, files, signals
from cosmos_cli.commands import download, evaluate, generate, prep, promote, recipes, setup, train
from cosmos_cli.errors import ExitCode, Interrupted, UserError, usage_error

# More than rank 0 needs to print its error on a busy machine.
RANK_0_SECONDS = 10
# Typer's errors about options. Their class comes from click or is vendored, depending on the
# version of Typer.
_TyperError = cast(type[Exception], typer.BadParameter.__mro__[2])

app = typer.Typer(
    name="cosmos",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-train Cosmos-Predict1-7B (Text2World or Video2World) on your own videos, and "
    "generate videos with the result. Every verb reads a recipe: a YAML file or a name from "
    "`cosmos recipes list`.",
)
for _verb in (setup, download, prep, train, promote, generate, evaluate):
    app.command(cls=getattr(_verb, "Command", None))(
        getattr(_verb, _verb.__name__.rpartition(".")[2])
    )
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


def _usage_error(error: Any) -> UserError:
    """Return Typer's error about options, with the corrected command where it can be guessed."""
    where = error.ctx.command_path if error.ctx else _command_path(sys.argv[1:])
    message = error.format_message().strip().rstrip(".").replace("Value error, ", "")
    what, fix = message[:1].lower() + message[1:], f"see `{where} --help`"
    corrected: list[str] = []
    if error.ctx:
        corrected = _with_settings(error.ctx.command, sys.argv[1:])
        corrected = corrected or _with_prompt(error.ctx.command, sys.argv[1:])
    if corrected:
        fix = f"use `{shlex.join(['cosmos', *corrected])}`"
    return usage_error(where, what, fix)


def _command_path(words: list[str]) -> str:
    """Return the command that words name. Typer gives no context when a value is missing."""
    command, path = cast(Any, typer.main.get_command(app)), ["cosmos"]
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
        path.append(word)
    return " ".join(path)


def _with_prompt(command: Any, words: list[str]) -> list[str]:
    """Return `generate A red ball` with the loose words as --prompt; [] for other commands."""
    from cosmos_cli.recipe import loading

    options = [number for number, word in enumerate(words) if word[:1] == "-"]
    loose = words[1 : options[0] if options else None]
    recipe = loose[:1] if loose and loose[0] in loading.shipped() else []
    prompt = loose[len(recipe) :]
    if command.name != "generate" or not prompt or "--prompt" in words:
        return []
    return [words[0], *recipe, "--prompt", " ".join(prompt), *words[1 + len(loose) :]]


def _with_settings(command: Any, words: list[str]) -> list[str]:
    """Return the words of a command with `--max-steps 4` and `max_steps=4` as --set options.

    An option of this command that was typed with one dash, such as `-set`, gets the second.

    Return [] if there are no such words, or if the command has no --set.
    """
    from cosmos_cli.recipe.keys import Recipe

    options = {name: param for param in command.params for name in param.opts if "-" in name[:1]}
    takes_value = {name for name, param in options.items() if not param.is_flag}
    corrected: list[str] = []
    left = iter(words)
    for typed in left:
        word = f"-{typed}" if f"-{typed}" in options else typed
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        is_value = bool(corrected) and corrected[-1] in takes_value
        if is_value or name in options or key not in Recipe.model_fields or name + equals == key:
            corrected.append(word)
        else:
            corrected += ["--set", f"{key}={value if equals else next(left, 'VALUE')}"]
    return corrected if "--set" in options and corrected != words else []


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
            sys.exit(app(prog_name="cosmos", standalone_mode=False))
    except UserError as error:
        if console.is_muted() and not error.told:
            _let_rank_0_explain()
        console.emit(console.failure(error), as_json=as_json)
        sys.exit(error.code)
    except _TyperError as error:
        # Typer has printed the help already if the error is that nothing was typed.
        if type(error).__name__ != "NoArgsIsHelpError":
            console.emit(console.failure(_usage_error(error)), as_json=as_json)
        sys.exit(ExitCode.USAGE)
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
