"""Define the options that several verbs share, and open a verb's recipe.

`cosmos --help` imports every command, so commands import the packages that they use when they run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console
from cosmos_cli.errors import TYPED_RECIPE

if TYPE_CHECKING:
    from cosmos_cli.recipe.loading import LoadedRecipe


# A command in a message has at most this many characters of --set options. Ranks inherit them in a
# variable, which Linux limits to 128 KB.
MOST_WORDS = 2000


def shipped_names() -> list[str]:
    """Return the names of the shipped recipes, for shell completion."""
    from cosmos_cli.recipe import loading

    return list(loading.shipped())


def key_names() -> list[tuple[str, str]]:
    """Return the keys of a recipe with their descriptions, for shell completion."""
    from cosmos_cli.recipe import loading

    return [(row.name, row.description) for row in loading.key_reference()]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped recipe.",
        autocompletion=shipped_names,
    ),
]


def settings(incomplete: str) -> list[str]:
    """Return what may follow --set: KEY= for each key, KEY=VALUE for one that takes few values."""
    from cosmos_cli.recipe import loading

    key, equals, _ = incomplete.partition("=")
    rows = loading.key_reference()
    if not equals:
        return [f"{row.name}=" for row in rows if row.name.startswith(incomplete)]
    takes = next((row.takes for row in rows if row.name == key), "")
    values = takes.removeprefix("one of ") if takes.startswith("one of ") else ""
    values = "true, false" if takes == "true or false" else values
    choices = (f"{key}={value}" for value in values.split(", ") if value)
    return [choice for choice in choices if choice.startswith(incomplete)]


def gpu_choices(incomplete: str) -> list[str]:
    """Return what may follow --gpus."""
    from cosmos_cli.recipe import gpu_models

    return gpu_models.gpu_choices(incomplete)


def one_of(*values: str) -> Callable[[str], list[str]]:
    """Return the shell completion of an option that takes one of some values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key of the recipe; repeatable.",
        autocompletion=settings,
    ),
]
PrintRecipeOption = Annotated[
    bool, typer.Option("--print-recipe", help="Print every value with its origin and exit.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and exit.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
GpusOption = Annotated[
    str | None,
    typer.Option(
        metavar="8xH100-80GB",
        help="Plan for other GPUs than this machine's.",
        autocompletion=gpu_choices,
    ),
]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Replace existing files; without it, they are refused.")
]


def open_recipe(
    name: str,
    overrides: list[str] | None,
    print_recipe: bool,
    as_json: bool,
    *,
    trains: bool = True,
) -> LoadedRecipe:
    """Load the recipe of a command; with --print-recipe print it and exit.

    `trains` is False for verbs that follow a training, when warnings about it come too late.
    """
    from cosmos_cli import ranks
    from cosmos_cli.download import hub
    from cosmos_cli.recipe import loading

    ranks.check_environment()
    hub.check_endpoint()
    name_recipe(name, overrides)
    loaded = loading.load(name, overrides or ())
    if print_recipe:
        figures = {"recipe": loaded.recipe.model_dump(), "origins": dict(loaded.origins)}
        console.emit(console.Result(loading.explain(loaded), figures=figures), as_json=as_json)
        raise typer.Exit
    for warning in loaded.unexpected if trains else ():
        console.warn(warning)
    return loaded


def name_recipe(name: str, overrides: list[str] | None) -> None:
    """Make messages name this recipe in their commands, see `errors.fill_in`."""
    words = recipe_words(name, overrides)
    short = len(words) <= MOST_WORDS
    os.environ[TYPED_RECIPE] = words if short else f"{shlex.quote(name)} --set ..."


def command_line(verb: str, recipe: str, overrides: list[str] | None, extra: str = "") -> str:
    """Return the command of another verb on the same recipe, to paste into a shell."""
    return " ".join(filter(None, ["cosmos", verb, recipe_words(recipe, overrides), extra]))


def recipe_words(recipe: str, overrides: list[str] | None) -> str:
    """Return a recipe and its --set options as words for the shell."""
    words = [recipe]
    for override in overrides or ():
        words += ["--set", override]
    return shlex.join(words)
