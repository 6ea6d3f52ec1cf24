"""`cosmos promote`: one checkpoint -> the verified model that generate loads."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console, exchange, files, paths
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import promoted
from cosmos_cli.paths import Run
from cosmos_cli.train import status

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# Of 255 bytes, what the rest of the folder's name and the names beside it leave with room to spare.
LONGEST_NAME = 100


def promote(
    recipe: options.RecipeArgument = "tiny",
    step: Annotated[
        str, typer.Option(help="latest, best on held-out clips, or the number of a saved step.")
    ] = "latest",
    weights: Annotated[str, typer.Option(help="ema or reg.")] = "ema",
    format_: Annotated[
        str,
        typer.Option(
            "--format", help="pt, which the reference reads too, safetensors, or diffusers."
        ),
    ] = "pt",
    name: Annotated[
        str | None,
        typer.Option(
            help="Keep the model in <Model>_post-trained_NAME, beside the others; "
            "generate takes it with --model NAME."
        ),
    ] = None,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    yes: options.YesOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Make the model that generate loads from a checkpoint of a run.

    Example: cosmos promote nemo_assets --step 2000
    """
    r = options.open_recipe(recipe, set_, print_recipe, json_, trains=False).recipe
    if format_ not in paths.MODEL_FORMATS:
        raise UserError(
            f"{format_!r} is none of {', '.join(paths.MODEL_FORMATS)}",
            code=ExitCode.USAGE,
            where="--format",
        )
    number = choose_step(Run(r.run_dir), step, weights)
    if name is not None:
        check_name(name)
    target = paths.promoted_dir(r.spec, r.checkpoints_dir, name)
    run = Run(r.run_dir)
    asked = {"step": (step, "latest"), "weights": (weights, "ema"), "format": (format_, "pt")}
    words = [f"--{option} {value}" for option, (value, usual) in asked.items() if value != usual]
    words.append(f"--name {r.name if name != r.name else f'{r.name}_2'}")
    aside = options.command_line("promote", recipe, set_, " ".join(words))
    console.say(f"promoting step {number} ({weights}) of {r.run_dir} to {target}")
    if dry_run:
        require_own(target, run, yes, aside)
        figures = {"dry_run": True, "step": number, "path": str(target)}
        console.emit(Result(str(target), figures=figures), as_json=json_)
        return
    with exchange.alone(target):
        require_own(target, run, yes, aside)

        from cosmos_cli import promote as model_promote

        manifest = model_promote.promote(r, number, weights, format_, target)
    console.say(model_promote.change_table(manifest["relative_change"]))
    console.emit(
        Result(
            str(target),
            artifacts=[target / paths.MODEL_FORMATS[format_]],
            figures={key: manifest[key] for key in ("step", "weights", "format", "sha256")},
            next=shlex.join(_generate_command(r, target, name)),
        ),
        as_json=json_,
    )


def check_name(name: str) -> None:
    """Refuse a --name that cannot be part of a folder's name, or that --model knows otherwise.

    Raises:
        UserError: it is such a name.
    """
    from cosmos_cli.recipe.keys import NAME, PATTERNS

    if name in ("base", "promoted"):
        what = f"--model {name} has a meaning of its own"
    elif not re.fullmatch(NAME, name) or len(os.fsencode(name)) > LONGEST_NAME:
        what = f"{name[:LONGEST_NAME]!r} is not {PATTERNS[NAME]}, {LONGEST_NAME} bytes at most"
    else:
        return
    fix = "choose another, such as --name robots"
    raise UserError(what, code=ExitCode.USAGE, where="--name", fix=fix)


def _generate_command(r: Recipe, target: Path, name: str | None) -> list[str]:
    """A prompt like those of the training, and --model where generate would not look by itself."""
    manifest = paths.Dataset.at(r.dataset_dir, r.videos_dir).manifest
    captions = [
        video["caption"]
        for video in (files.read_json(manifest)["videos"] if manifest.exists() else ())
        if video["verdict"] == "used"
    ]
    prompt = captions[0] if captions else r.prompt or "A red ball moves left."
    elsewhere = target.parent != Path("checkpoints").absolute()
    model = str(target) if elsewhere else name
    return ["cosmos", "generate", "--prompt", prompt, *(["--model", model] if model else ())]


def require_own(target: Path, run: Run, yes: bool, aside: str) -> None:
    """Refuse to replace without --yes what is not a model of this run.

    Args:
        target: the folder that is to be replaced.
        run: the run that is promoted.
        yes: replace it in any case.
        aside: the command that keeps both models.

    Raises:
        UserError: the folder holds something else.
    """
    with files.disk_errors(target):
        # An empty folder, or one with hidden files alone, holds nobody's work.
        there = any(target.glob("[!.]*")) if target.is_dir() else target.exists()
    if yes or not there:
        return
    other = promoted.run_of(target)
    if other == str(run.root):
        return
    what = f"the model of another run, {other}" if other else "files that promote did not write"
    raise UserError(
        f"holds {what}", code=ExitCode.USAGE, where=str(target),
        fix=f"keep both with {aside}, or replace it with --yes",
    )  # fmt: skip


def choose_step(run: Run, step: str, weights: str) -> int:
    """The saved step that `step` names.

    Raises:
        UserError: the run has no such step.
    """
    if weights not in ("ema", "reg"):
        raise UserError(
            f"{weights!r} is neither ema nor reg", code=ExitCode.USAGE, where="--weights"
        )
    saved = run.saved_steps(weights)
    if not saved:
        raise UserError(
            "the run has no checkpoint",
            code=ExitCode.ASSET,
            where=str(run.checkpoints.absolute()),
            fix="run cosmos train first",
        )
    if step == "latest":
        return saved[-1]
    if step == "best":
        best = status.best_step(run)
        if best is None:
            raise UserError(
                "no saved step was measured on held-out clips",
                code=ExitCode.ASSET,
                where=str(run.metrics.absolute()),
                fix="choose a step; a run measures when prep had a holdout_share",
            )
        return best
    if not step.isdecimal():
        raise UserError(
            f"{step!r} is neither latest, best nor a number", code=ExitCode.USAGE, where="--step"
        )
    if int(step) not in saved:
        raise UserError(
            f"step {step} is not saved",
            code=ExitCode.ASSET,
            where=str(run.checkpoints.absolute()),
            fix=f"saved are {', '.join(map(str, saved))}",
        )
    return int(step)
