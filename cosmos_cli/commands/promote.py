"""`cosmos promote`: turn a checkpoint into a verified model that generate loads."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cosmos_cli import console, files, paths
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import asset_error, usage_error
from cosmos_cli.paths import Run

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# A file name may have 255 bytes. The rest is for the model's name and temporary suffixes.
LONGEST_NAME = 100


StepOption = Annotated[
    str,
    typer.Option(
        help="latest, best (on held-out clips), or the number of a saved step.",
        autocompletion=options.one_of("latest", "best"),
    ),
]
WeightsOption = Annotated[
    Literal["ema", "reg"],
    typer.Option(help="ema: the averaged weights. reg: those of the last step."),
]
FormatOption = Annotated[
    Literal["pt", "safetensors", "diffusers"],
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="pt (NVIDIA's scripts read it too), safetensors or diffusers.",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        help="Write the model to <Model>_post-trained_NAME and keep the others; "
        "use it with generate --model NAME."
    ),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        metavar="OWNER/NAME",
        help="Also push the model to this repository of the Hugging Face hub, which is created "
        "private. The token is HF_TOKEN or that of `hf auth login`.",
    ),
]
PublicOption = Annotated[
    bool, typer.Option("--public", help="Make the repository of --push public.")
]
YesOption = Annotated[
    bool,
    typer.Option("--yes", help="Replace files of other runs; without it, they are refused."),
]


def promote(
    recipe: options.RecipeArgument = "tiny",
    step: StepOption = "latest",
    weights: WeightsOption = "ema",
    format_: FormatOption = "pt",
    name: NameOption = None,
    push: PushOption = None,
    public: PublicOption = False,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    yes: YesOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Turn a checkpoint of a run into the model that generate loads.

    Example: cosmos promote nemo_assets --step 2000
    """
    from cosmos_cli.train import resumes

    r = options.open_recipe(recipe, set_, print_recipe, json_, trains=False).recipe
    run = Run(r.run_dir)
    resumes.require_model(r, run)
    number = choose_step(run, step, weights)
    if name is not None:
        check_name(name)
    check_push(push, public)
    target = paths.promoted_dir(r.spec, r.checkpoints_dir, name)
    wanted = {"step": number, "weights": weights, "format": format_}
    if push:
        from cosmos_cli import push as hub_push

        hub_push.require_allowed(push, run, public, yes)
    if push and is_up_to_date(target, run, wanted):
        console.say(f"step {number} ({weights}) of {r.run_dir} is promoted to {target}")
        manifest = files.read_json(target / paths.MANIFEST_FILE)
    else:
        console.say(f"promoting step {number} ({weights}) of {r.run_dir} to {target}")
        other_name = r.name if name != r.name else f"{r.name}_2"
        words = f"{_chosen_options(step, weights, format_)} --name {other_name}"
        aside = options.command_line("promote", recipe, set_, words.strip())
        manifest = _promote(r, target, wanted, aside, yes, dry_run)
    figures = {**wanted, "sha256": manifest.get("sha256", "")}
    if dry_run:
        figures = {"dry_run": True, "step": number, "path": str(target)}
    if push:
        figures["push"] = _push(r, push, wanted, target if manifest else None, public, dry_run)
    next_ = "" if dry_run else shlex.join(_generate_command(r, target, name))
    artifacts = [] if dry_run else [target / paths.MODEL_FORMATS[format_]]
    console.emit(Result(str(target), artifacts, figures, next_), as_json=json_)


def _promote(
    r: Recipe, target: Path, wanted: dict[str, Any], aside: str, yes: bool, dry_run: bool
) -> dict[str, Any]:
    """Promote a checkpoint and return the manifest of the model; a dry run checks and returns {}.

    Raises:
        UserError: the folder holds something else, or a file is missing or damaged.
    """
    from cosmos_cli import exchange
    from cosmos_cli.download import assets

    run = Run(r.run_dir)
    if _base_of(r, run).resolve().is_relative_to(target.resolve()):
        what = "holds the base of this run, without which it cannot be promoted again"
        raise usage_error(target, what, f"keep both with `{aside}`")
    if dry_run:
        require_replaceable(target, run, yes, aside)
        assets.require_networks(r, _base_of(r, run))
        return {}
    with exchange.alone(target):
        require_replaceable(target, run, yes, aside)

        from cosmos_cli import promote as model_promote

        step, weights, format_ = wanted["step"], wanted["weights"], wanted["format"]
        manifest = model_promote.promote(r, step, weights, format_, target)
    changes = [(group, f"{change:.2e}") for group, change in manifest["relative_change"].items()]
    console.say(console.table(changes, ("weights", "relative change")))
    return manifest


def _push(
    r: Recipe, repo: str, wanted: dict[str, Any], folder: Path | None, public: bool, dry_run: bool
) -> dict[str, Any]:
    """Push the model in a folder, or print what a push would do; return the figures.

    Without a folder the model is not promoted yet, and only its large files are known.
    """
    from cosmos_cli import push as hub_push
    from cosmos_cli import push_files

    if folder:
        items = push_files.of_model(r, folder, repo)
    else:
        run = Run(r.run_dir)
        items = push_files.planned(r, run, wanted, _base_of(r, run))
    if dry_run:
        return hub_push.preview(repo, items)
    step, weights = wanted["step"], wanted["weights"]
    title = f"Add {r.model}, post-trained as {r.name}, step {step} ({weights})"
    return hub_push.push(repo, items, title, public)


def check_push(push: str | None, public: bool) -> None:
    """Refuse a --push that is not OWNER/NAME, and --public without it.

    Raises:
        UserError: an option is refused.
    """
    from cosmos_cli.push import is_repository

    if public and push is None:
        raise usage_error("--public", "has no effect without --push", "add `--push OWNER/NAME`")
    if push is not None and not is_repository(push):
        fix = "give your name on the hub and a new one: `--push OWNER/NAME`"
        raise usage_error("--push", f"{push[:LONGEST_NAME]!r} is not the name of a repository", fix)


def is_up_to_date(target: Path, run: Run, wanted: dict[str, Any]) -> bool:
    """True if a folder holds, undamaged, what promote would write of a checkpoint.

    So a push that failed continues without promoting again.
    """
    from cosmos_cli import hashes
    from cosmos_cli.generate import promoted

    try:
        manifest = promoted.manifest_of(target)
        weights = target / paths.MODEL_FORMATS[wanted["format"]]
        if run.root.as_posix() != manifest.get("run") or not manifest.items() >= wanted.items():
            return False
        pairs = [(weights, manifest["sha256"])]
        pairs.append((Path(manifest["checkpoint"]["path"]), manifest["checkpoint"]["sha256"]))
        if "lora" in manifest:
            pairs.append((target / paths.LORA_FILE, manifest["lora"]["sha256"]))
            # Earlier versions did not write it.
            files.require_regular(target / paths.COMFYUI_LORA_FILE, files.WEIGHTS)
        return all(hashes.sha256_path(path) == sha256 for path, sha256 in pairs)
    except files.BadFile:
        return False


def _base_of(r: Recipe, run: Run) -> Path:
    """Return the base weights of a run, which promote compares its weights with."""
    from cosmos_cli.train import resumes

    return resumes.trained_recipe(r, run).model_files.dit


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
    raise usage_error("--name", what, fix)


def _chosen_options(step: str, weights: str, format_: str) -> str:
    """Return the options that differ from their defaults, as they are typed."""
    chosen = {"step": (step, "latest"), "weights": (weights, "ema"), "format": (format_, "pt")}
    return " ".join(f"--{key} {value}" for key, (value, usual) in chosen.items() if value != usual)


def _generate_command(r: Recipe, target: Path, name: str | None) -> list[str]:
    """Return a generate command with a prompt of the training, and --model where needed.

    A Video2World model is found by its input, which the user must name.
    """
    manifest = r.dataset.manifest
    captions = [
        video["caption"]
        for video in (files.read_json(manifest)["videos"] if manifest.exists() else ())
        if video["verdict"] == "used"
    ]
    prompt = captions[0] if captions else r.prompt or "A red ball moves left."
    elsewhere = target.parent != Path("checkpoints").absolute()
    model = str(target) if elsewhere else name
    shown = ["--image", "FILE"] if r.spec.takes_frames else []
    own = ["--model", model] if model else []
    return ["cosmos", "generate", *shown, "--prompt", prompt, *own]


def require_replaceable(target: Path, run: Run, yes: bool, aside: str) -> None:
    """Refuse to replace files other than a model of this run, unless --yes is given.

    `aside` is the command that keeps both models.

    Raises:
        UserError: the folder holds something else.
    """
    from cosmos_cli.generate import promoted

    with files.disk_errors(target):
        # A folder that is empty or has only hidden files may be replaced.
        there = any(target.glob("[!.]*")) if target.is_dir() else target.exists()
    if yes or not there:
        return
    if promoted.is_of(target, run.root):
        return
    other = promoted.run_of(target)
    what = f"the model of another run, {other}" if other else "files that promote did not write"
    fix = f"keep both with `{aside}`, or replace it with `--yes`"
    raise usage_error(target, f"holds {what}", fix)


def choose_step(run: Run, step: str, weights: str) -> int:
    """Return the saved step that `step` names.

    Raises:
        UserError: the run has no such step.
    """
    from cosmos_cli.train import status

    saved = status.require_saved(run, weights)
    if step == "latest":
        return saved[-1]
    if step == "best":
        best = status.best_step(run, weights)
        if best is None:
            what = "no saved step was measured on held-out clips"
            measured = any(status.HELD_OUT in row for row in status.rows(run))
            how = "set holdout_share in the recipe before prep"
            if measured:
                # A run that was stopped measures its last save when it resumes.
                how = "run `cosmos train RECIPE`"
            raise asset_error(
                run.metrics.absolute(), what, f"use `--step latest`; to measure, {how}"
            )
        return best
    if not step.isdecimal():
        fix = "use `--step latest`"
        raise usage_error("--step", f"{step!r} is neither latest, best nor a number", fix)
    if int(step) not in saved:
        fix = f"use `--step {saved[-1]}`; saved: {', '.join(map(str, saved))}"
        raise asset_error(run.checkpoints.absolute(), f"step {step} is not saved", fix)
    return int(step)
