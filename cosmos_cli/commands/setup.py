"""`cosmos setup`: check whether this machine can run a recipe, and install what is missing."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import ExitCode, fill_in

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe
    from cosmos_cli.setup.packages import Check

OTHERS = "the 7B: `cosmos setup lora` for 1 GPU, `cosmos setup my_videos` for 8"


class Extra(StrEnum):
    """The values of --with."""

    transformer_engine = "transformer-engine"
    apex = "apex"


RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped recipe. Default: tiny.",
        autocompletion=options.shipped_names,
    ),
]
InstallOption = Annotated[
    bool, typer.Option("--install", help="Install or repair what is missing or broken.")
]
PrintOption = Annotated[
    bool, typer.Option("--print", help="Print the commands of --install as a shell script.")
]
WithOption = Annotated[
    list[Extra] | None,
    typer.Option("--with", help="Also require this optional package; repeatable."),
]


def setup(
    given: RecipeArgument = None,
    install: InstallOption = False,
    print_: PrintOption = False,
    with_: WithOption = None,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Check whether this machine can run a recipe; --install adds what is missing.

    Example: cosmos setup nemo_assets --install
    """
    from cosmos_cli.setup import checks

    recipe = given or "tiny"
    r = options.open_recipe(recipe, set_, print_recipe, json_).recipe
    wanted = [name.value for name in with_ or ()]
    install_options = " ".join(["--install", *(f"--with {name}" for name in wanted)])
    what = recipe if given else f"the recipe tiny, as none was named ({OTHERS})"
    console.say(f"checking this machine for {what}, about 10 s")
    rows = checks.run_checks(r, wanted)
    next_ = options.command_line("download", recipe, set_)
    repair = options.command_line("setup", recipe, set_, install_options)
    if print_ or dry_run:
        result = _plan(rows, repair, as_script=print_)
        left = [] if print_ else [row for row in rows if not (install and row.commands)]
    else:
        artifacts, rows = _install(r, wanted, rows) if install else ([], rows)
        result, left = Result(_table(rows), artifacts, _figures(rows), next_), rows
    if failed := [row for row in left if row.status == "fail"]:
        result.code = ExitCode.ENVIRONMENT
        what = f"this machine is not ready: {', '.join(row.name for row in failed)}"
        result.error = "\n".join([what, *(f"{row.name}: {row.fix}" for row in failed)])
        result.next = repair if checks.mending(rows) and not install else ""
    console.emit(result, as_json=json_)
    raise typer.Exit(result.code)


def _install(r: Recipe, wanted: list[str], rows: list[Check]) -> tuple[list[Path], list[Check]]:
    """Repair what can be repaired; return the log of the commands, if any, and the new rows."""
    from cosmos_cli.setup import checks, installs

    artifacts: list[Path] = []
    tried: list[tuple[str, ...]] = []
    # A missing package can hide the next problem, so everything is checked again after each repair.
    while commands := [c for c in checks.mending(rows) if c not in tried]:
        artifacts = [installs.install(commands)]
        tried += commands
        rows = checks.run_checks(r, wanted)
    return artifacts, rows


def _plan(rows: list[Check], repair: str, *, as_script: bool) -> Result:
    """Return the commands that --install would run, one per line or as a shell script."""
    from cosmos_cli.setup import checks, installs

    commands = checks.mending(rows)
    shown = [shlex.join(command) for command in commands]
    if as_script:
        failed = [row for row in rows if row.status == "fail" and not row.commands]
        text = installs.script(commands, [f"{row.name}: {row.fix}" for row in failed])
    else:
        text = "\n".join(shown) or "nothing to install"
    return Result(text, figures={"commands": shown, **_figures(rows)}, next=repair)


def _figures(rows: list[Check]) -> dict[str, list[dict[str, str]]]:
    keys = ("name", "status", "found", "fix")
    return {"checks": [{key: fill_in(getattr(row, key)) for key in keys} for row in rows]}


def _table(rows: list[Check]) -> str:
    cells: list[tuple[str, ...]] = []
    for row in rows:
        cells.append((row.name, row.status, row.found))
        if row.fix:
            cells.append(("", "", f"fix: {fill_in(row.fix)}"))
    return console.table(cells, ("check", "status", "found"))
