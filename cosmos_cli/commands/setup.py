"""`cosmos setup`: check whether this machine can run a recipe, and install what is missing."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cosmos_cli import console
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import ExitCode, fill_in
from cosmos_cli.setup import checks, installs
from cosmos_cli.setup.packages import Check


class Extra(StrEnum):
    """The values of --with."""

    transformer_engine = "transformer-engine"
    apex = "apex"


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
    recipe: options.RecipeArgument = "tiny",
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
    r = options.open_recipe(recipe, set_, print_recipe, json_).recipe
    wanted = [name.value for name in with_ or ()]
    install_options = " ".join(["--install", *(f"--with {name}" for name in wanted)])
    console.say(f"checking this machine for {recipe}, about 10 s")
    rows = checks.run_checks(r, wanted)
    if print_ or dry_run:
        following = options.command_line("setup", recipe, set_, install_options)
        _emit_plan(rows, following, as_script=print_, as_json=json_)
        return
    artifacts: list[Path] = []
    tried: list[installs.Command] = []
    # A missing package can hide the next problem, so everything is checked again after each repair.
    while install and (commands := [c for c in checks.mending(rows) if c not in tried]):
        artifacts = [installs.install(commands)]
        tried += commands
        rows = checks.run_checks(r, wanted)
    result = Result(
        _table(rows), artifacts, _figures(rows), options.command_line("download", recipe, set_)
    )
    if failed := [row.name for row in rows if row.status == "fail"]:
        result.code = ExitCode.ENVIRONMENT
        result.error = f"this machine is not ready: {', '.join(failed)}"
        can_install = checks.mending(rows) and not install
        following = install_options if can_install else ""
        result.next = options.command_line("setup", recipe, set_, following)
    console.emit(result, as_json=json_)
    raise typer.Exit(result.code)


def _emit_plan(rows: list[Check], following: str, *, as_script: bool, as_json: bool) -> None:
    commands = checks.mending(rows)
    shown = [shlex.join(command) for command in commands]
    if as_script:
        failed = [row for row in rows if row.status == "fail" and not row.commands]
        text = installs.script(commands, [f"{row.name}: {row.fix}" for row in failed])
    else:
        text = "\n".join(shown) or "nothing to install"
    figures = {"commands": shown, **_figures(rows)}
    console.emit(Result(text, figures=figures, next=following), as_json=as_json)


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
