"""`cosmos train`: check everything, then train on all ranks; the same command resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console, files, ranks
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import UserError
from cosmos_cli.paths import Run
from cosmos_cli.recipe import plan as planner
from cosmos_cli.train import launch, preflight, status

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


def train(
    recipe: options.RecipeArgument = "tiny",
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    status_: Annotated[
        bool, typer.Option("--status", help="Show the state of the run; do not train.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Estimate memory, time and disk; do not train.")
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="8xH100-80GB", help="Plan for other GPUs than this machine's."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Delete weights of an earlier run of this name that cannot be resumed.",
        ),
    ] = False,
    json_: options.JsonOption = False,
) -> None:
    """Post-train on the prepared dataset with all GPUs; the same command resumes.

    Example: cosmos train nemo_assets --set max_steps=400
    """
    ranks.mute_all_but_first()
    loaded = options.open_recipe(recipe, set_, print_recipe, json_)
    r = loaded.recipe
    run, processes = Run(r.run_dir), launch.world_size(r)

    def command(verb: str, extra: str) -> str:
        return options.command_line(verb, recipe, set_, extra)

    if status_:
        stands = status.state(run)
        console.emit(Result(status.state_table(stands), figures=stands), as_json=json_)
        return
    if not gpus:
        preflight.warn_of_hidden_gpus()
    if plan or gpus:
        count, gpu = planner.parse_gpus(gpus) if gpus else (processes, planner.known_gpu())
        preflight.check_world(r, count)
        if not overwrite:
            _warn_of_overwriting(r, run, command)
        figures = planner.check_memory(r, count, gpu)
        console.emit(Result(planner.describe(r, count, gpu), figures=figures), as_json=json_)
        return
    preflight.check_recipe(r, processes)
    clips, held_out = preflight.check_dataset(r)
    start = preflight.check_resume(r, run, processes)
    finished = start >= r.max_steps and status.is_finished(run)
    if not overwrite:
        preflight.check_overwrite(r, run, start, command)
    deleted = _deleted_by_overwriting(run, start) if overwrite else []
    if not finished:
        preflight.check_disk(r, run, start, sum(map(files.size_of, deleted)))
    figures = {
        "run_dir": str(run.root), "clips": clips, "heldout_clips": held_out, "processes": processes,
        "from": start,
    }  # fmt: skip
    what = f"LoRA of rank {r.lora_rank} on {r.model}" if r.lora_rank else r.model
    console.say(
        f"{what}: {clips} clips, {held_out} more held out, {r.global_batch_size} a step, "
        f"{processes} processes, ZeRO-{r.zero_stage}, {r.precision}, "
        f"steps {start} to {r.max_steps}; run {run.root}"
    )
    following = "promote"
    if finished:
        console.say(f"nothing to do: step {start} is saved; raise max_steps to continue")
        figures |= {"step": start, "best_step": status.best_step(run)}
    elif dry_run:
        following = "train"
        figures["deletes"] = [str(path) for path in deleted]
        figures["plan"] = planner.check_memory(r, processes, planner.known_gpu())
        console.say(planner.describe(r, processes, planner.known_gpu()))
    elif ranks.under_launcher():
        figures |= launch.join(loaded, overwrite)
    else:
        preflight.check_gpus(r, processes)
        figures |= launch.start(loaded, processes, overwrite)
    artifacts = [run.root] if run.root.exists() else []
    best = "--step best" if figures.get("best_step") is not None else ""
    next_ = options.command_line(following, recipe, set_, best)
    console.emit(Result(str(run.root), artifacts, figures, next_), as_json=json_)


def _warn_of_overwriting(r: Recipe, run: Run, command: Callable[[str, str], str]) -> None:
    """Warn in a plan if an earlier run's weights would keep the run from starting."""
    try:
        preflight.check_overwrite(r, run, run.last_step, command)
    except UserError as error:
        console.warn(str(error))


def _deleted_by_overwriting(run: Run, start: int) -> list[Path]:
    """Return and report the weight files that --overwrite deletes."""
    if start:
        console.say(f"--overwrite: the run resumes at step {start}, nothing up to it is deleted")
    written = [path for written in run.weight_files(start).values() for path in written]
    if written:
        console.say(f"--overwrite deletes {len(written)} model files of steps after {start}")
    return written
