"""Choose and report the recipe and the weights for generate and evaluate. No torch."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_cli import archives, console, exchange, files, paths
from cosmos_cli.errors import UserError, asset_error, usage_error
from cosmos_cli.generate import promoted
from cosmos_cli.generate.hash_cache import cached_sha256
from cosmos_cli.generate.jobs import Lora, Weights
from cosmos_cli.recipe import strict_yaml
from cosmos_cli.spec import COSMOS_7B, MODELS, TINY, TINY_VIDEO2WORLD, VIDEO2WORLD_7B, ModelSpec

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# The shipped recipe with the native video size of a model, for weights without a recipe.yaml.
_OWN_SIZES = {
    TINY.name: "tiny", COSMOS_7B.name: "my_videos", VIDEO2WORLD_7B.name: "my_videos_video2world",
}  # fmt: skip
_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Choice:
    """Name a recipe, its weights, and overrides that the user's --set replaces.

    Weights of None stand for the recipe's base model.
    """

    recipe: str
    weights: Path | None = None
    overrides: tuple[str, ...] = ()


def choose_model(
    recipe: str | None, model: str | None, overrides: list[str], *, frames: bool = False
) -> Choice:
    """Return the recipe and weights that RECIPE and --model select; print those not named.

    Without either, use the model promoted last, else the downloaded base, else the tiny model. With
    `frames`, use a Video2World model, which continues given frames, else a Text2World model.

    Raises:
        UserError: --model names nothing that exists, or a promoted model cannot be read.
    """
    if model not in (None, "promoted", "base"):
        return _by_name(recipe, model, overrides)
    if recipe is None:
        return _newest(model, overrides, frames)
    if model == "base":
        return Choice(recipe)
    from cosmos_cli.recipe.loading import load

    r = load(recipe, overrides).recipe
    models = promoted.found(r.checkpoints_dir, r.spec)
    own = [folder for folder in models if promoted.is_of(folder, r.run_dir)]
    if chosen := next(iter(own or models), None):
        _say_promoted(chosen, models, recipe)
        if (run := promoted.run_of(chosen)) and not own:
            console.say(f"this model is from the run {run}, not from this recipe's run {r.run_dir}")
        return Choice(recipe, chosen)
    if model == "promoted":
        raise _none_promoted(r.model)
    console.say(
        f"no {r.model} was promoted in {Path(r.checkpoints_dir).absolute()}: using the base model"
    )
    return Choice(recipe)


# --- without a recipe -----------------------------------------------------------------------------


def _newest(model: str | None, overrides: list[str], frames: bool) -> Choice:
    checkpoints_dir = _typed(overrides, "checkpoints_dir") or "checkpoints"
    spec = MODELS.get(_typed(overrides, "model") or "")
    specs = [spec] if spec else [one for one in MODELS.values() if one.takes_frames == frames]
    models = promoted.found(checkpoints_dir, spec)
    models = [folder for folder in models if spec or _spec(folder) in specs]
    if models:
        choice = _with_own_recipe(models[0], overrides)
        if model == "base":
            return Choice(choice.recipe, None, choice.overrides)
        _say_promoted(models[0], models, choice.recipe)
        return choice
    kind = spec.name if spec else "Video2World" if frames else "Text2World"
    if model == "promoted":
        raise _none_promoted(kind)
    where = Path(checkpoints_dir).absolute()
    for base in specs:
        weights = paths.model_files(base, checkpoints_dir).dit
        if not base.embedded and os.path.lexists(weights):
            console.say(
                f"no {kind} model was promoted in {where}: using the base model {base.name}"
            )
            return _of_spec(base, None)
    if spec:
        return _of_spec(spec, None)
    console.say(
        f"no {kind} model was promoted or downloaded in {where}: using the embedded tiny model, "
        "whose videos are small; name a RECIPE or a --model to use another"
    )
    return _of_spec(TINY_VIDEO2WORLD if frames else TINY, None)


def _spec(folder: Path) -> ModelSpec:
    """Return the model of a promoted folder: that of its recipe, else that of its name."""
    own = folder / "recipe.yaml"
    with contextlib.suppress(UserError):
        entries, _ = strict_yaml.read_entries(own)
        if named := MODELS.get(str(entries["model"].value) if "model" in entries else ""):
            return named
    return promoted.model_of(folder) or COSMOS_7B


def _typed(overrides: list[str], key: str) -> str | None:
    """Return the text that --set gives a key. Errors in it are reported with the recipe's."""
    with contextlib.suppress(UserError):
        values = dict(strict_yaml.parse_override(override) for override in overrides)
        value = values[key].value if key in values else None
        return str(files.expand(value)) if isinstance(value, str) else None
    return None


# --- --model NAME or PATH -------------------------------------------------------------------------


def _by_name(recipe: str | None, model: str, overrides: list[str]) -> Choice:
    checkpoints_dir, spec = _typed(overrides, "checkpoints_dir") or "checkpoints", None
    if recipe is not None:
        from cosmos_cli.recipe.loading import load

        r = load(recipe, overrides).recipe
        checkpoints_dir, spec = r.checkpoints_dir, r.spec
    path = files.expand(model).absolute()
    folders = promoted.named(model, checkpoints_dir, spec)
    if promoted.is_promoted(path):
        exchange.restore(path)
    if model and os.path.exists(path):  # noqa: PTH110 - False, not an error, if unreachable
        if others := [folder for folder in folders if folder != path]:
            console.say(f"--model {model} is the path {path}, not the model {others[0]}")
    elif len(folders) == 1:
        path = folders[0]
    elif folders:
        listed = ", ".join(folder.name for folder in folders)
        raise _no_model(model, f"is the name of {len(folders)} models", f"give one of {listed}")
    else:
        names = [folder.name for folder in promoted.found(checkpoints_dir)]
        there = f", such as {', '.join(names[:_NAMES_SHOWN])}" if names else ""
        raise _no_model(
            model, f"does not exist, neither as a path nor in {Path(checkpoints_dir).absolute()}",
            f"give base, promoted, a path, or the name of a model there{there}",
        )  # fmt: skip
    # A diffusers model keeps its weights in a subfolder.
    inside = path.name in paths.MODEL_FORMATS.values() or not path.is_dir()
    folder = path.parent if inside else path
    if recipe is None:
        choice = _with_own_recipe(folder, overrides)
        recipe, own = choice.recipe, choice.overrides
    else:
        own = ()
    if promoted.is_promoted(folder):
        _say_unverified(folder, recipe)
    return Choice(recipe, path, own)


def _no_model(model: str, what: str, fix: str) -> UserError:
    return asset_error(f"--model {model}", what, fix)


def _none_promoted(kind: str) -> UserError:
    return _no_model(
        "promoted", f"no {kind} model was promoted yet",
        "run `cosmos promote RECIPE`, or add `--model base`",
    )  # fmt: skip


# --- the recipe of a folder -----------------------------------------------------------------------


def _with_own_recipe(folder: Path, overrides: list[str]) -> Choice:
    """Return a folder with its recipe.yaml, else with the shipped recipe for its model."""
    own = folder / "recipe.yaml"
    if own.is_file():
        named = _typed(overrides, "checkpoints_dir")
        return Choice(str(own), folder, () if named else _where_checkpoints_are(own))
    if spec := promoted.model_of(folder):
        return _of_spec(spec, folder)
    console.say(
        f"{folder} has no recipe.yaml: the sizes are those of the recipe tiny; "
        "name a RECIPE to use others"
    )
    return Choice("tiny", folder)


def _where_checkpoints_are(recipe: Path) -> tuple[str, ...]:
    """Return an override of checkpoints_dir if a model folder was moved, as to another machine.

    The other networks are then taken from next to the model or, if none are there, from
    `checkpoints`.
    """
    entries, _ = strict_yaml.read_entries(recipe)
    values = {key: str(entry.value) for key, entry in entries.items()}
    known, spec = values.get("checkpoints_dir"), MODELS.get(values.get("model", ""))
    is_there = known is None or os.path.isdir(known)  # noqa: PTH112 - False if unreachable
    if is_there or (spec and spec.embedded):
        return ()
    next_to, usual = recipe.absolute().parent.parent, Path("checkpoints").absolute()
    networks = (paths.TOKENIZER_DIR, paths.TEXT_ENCODER_DIR)
    place = next_to if any((next_to / name).is_dir() for name in networks) else usual
    console.say(f"{known}, the checkpoints_dir of {recipe}, is not there: using {place}")
    return (f"checkpoints_dir={strict_yaml.dump_value(str(place))}",)


def _of_spec(spec: ModelSpec, weights: Path | None) -> Choice:
    if name := _OWN_SIZES.get(spec.name):
        return Choice(name, weights)
    like = TINY if spec.embedded else COSMOS_7B
    return Choice(_OWN_SIZES[like.name], weights, (f"model={spec.name}",))


# --- for people -----------------------------------------------------------------------------------


def _say_promoted(chosen: Path, models: list[Path], recipe: str) -> None:
    others = [folder.name for folder in models if folder != chosen]
    more = f" and {len(others) - _NAMES_SHOWN} more" if len(others) > _NAMES_SHOWN else ""
    others = others[:_NAMES_SHOWN]
    tail = f", one of {len(models)}; choose with --model: {', '.join(others)}{more}"
    console.say(f"using the promoted model {chosen}{tail if others else ''}")
    _say_unverified(chosen, recipe)


def _say_unverified(folder: Path, recipe: str) -> None:
    """Warn, in one line, about files of promote that a folder lacks."""
    manifest = folder / paths.MANIFEST_FILE
    lacks = []
    if not promoted.manifest_of(folder):
        what = f"names no sha256 in its {manifest.name}" if manifest.is_file() else ""
        lacks.append(f"{what or f'has no {manifest.name}'}, so its weights cannot be verified")
    if not (folder / "recipe.yaml").is_file():
        lacks.append(f"has no recipe.yaml, so the sizes are those of the recipe {recipe}")
    if lacks:
        console.warn(f"{folder} {'; it '.join(lacks)}")


def read_weights(r: Recipe, folder: Path | None) -> Weights:
    """Return the weights with their hash; a promoted model must match its manifest.

    Raises:
        UserError: they are missing or damaged.
    """
    path = folder or r.model_files.dit
    again = "promote RECIPE" if folder and promoted.is_promoted(folder) else "download RECIPE"
    path = paths.weights_in(path)
    if not path.exists():
        fix = f"run `cosmos {again}`, or choose a --model"
        raise asset_error(path, "the weights are missing", fix)
    # A folder of weights has diffusers' config.json or an index of its files. Hashing any other
    # folder would read all of it.
    if path.is_dir() and not [*path.glob("config.json"), *path.glob("*.index*.json")]:
        fix = "give a folder or file of weights"
        raise asset_error(path, f"holds no {', '.join(paths.MODEL_FORMATS.values())}", fix)
    if not path.is_dir():
        archives.check_weights(path)
    before = files.file_id(path)
    found = Weights(path, cached_sha256(path))
    named = path.name in paths.MODEL_FORMATS.values()
    manifest = promoted.manifest_of(path.parent) if named else {}
    if manifest and manifest["sha256"] != found.sha256:
        if files.file_id(path) != before:
            # A promotion exchanged the folder while the old weights were hashed.
            return read_weights(r, folder)
        name = paths.MANIFEST_FILE
        what = (
            f"is damaged: its sha256 is {found.sha256[:12]}, {name} says {manifest['sha256'][:12]}"
        )
        fix = f"run `cosmos promote RECIPE` again; if the weights are yours, delete its {name}"
        raise asset_error(path, what, fix)
    return found


def find_weights(r: Recipe, folder: Path | None) -> Weights:
    """Return the weights to use: for a promoted LoRA, its base and the LoRA if both exist.

    Merging a LoRA into bf16 weights loses a part of its change.

    Raises:
        UserError: they are missing or damaged.
    """
    manifest = promoted.manifest_of(folder) if folder and folder.is_dir() else {}
    if not folder or "lora" not in manifest:
        return read_weights(r, folder)
    path = folder / paths.LORA_FILE
    merged = shlex.quote(str(paths.weights_in(folder)))
    try:
        wanted, sha256 = manifest["base"], manifest["lora"]["sha256"]
        candidates, kept = [Path(wanted["path"])], f"{manifest['lora']['kept']:.0%}"
    except (KeyError, TypeError, ValueError) as error:
        raise _not_promoted(folder / paths.MANIFEST_FILE, merged) from error
    if not path.is_file() or cached_sha256(path) != sha256:
        raise _not_promoted(path, merged)
    candidates += [
        paths.model_files(r.spec, r.checkpoints_dir, base).dit for base in (r.base, None)
    ]
    for base in dict.fromkeys(candidates):
        if base.exists() and cached_sha256(base) == wanted["sha256"]:
            console.say(f"using the base {base} with the LoRA {path}, unmerged")
            return Weights(base, wanted["sha256"], (Lora(path, 1.0, sha256),))
    console.say(
        f"using the merged weights, which kept {kept} of the LoRA's change: its base, "
        f"{wanted['path']} with sha256 {wanted['sha256'][:12]}, is missing"
    )
    return read_weights(r, folder)


def _not_promoted(path: Path, merged: str) -> UserError:
    fix = f"run `cosmos promote RECIPE` again, or use the merged weights: `--model {merged}`"
    return asset_error(path, "is missing or differs from what cosmos promote wrote", fix)


def base_of(r: Recipe, weights: Weights) -> Weights:
    """Return the base's weights; reuse their hash if `weights` are the base with LoRAs."""
    base = paths.weights_in(r.model_files.dit)
    return replace(weights, loras=()) if weights.path == base else read_weights(r, None)


def add_loras(weights: Weights, loras: tuple[Lora, ...]) -> Weights:
    """Return the weights with more LoRAs.

    Raises:
        UserError: the weights include one of them already, so it would be applied twice.
    """
    places = (weights.path, *(used.path for used in weights.loras))
    manifests = [promoted.manifest_of(place.parent) for place in places]
    inside = {(manifest.get("checkpoint") or {}).get("sha256") for manifest in manifests}
    runs = [Path(m["run"]) for m in manifests if "lora" in m and "run" in m]
    for lora in loras:
        if lora.sha256 in inside:
            what = "is in the promoted model already and would be applied twice"
            fix = "leave it out, or choose its strength: `--model base --lora FILE:0.8`"
            raise usage_error(f"--lora {lora.path}", what, fix)
        if any(lora.path.is_relative_to(run) for run in runs):
            console.warn(
                f"{lora.path} comes from the same run as the promoted LoRA; both are applied"
            )
    if len({lora.sha256 for lora in loras}) < len(loras):
        console.warn("one LoRA is given twice; its strengths add up")
    return replace(weights, loras=(*weights.loras, *loras))


def read_lora(text: str) -> Lora:
    """Return the LoRA that PATH or PATH:STRENGTH names; PATH may be a folder of peft or diffusers.

    Raises:
        UserError: the file does not exist, or the strength is not finite.
    """
    name, _, strength = text.rpartition(":")
    try:
        path, share = files.expand(name).absolute(), float(strength)
    except ValueError:
        path, share = files.expand(text).absolute(), 1.0
    fix = "give a LoRA file or its folder, with a strength if not 1: `--lora FILE:0.8`"
    if os.path.isdir(path):  # noqa: PTH112 - as below
        path = _lora_in(path, fix)
    if not os.path.exists(path):  # noqa: PTH110 - False, not an error, if unreachable
        raise asset_error(path, "does not exist", fix)
    if not math.isfinite(share):
        raise usage_error(text, f"{share} is not a strength", fix)
    archives.check_weights(path)
    config = path.with_name(paths.ADAPTER_CONFIG_FILE)
    about = cached_sha256(config) if config.is_file() else ""
    return Lora(path, share, cached_sha256(path), about)


def _lora_in(folder: Path, fix: str) -> Path:
    """Return the one LoRA file of a folder.

    Raises:
        UserError: it holds no LoRA file, or several.
    """
    known = [folder / name for name in paths.ADAPTER_FILES if (folder / name).is_file()]
    found = known or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5])
        what = f"holds several LoRA files: {names}" if found else "holds no LoRA file"
        expected = " or ".join(paths.ADAPTER_FILES[:2])
        raise asset_error(folder, f"{what} (expected {expected})", fix)
    return found[0]
