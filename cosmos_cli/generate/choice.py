"""Choose the recipe and the weights of generate and evaluate, and say which. No torch."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from cosmos_cli import console, exchange, paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import promoted
from cosmos_cli.generate.promoted import Promoted
from cosmos_cli.recipe import strict_yaml
from cosmos_cli.spec import COSMOS_7B, MODELS, TINY, ModelSpec

# The shipped recipe with the sizes that a model was made for, for weights without a recipe.yaml.
_OWN_SIZES = {TINY.name: "tiny", COSMOS_7B.name: "my_videos"}
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Choice:
    """A recipe, overrides below the user's own, and a folder or file of weights.

    None instead of weights means the recipe's base.
    """

    recipe: str
    weights: Path | None = None
    overrides: tuple[str, ...] = ()


def choose_model(recipe: str | None, model: str | None, overrides: list[str]) -> Choice:
    """Return what the recipe and --model choose; what was not asked for by name is said aloud.

    Without either: the model promoted last, else the downloaded base, else the embedded tiny model.

    Raises:
        UserError: --model names nothing that exists, or a promoted model cannot be looked at.
    """
    if model not in (None, "promoted", "base"):
        return _by_name(recipe, model, overrides)
    if recipe is None:
        return _newest(model, overrides)
    if model == "base":
        return Choice(recipe)
    from cosmos_cli.recipe.loading import load

    r = load(recipe, overrides).recipe
    models = promoted.found(r.checkpoints_dir, r.spec)
    own = [one for one in models if promoted.run_of(one.folder) == str(r.run_dir)]
    if chosen := next(iter(own or models), None):
        _say_promoted(chosen, models, recipe)
        if (run := promoted.run_of(chosen.folder)) and not own:
            console.say(f"it comes from another run than this recipe's, {run}")
        return Choice(recipe, chosen.folder)
    if model == "promoted":
        raise _none_promoted()
    console.say(f"no {r.model} was promoted in {_folder(r.checkpoints_dir)}: using the base model")
    return Choice(recipe)


# --- without a recipe -----------------------------------------------------------------------------


def _newest(model: str | None, overrides: list[str]) -> Choice:
    checkpoints_dir = _typed(overrides, "checkpoints_dir") or "checkpoints"
    spec = MODELS.get(_typed(overrides, "model") or "")
    if models := promoted.found(checkpoints_dir, spec):
        folder = models[0].folder
        choice = _beside(folder)
        if model == "base":
            return Choice(choice.recipe, None, choice.overrides)
        _say_promoted(models[0], models, choice.recipe)
        return choice
    if model == "promoted":
        raise _none_promoted()
    where = _folder(checkpoints_dir)
    for base in (spec,) if spec else MODELS.values():
        weights = paths.model_files(base, checkpoints_dir).dit
        if not base.embedded and os.path.lexists(weights):
            console.say(f"nothing was promoted in {where}: using the base model {base.name}")
            return _of_spec(base, None)
    console.say(
        f"nothing was promoted and no base model downloaded in {where}: using the embedded tiny "
        "model, whose videos are small; a RECIPE or --model chooses another"
    )
    return Choice("tiny")


def _typed(overrides: list[str], key: str) -> str | None:
    """Return the text that --set gives a key; what is wrong with it is found with the recipe."""
    with contextlib.suppress(UserError):
        values = dict(strict_yaml.parse_override(override) for override in overrides)
        value = values[key].value if key in values else None
        return os.path.expanduser(value) if isinstance(value, str) else None  # noqa: PTH111
    return None


# --- --model NAME or PATH -------------------------------------------------------------------------


def _by_name(recipe: str | None, model: str, overrides: list[str]) -> Choice:
    checkpoints_dir, spec = _typed(overrides, "checkpoints_dir") or "checkpoints", None
    if recipe is not None:
        from cosmos_cli.recipe.loading import load

        r = load(recipe, overrides).recipe
        checkpoints_dir, spec = r.checkpoints_dir, r.spec
    path = Path(os.path.expanduser(model)).absolute()  # noqa: PTH111
    folders = promoted.named(model, checkpoints_dir, spec)
    if promoted.is_promoted(path):
        exchange.restore(path)
    if model and os.path.exists(path):  # noqa: PTH110 - a path that cannot be reached is none
        if others := [folder for folder in folders if folder != path]:
            console.say(f"--model {model} is the path {path}, not the model {others[0]}")
    elif len(folders) == 1:
        path = folders[0]
    elif folders:
        names = ", ".join(folder.name for folder in folders)
        raise _no_model(model, f"is the name of {len(folders)} models", f"give one of {names}")
    else:
        raise _unknown_name(model, checkpoints_dir)
    # The weights of a diffusers model are a folder inside the model's.
    inside = path.name in paths.MODEL_FORMATS.values() or not path.is_dir()
    folder = path.parent if inside else path
    if recipe is None:
        choice = _beside(folder)
        recipe, own = choice.recipe, choice.overrides
    else:
        own = ()
    if promoted.is_promoted(folder):
        _say_unverified(folder, recipe)
    return Choice(recipe, path, own)


def _unknown_name(model: str, checkpoints_dir: str) -> UserError:
    names = [one.folder.name for one in promoted.found(checkpoints_dir)]
    there = f", such as {', '.join(names[:_NAMES_SHOWN])}" if names else ""
    where = _folder(checkpoints_dir)
    return _no_model(
        model, f"does not exist, neither as a path nor in {where}",
        f"give base, promoted, a path, or the name of a model there{there}",
    )  # fmt: skip


def _no_model(model: str, what: str, fix: str) -> UserError:
    return UserError(what, code=ExitCode.ASSET, where=f"--model {model}", fix=fix)


def _none_promoted() -> UserError:
    return _no_model("promoted", "nothing was promoted yet", "run cosmos promote, or take the base")


# --- the recipe of a folder -----------------------------------------------------------------------


def _beside(folder: Path) -> Choice:
    """Return a folder with its recipe.yaml, else with the shipped recipe that its name asks for."""
    own = folder / "recipe.yaml"
    if own.is_file():
        return Choice(str(own), folder)
    if spec := promoted.model_of(folder):
        return _of_spec(spec, folder)
    console.say(
        f"{folder} has no recipe.yaml: the sizes are those of the recipe tiny; name another"
    )
    return Choice("tiny", folder)


def _of_spec(spec: ModelSpec, weights: Path | None) -> Choice:
    name = _OWN_SIZES.get(spec.name)
    if name:
        return Choice(name, weights)
    return Choice(_OWN_SIZES[COSMOS_7B.name], weights, (f"model={spec.name}",))


# --- for people -----------------------------------------------------------------------------------


def _say_promoted(chosen: Promoted, models: list[Promoted], recipe: str) -> None:
    others = [one.folder.name for one in models if one is not chosen]
    more = f" and {len(others) - _NAMES_SHOWN} more" if len(others) > _NAMES_SHOWN else ""
    others = others[:_NAMES_SHOWN]
    tail = f", one of {len(models)}; choose with --model: {', '.join(others)}{more}"
    console.say(f"using the promoted model {chosen.folder}{tail if others else ''}")
    _say_unverified(chosen.folder, recipe)


def _say_unverified(folder: Path, recipe: str) -> None:
    """Say in one line what a folder lacks that promote would have written."""
    manifest = folder / paths.MANIFEST_FILE
    lacks = []
    if promoted.manifest_of(folder) is None:
        what = f"names no sha256 in its {manifest.name}" if manifest.is_file() else ""
        lacks.append(f"{what or f'has no {manifest.name}'}, so its weights cannot be verified")
    if not (folder / "recipe.yaml").is_file():
        lacks.append(f"has no recipe.yaml, so the sizes are those of the recipe {recipe}")
    if lacks:
        console.warn(f"{folder} {'; it '.join(lacks)}")


def _folder(checkpoints_dir: str) -> Path:
    return Path(checkpoints_dir).absolute()
