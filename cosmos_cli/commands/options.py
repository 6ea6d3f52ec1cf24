"""Define the options that several verbs share, and open a verb's recipe.

Importing the recipe's pydantic model would slow down `cosmos --help`, so commands import it when
they run.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console, ranks
from cosmos_cli.download import hub

if TYPE_CHECKING:
    from cosmos_cli.recipe.loading import LoadedRecipe


def shipped_names() -> list[str]:
    """Return the names of the shipped recipes, for shell completion."""
    from cosmos_cli.recipe import loading

    return list(loading.shipped())


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped recipe.",
        autocompletion=shipped_names,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the recipe; repeatable."),
]
PrintRecipeOption = Annotated[
    bool,
    typer.Option("--print-recipe", help="Print every value with its origin and exit."),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and exit.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Replace existing files without asking.")]


def open_recipe(
    name: str,
    overrides: list[str] | None,
    print_recipe: bool,
    as_json: bool,
    *,
    trains: bool = True,
) -> LoadedRecipe:
    """Load the recipe of a command; with --print-recipe print it and exit.

    Args:
        name: the path or shipped name of the recipe.
        overrides: the values of --set.
        print_recipe: True with --print-recipe.
        as_json: True with --json.
        trains: False for verbs that follow a training, when warnings about it come too late.
    """
    from cosmos_cli.recipe import loading

    ranks.check_environment()
    hub.check_endpoint()
    loaded = loading.load(name, overrides or ())
    if print_recipe:
        figures = {"recipe": loaded.recipe.model_dump(), "origins": dict(loaded.origins)}
        console.emit(console.Result(loading.explain(loaded), figures=figures), as_json=as_json)
        raise typer.Exit
    for warning in loaded.warnings if trains else ():
        console.warn(warning)
    return loaded


def command_line(verb: str, recipe: str, overrides: list[str] | None, extra: str = "") -> str:
    """Return the command of another verb on the same recipe, to paste into a shell."""
    words = ["cosmos", verb, recipe]
    for override in overrides or ():
        words += ["--set", override]
    return " ".join(filter(None, [shlex.join(words), extra]))
