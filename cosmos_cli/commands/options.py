"""The options that several verbs share, and how a verb opens its recipe.

The recipe's model takes longer to import than `cosmos --help` may last, so commands import it when
they run.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console

if TYPE_CHECKING:
    from cosmos_cli.recipe import LoadedRecipe


def shipped_names() -> list[str]:
    """The names that a shell completes."""
    from cosmos_cli import recipe

    return list(recipe.shipped())


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped one.",
        autocompletion=shipped_names,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key; may be given repeatedly."),
]
PrintRecipeOption = Annotated[
    bool,
    typer.Option("--print-recipe", help="Print every value with its origin, and do nothing else."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask before replacing something.")]


def open_recipe(
    name: str,
    overrides: list[str] | None,
    print_recipe: bool,
    as_json: bool,
    *,
    trains: bool = True,
) -> LoadedRecipe:
    """The recipe of a command; with --print-recipe prints it and exits.

    What is odd about it is printed where it leads to a training; it is of no use behind one.
    """
    from cosmos_cli import recipe

    loaded = recipe.load(name, overrides or ())
    if print_recipe:
        figures = {"recipe": loaded.recipe.model_dump(), "origins": dict(loaded.origins)}
        console.emit(console.Result(recipe.explain(loaded), figures=figures), as_json=as_json)
        raise typer.Exit
    for warning in loaded.warnings if trains else ():
        console.warn(warning)
    return loaded


def command_line(verb: str, name: str, overrides: list[str] | None, extra: str = "") -> str:
    """The command of another verb on the same recipe, ready to paste into a shell."""
    words = ["cosmos", verb, name]
    for override in overrides or ():
        words += ["--set", override]
    return " ".join(filter(None, [shlex.join(words), extra]))
