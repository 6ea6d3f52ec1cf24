"""`cosmos promote`: turn a checkpoint into a verified model that generate loads."""

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
from cosmos_cli.download import assets
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import promoted
from cosmos_cli.paths import Run
from cosmos_cli.train import status

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# A file name may have 255 bytes. The rest is for the model's name and temporary suffixes.
LONGEST_NAME = 100


def promote(
    recipe: options.RecipeArgument = "tiny",
    step: Annotated[
        str,
        typer.Option(
            help="latest, best (on held-out clips), or the number of a saved step.",
            autocompletion=options.one_of("latest", "best"),
        ),
    ] = "latest",
    weights: Annotated[
        str, typer.Option(help="ema or reg.", autocompletion=options.one_of("ema", "reg"))
    ] = "ema",
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="pt (NVIDIA's scripts read it too), safetensors or diffusers.",
            autocompletion=options.one_of(*paths.MODEL_FORMATS),
        ),
    ] = "pt",
    name: Annotated[
        str | None,
        typer.Option(
            help="Write the model to <Model>_post-trained_NAME and keep the others; "
            "use it with generate --model NAME."
        ),
    ] = None,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    yes: options.YesOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Turn a checkpoint of a run into the model that generate loads.

    Example: cosmos promote nemo_assets --step 2000
    """
    r = options.open_recipe(recipe, set_, print_recipe, json_, trains=False).recipe
    check_format(format_)
    number = choose_step(Run(r.run_dir), step, weights)
    if name is not None:
        check_name(name)
    target = paths.promoted_dir(r.spec, r.checkpoints_dir, name)
    run = Run(r.run_dir)
    other_name = r.name if name != r.name else f"{r.name}_2"
    words = f"{_chosen_options(step, weights, format_)} --name {other_name}"
    aside = options.command_line("promote", recipe, set_, words.strip())
    console.say(f"promoting step {number} ({weights}) of {r.run_dir} to {target}")
    if dry_run:
        require_own(target, run, yes, aside)
        assets.require_networks(r, _base_of(r, run))
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


def check_format(format_: str) -> None:
    """Refuse a --format that does not exist.

    Raises:
        UserError: the format is refused.
    """
    if format_ not in paths.MODEL_FORMATS:
        known = ", ".join(paths.MODEL_FORMATS)
        raise UserError(
            f"{format_!r} is not one of {known}",
            code=ExitCode.USAGE,
            where="--format",
            fix="use `--format pt`",
        )


def _base_of(r: Recipe, run: Run) -> Path:
    """Return the base weights of a run, which promote compares its weights with."""
    from cosmos_cli.recipe import loading

    own = loading.load(run.resolved).recipe if run.resolved.exists() else r
    return own.model_copy(update={"checkpoints_dir": r.checkpoints_dir}).model_files.dit


def check_name(name: str) -> None:
    """Refuse a --name that cannot be part of a folder's name, or that --model reserves.

    Raises:
        UserError: the name is refused.
    """
    from cosmos_cli.recipe.keys import NAME, PATTERNS

    if name in ("base", "promoted"):
        what = f"{name!r} is reserved: --model {name} means something else"
    elif not re.fullmatch(NAME, name) or len(os.fsencode(name)) > LONGEST_NAME:
        what = f"{name[:LONGEST_NAME]!r} is not {PATTERNS[NAME]}, {LONGEST_NAME} bytes at most"
    else:
        return
    fix = "choose another, such as `--name robots`"
    raise UserError(what, code=ExitCode.USAGE, where="--name", fix=fix)


def _chosen_options(step: str, weights: str, format_: str) -> str:
    """Return the options that differ from their defaults, as they are typed."""
    chosen = {"step": (step, "latest"), "weights": (weights, "ema"), "format": (format_, "pt")}
    return " ".join(f"--{key} {value}" for key, (value, usual) in chosen.items() if value != usual)


def _generate_command(r: Recipe, target: Path, name: str | None) -> list[str]:
    """Return a generate command with a prompt of the training, and --model where needed."""
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
    """Refuse to replace files other than a model of this run, unless --yes is given.

    Args:
        target: the folder to replace.
        run: the promoted run.
        yes: replace the folder in any case.
        aside: the command that keeps both models.

    Raises:
        UserError: the folder holds something else.
    """
    with files.disk_errors(target):
        # A folder that is empty or has only hidden files may be replaced.
        there = any(target.glob("[!.]*")) if target.is_dir() else target.exists()
    if yes or not there:
        return
    if promoted.is_of(target, run.root):
        return
    other = promoted.run_of(target)
    what = f"the model of another run, {other}" if other else "files that promote did not write"
    raise UserError(
        f"holds {what}", code=ExitCode.USAGE, where=str(target),
        fix=f"keep both with `{aside}`, or replace it with `--yes`",
    )  # fmt: skip


def choose_step(run: Run, step: str, weights: str) -> int:
    """Return the saved step that `step` names.

    Raises:
        UserError: the run has no such step.
    """
    if weights not in ("ema", "reg"):
        raise UserError(
            f"{weights!r} is neither ema nor reg", code=ExitCode.USAGE, where="--weights",
            fix="use `--weights ema`",
        )  # fmt: skip
    saved = run.saved_steps(weights)
    if not saved:
        raise UserError(
            "the run has no checkpoint",
            code=ExitCode.ASSET,
            where=str(run.checkpoints.absolute()),
            fix="run `cosmos train RECIPE` first",
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
                fix="use `--step latest`; to measure, set holdout_share in the recipe before prep",
            )
        return best
    if not step.isdecimal():
        raise UserError(
            f"{step!r} is neither latest, best nor a number", code=ExitCode.USAGE, where="--step",
            fix="use `--step latest`",
        )  # fmt: skip
    if int(step) not in saved:
        raise UserError(
            f"step {step} is not saved",
            code=ExitCode.ASSET,
            where=str(run.checkpoints.absolute()),
            fix=f"use `--step {saved[-1]}`; saved: {', '.join(map(str, saved))}",
        )
    return int(step)
