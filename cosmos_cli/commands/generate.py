"""`cosmos generate`: prompt -> mp4, sidecar and contact sheet."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_cli import console, layout
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import ExitCode, Interrupted, UserError

if TYPE_CHECKING:
    from cosmos_cli.keys import Recipe
    from cosmos_cli.model.generate import Job

# As for sampling_seed.
MAX_SEED = 2**32


def generate(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="Default: the recipe of the promoted model."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to show; may be given repeatedly.")
    ] = None,
    batch: Annotated[
        Path | None, typer.Option(help="JSONL file: an object with prompt, and maybe seed, a line.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: sampling_seed.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="An .mp4 file, or a folder.")
    ] = Path("outputs"),
    model: Annotated[
        str, typer.Option(help="promoted, base, or a folder or weights file.")
    ] = "promoted",
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Generate videos with the model promoted last, or the embedded tiny one.

    Example: cosmos generate --prompt "A video of sks teal robot." --set num_steps=20
    """
    overrides = [*(set_ or ()), *([] if seed is None else [f"sampling_seed={seed}"])]
    name, folder = choose_model(recipe, model, overrides)
    r = options.open_recipe(name, overrides, print_recipe, json_).recipe
    weights = folder or layout.model_files(r.spec, r.checkpoints_dir, r.base).dit
    weights = weights / layout.MODEL_FILE if (weights / layout.MODEL_FILE).is_file() else weights
    if not weights.exists():
        raise UserError(
            "the weights are missing", code=ExitCode.ASSET, where=str(weights),
            fix="run cosmos download, or choose a --model",
        )  # fmt: skip
    from cosmos_cli.model import generate as model_generate
    from cosmos_cli.model.device import best_device, gpu_memory_errors

    jobs = _jobs(r, prompt or [], batch, output)
    console.say(
        f"{r.model} ({weights}): {len(jobs)} videos of {r.num_frames} frames, "
        f"{r.width}x{r.height} at {r.fps:g} fps, {r.num_steps} steps, guidance {r.guidance:g}"
    )
    if not dry_run:
        done: list[Path] = []
        try:
            with gpu_memory_errors("set a smaller height, width or num_frames"):
                for job in model_generate.generate(r, weights, jobs, best_device()):
                    done.append(job.path)
                    console.say(f"saved {job.path}")
        except (UserError, Interrupted) as end:
            end.artifacts = tuple(done)
            raise
    console.emit(_result(jobs, dry_run), as_json=json_)


def choose_model(recipe: str | None, model: str, overrides: list[str]) -> tuple[str, Path | None]:
    """The recipe to use, and the folder or file of weights; None means the recipe's base.

    Raises:
        UserError: --model names nothing that exists.
    """
    if model not in ("promoted", "base"):
        folder = Path(model).absolute()
        if not folder.exists():
            raise UserError(
                "does not exist", code=ExitCode.ASSET, where=f"--model {model}",
                fix="give promoted, base, or a folder or file of weights",
            )  # fmt: skip
        own = folder / "recipe.yaml"
        return recipe or (str(own) if own.is_file() else "tiny"), folder
    if recipe is None:
        newest = layout.newest_promoted("checkpoints") if model == "promoted" else None
        return (str(newest / "recipe.yaml"), newest) if newest else ("tiny", None)
    if model == "base":
        return recipe, None
    from cosmos_cli.recipe import load

    r = load(recipe, overrides).recipe
    promoted = layout.promoted_dir(r.spec, r.checkpoints_dir)
    return recipe, promoted if (promoted / layout.MANIFEST_FILE).is_file() else None


def _jobs(r: Recipe, prompts: list[str], batch: Path | None, output: Path) -> list[Job]:
    """One job for every prompt; a batch's own seeds win over sampling_seed."""
    from cosmos_cli.model.generate import Job, file_stem

    wanted: list[tuple[str, int]] = [(prompt, r.sampling_seed) for prompt in prompts]
    wanted += [
        (entry["prompt"], entry.get("seed", r.sampling_seed))
        for entry in (_read_batch(batch) if batch else ())
    ]
    if not wanted:
        raise UserError(
            "nothing to show", code=ExitCode.USAGE, where="--prompt",
            fix='give --prompt "..." or --batch FILE',
        )  # fmt: skip
    for prompt, _ in wanted:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            where = f"prompt {prompt!r}"
            raise UserError("is no text", code=ExitCode.USAGE, where=where) from error
        if not prompt.strip():
            raise UserError(
                "is empty", code=ExitCode.USAGE, where="--prompt", fix="say what to show"
            )
    if output.suffix.lower() == ".mp4":
        if len(wanted) > 1:
            raise UserError(
                f"one file for {len(wanted)} videos", code=ExitCode.USAGE, where="--output",
                fix="give a folder",
            )  # fmt: skip
        return [Job(*wanted[0], output.absolute())]
    folder = output.absolute()
    return [Job(p, s, folder / f"{file_stem(p, s)}.mp4") for p, s in dict.fromkeys(wanted)]


def _read_batch(path: Path) -> list[dict[str, Any]]:
    """The entries of a JSONL file; blank lines are skipped.

    Raises:
        UserError: the file is missing or a line is no object with a prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", code=ExitCode.USAGE, where=str(path)) from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        fine = isinstance(entry, dict) and isinstance(entry.get("prompt"), str)
        seed = entry.get("seed", 0) if fine else 0
        if not fine or type(seed) is not int or not 0 <= seed < MAX_SEED:
            raise UserError(
                'is no object like {"prompt": "...", "seed": 1}', code=ExitCode.USAGE,
                where=f"{path}:{number}",
            )  # fmt: skip
        entries.append(entry)
    return entries


def _result(jobs: list[Job], dry_run: bool) -> Result:
    videos = [{"prompt": j.prompt, "seed": j.seed, "path": str(j.path)} for j in jobs]
    artifacts = [] if dry_run else [job.path for job in jobs]
    return Result(
        "\n".join(str(job.path) for job in jobs),
        artifacts,
        {"videos": videos, "dry_run": dry_run},
        "" if dry_run else f"xdg-open {shlex.quote(str(jobs[0].path))}",
    )
