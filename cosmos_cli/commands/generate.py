"""`cosmos generate`: prompt -> mp4, sidecar and contact sheet."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_cli import console, files, paths
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import ExitCode, Interrupted, UserError, together
from cosmos_cli.generate import jobs, promoted
from cosmos_cli.generate.choice import choose_model
from cosmos_cli.generate.jobs import Lora, Order, Outcome, Weights, Wish

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


RecipeArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RECIPE]", help="Default: the recipe of the model."),
]
PromptOption = Annotated[
    list[str] | None, typer.Option(help="What to show; may be given repeatedly.")
]
BatchOption = Annotated[
    Path | None,
    typer.Option(
        help="JSONL file: an object with prompt, and maybe seed, negative_prompt, num_steps, "
        "guidance, a line."
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        metavar="-",
        help="Read prompts or such objects from standard input, one a line, and keep the "
        "model loaded; one JSON line per video on stdout.",
    ),
]
SeedOption = Annotated[int | None, typer.Option(help="Default: sampling_seed.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="An .mp4 file, or a folder.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="promoted, base, the name of a model in checkpoints_dir, or a folder or weights file. "
        "Default: the model promoted last, else the downloaded base, else the tiny model."
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[:STRENGTH]",
        help="LoRA file, or its folder, to apply in whole or in part; may be given repeatedly.",
    ),
]
CompareOption = Annotated[
    bool,
    typer.Option("--compare", help="The base model's videos too, and both beside each other."),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", "--yes", help="Make again, and replace, what is there.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that share the videos, or the two halves of guidance of one; default: "
        "one per GPU.",
    ),
]


def generate(
    recipe: RecipeArgument = None,
    prompt: PromptOption = None,
    batch: BatchOption = None,
    prompts: PromptsOption = None,
    seed: SeedOption = None,
    output: OutputOption = Path("outputs"),
    model: ModelOption = None,
    lora: LoraOption = None,
    compare: CompareOption = False,
    overwrite: OverwriteOption = False,
    num_processes: ProcessesOption = None,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Generate videos with the model promoted last, else the downloaded base, else the tiny one.

    What is there already is not made again, so the same command goes on where it stopped.
    Example: cosmos generate --prompt "A video of sks teal robot." --set num_steps=20
    """
    overrides = [*(set_ or ()), *([] if seed is None else [f"sampling_seed={seed}"])]
    choice = choose_model(recipe, model, overrides)
    overrides = [*choice.overrides, *overrides]
    r = options.open_recipe(choice.recipe, overrides, print_recipe, json_, trains=False).recipe
    if prompts is not None and (prompt or batch or compare or num_processes or prompts != "-"):
        raise UserError(
            "is for standard input alone", code=ExitCode.USAGE, where="--prompts",
            fix="give --prompts - without --prompt, --batch, --compare and --num-processes",
        )  # fmt: skip
    wishes = [] if prompts else _wishes(prompt or [], batch)
    if output.suffix.lower() == ".mp4" and (prompts or len(wishes) > 1):
        raise UserError(
            f"one file for {len(wishes) or 'many'} videos", code=ExitCode.USAGE, where="--output",
            fix="give a folder",
        )  # fmt: skip
    if output.suffix.lower() in paths.VIDEO_SUFFIXES - {".mp4"} and not output.is_dir():
        raise UserError(
            f"{output.suffix} files are not written", code=ExitCode.USAGE,
            where=f"--output {output}", fix="name an .mp4 file, or a folder",
        )  # fmt: skip
    weights = add_loras(find_weights(r, choice.weights), tuple(map(read_lora, lora or ())))
    order = Order(r, weights, output, overwrite)
    placed = [batch.base_order(order, base_of(r, weights)), order] if compare else [order]
    console.say(
        f"{r.model} ({order.weights.path}): {r.num_frames} frames, {r.width}x{r.height} at "
        f"{r.fps:g} fps, {r.num_steps} steps, guidance {r.guidance:g}"
    )
    if dry_run:
        result = _preview(placed, wishes)
    elif prompts is None:
        result = _finish(batch.batch(placed, wishes, num_processes), streaming=False)
    else:
        result = _finish(batch.stream(order), streaming=True)
    result.figures["weights"] = {"path": str(weights.path), "sha256": weights.sha256}
    console.emit(result, as_json=json_)


def read_weights(r: Recipe, folder: Path | None) -> Weights:
    """The weights to generate with, hashed; those of a promoted model must be what promote wrote.

    Raises:
        UserError: they are missing or damaged.
    """
    path = folder or paths.model_files(r.spec, r.checkpoints_dir, r.base).dit
    again = "promote again" if folder and promoted.is_promoted(folder) else "download"
    path = paths.weights_in(path)
    if not path.exists():
        raise UserError(
            "the weights are missing", code=ExitCode.ASSET, where=str(path),
            fix=f"run cosmos {again}, or choose a --model",
        )  # fmt: skip
    # Of diffusers' it is a folder, with this file; all of another one would be hashed.
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"holds no {', '.join(paths.MODEL_FORMATS.values())}", code=ExitCode.ASSET,
            where=str(path), fix="give a folder or file of weights",
        )  # fmt: skip
    if not path.is_dir():
        files.check_weights(path)
    before = paths.file_id(path)
    found = Weights(path, paths.sha256_path(path))
    named = path.name in paths.MODEL_FORMATS.values()
    manifest = promoted.manifest_of(path.parent) if named else None
    if manifest and manifest["sha256"] != found.sha256:
        if paths.file_id(path) != before:
            # A promotion exchanged the folder while the old weights were hashed.
            return read_weights(r, folder)
        name = paths.MANIFEST_FILE
        raise UserError(
            f"is damaged: its sha256 is {found.sha256[:12]}, {name} says "
            f"{manifest['sha256'][:12]}",
            code=ExitCode.ASSET, where=str(path),
            fix=f"run cosmos promote again; if you put other weights there, delete its {name}",
        )  # fmt: skip
    return found


def find_weights(r: Recipe, folder: Path | None) -> Weights:
    """Return the weights to use: of a promoted LoRA its base and the LoRA, where both are here.

    Merged into bf16 weights, a part of a LoRA's change is lost.

    Raises:
        UserError: they are missing or damaged.
    """
    manifest = _manifest(folder) if folder and folder.is_dir() else {}
    if not folder or "lora" not in manifest:
        return read_weights(r, folder)
    path = folder / paths.LORA_FILE
    merged = shlex.quote(str(paths.weights_in(folder)))
    try:
        wanted, sha256 = manifest["base"], manifest["lora"]["sha256"]
        candidates, kept = [Path(wanted["path"])], f"{manifest['lora']['kept']:.0%}"
    except (KeyError, TypeError, ValueError) as error:
        raise _not_promoted(folder / paths.MANIFEST_FILE, merged) from error
    if not path.is_file() or paths.sha256_file(path) != sha256:
        raise _not_promoted(path, merged)
    candidates += [
        paths.model_files(r.spec, r.checkpoints_dir, base).dit for base in (r.base, None)
    ]
    for base in dict.fromkeys(candidates):
        if base.exists() and paths.sha256_path(base) == wanted["sha256"]:
            console.say(f"using the base {base} with the LoRA {path} beside its weights")
            return Weights(base, wanted["sha256"], (Lora(path, 1.0, sha256),))
    console.say(
        f"using the merged weights, which kept {kept} of the LoRA's change: its base, "
        f"{wanted['path']} with sha256 {wanted['sha256'][:12]}, is not here"
    )
    return read_weights(r, folder)


def _not_promoted(path: Path, merged: str) -> UserError:
    return UserError(
        "is missing or not as cosmos promote wrote it", code=ExitCode.ASSET, where=str(path),
        fix=f"run cosmos promote again, or use the merged weights with --model {merged}",
    )  # fmt: skip


def base_of(r: Recipe, weights: Weights) -> Weights:
    """Return the base's weights, hashed once where `weights` are those with LoRAs beside them."""
    base = paths.weights_in(paths.model_files(r.spec, r.checkpoints_dir, r.base).dit)
    return replace(weights, loras=()) if weights.path == base else read_weights(r, None)


def add_loras(weights: Weights, loras: tuple[Lora, ...]) -> Weights:
    """Return the weights with more LoRAs.

    Raises:
        UserError: the weights have one of them already, so it would count twice.
    """
    places = (weights.path, *(used.path for used in weights.loras))
    manifests = [_manifest(place.parent) for place in places]
    inside = {(manifest.get("checkpoint") or {}).get("sha256") for manifest in manifests}
    runs = [Path(m["run"]) for m in manifests if "lora" in m and "run" in m]
    for lora in loras:
        if lora.sha256 in inside:
            raise UserError(
                "is in the promoted model already and would count twice", code=ExitCode.USAGE,
                where=f"--lora {lora.path}",
                fix="leave it out, or choose its strength with --model base --lora FILE:0.8",
            )  # fmt: skip
        if any(lora.path.is_relative_to(run) for run in runs):
            console.warn(f"{lora.path} is of the run that the promoted LoRA is of: both count")
    if len({lora.sha256 for lora in loras}) < len(loras):
        console.warn("one LoRA is given twice: its strengths add up")
    return replace(weights, loras=(*weights.loras, *loras))


def _manifest(folder: Path) -> dict[str, Any]:
    """Return what promote wrote about the model in a folder, {} for any other folder."""
    path = folder / paths.MANIFEST_FILE
    content = paths.read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def read_lora(text: str) -> Lora:
    """The LoRA that PATH or PATH:STRENGTH names; a folder is one of peft or diffusers.

    Raises:
        UserError: there is no such file.
    """
    name, _, strength = text.rpartition(":")
    try:
        path, share = Path(name).absolute(), float(strength)
    except ValueError:
        path, share = Path(text).absolute(), 1.0
    fix = "give a LoRA file or its folder, and maybe its strength, as in --lora FILE:0.8"
    if os.path.isdir(path):  # noqa: PTH112 - as below
        path = _lora_in(path, fix)
    if not os.path.exists(path):  # noqa: PTH110 - a path that cannot be reached is none
        raise UserError("does not exist", code=ExitCode.ASSET, where=str(path), fix=fix)
    if not math.isfinite(share):
        raise UserError(f"{share} is no strength", code=ExitCode.USAGE, where=text, fix=fix)
    files.check_weights(path)
    config = path.with_name(paths.ADAPTER_CONFIG_FILE)
    about = paths.sha256_file(config) if config.is_file() else ""
    return Lora(path, share, paths.sha256_file(path), about)


def _lora_in(folder: Path, fix: str) -> Path:
    """Return the one LoRA file of a folder.

    Raises:
        UserError: it has none, or several.
    """
    known = [folder / name for name in paths.ADAPTER_FILES if (folder / name).is_file()]
    found = known or sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:5])
        what = f"holds several LoRA files: {names}" if found else "holds no LoRA file"
        expected = " or ".join(paths.ADAPTER_FILES[:2])
        raise UserError(
            f"{what} (expected is {expected})", code=ExitCode.ASSET, where=str(folder), fix=fix
        )
    return found[0]


def _wishes(prompts: list[str], batch: Path | None) -> list[Wish | UserError]:
    """What the options ask for.

    Raises:
        UserError: they ask for nothing, or the batch cannot be read.
    """
    wishes = [*map(Wish, prompts), *(jobs.read_batch(batch) if batch else ())]
    if not wishes:
        raise UserError(
            "nothing to show", code=ExitCode.USAGE, where="--prompt",
            fix='give --prompt "...", --batch FILE or --prompts -',
        )  # fmt: skip
    return wishes


def _finish(outcomes: Iterator[Outcome], *, streaming: bool) -> Result:
    """Sees every outcome through; the result when all are well.

    Raises:
        UserError: the gravest failure, with what was made.
        Interrupted: a signal came, with what was made.
    """
    from cosmos_cli.model.device import gpu_memory_errors

    seen: list[Outcome] = []
    try:
        with gpu_memory_errors("set a smaller height, width or num_frames"):
            for outcome in outcomes:
                seen.append(outcome)
                if streaming:
                    console.record(outcome.record())
        if errors := [outcome.error for outcome in seen if outcome.error]:
            raise together(errors)
    except (UserError, Interrupted) as end:
        end.artifacts = _paths(seen)
        end.figures = {"videos": [outcome.record() for outcome in seen]}
        raise
    paths = _paths(seen)
    shown = paths[-1].with_suffix(".html") if paths else Path()
    shown = shown if shown.exists() else shown.with_suffix(".mp4")
    return Result(
        "" if streaming else "\n".join(map(str, paths)),
        list(paths),
        {"videos": [outcome.record() for outcome in seen], "dry_run": False},
        f"xdg-open {shlex.quote(str(shown))}" if paths and not streaming else "",
    )


def _paths(seen: list[Outcome]) -> tuple[Path, ...]:
    return tuple(outcome.job.path for outcome in seen if outcome.job and outcome.done)


def _preview(orders: list[Order], wishes: Sequence[Wish | UserError]) -> Result:
    """What would be made.

    Raises:
        UserError: the gravest of what would be refused.
    """
    outcomes = [order.place(wish) for order, wish in product(orders, wishes)]
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        raise together(errors)
    text = "\n".join(str(outcome.job.path) for outcome in outcomes if outcome.job)
    figures = {"videos": [outcome.record() for outcome in outcomes], "dry_run": True}
    return Result(text, figures=figures)
