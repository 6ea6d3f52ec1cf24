"""`cosmos train`: check everything, then train on all ranks; the same command resumes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_cli import console
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import usage_error
from cosmos_cli.paths import Run, promoted_dir

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe
    from cosmos_cli.recipe.loading import LoadedRecipe
    from cosmos_cli.train import preflight


StatusOption = Annotated[
    bool, typer.Option("--status", help="Show the state of the run; do not train.")
]
PlanOption = Annotated[
    bool, typer.Option("--plan", help="Estimate memory, time and disk; do not train.")
]
PcieOption = Annotated[
    int | None,
    typer.Option(min=3, max=5, help="Plan for this PCIe generation; by default that of the GPU."),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Delete weights of an earlier run of this name that cannot be resumed."
    ),
]


def train(
    recipe: options.RecipeArgument = "tiny",
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    status_: StatusOption = False,
    plan: PlanOption = False,
    gpus: options.GpusOption = None,
    pcie: PcieOption = None,
    overwrite: OverwriteOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Post-train on the prepared dataset with all GPUs; the same command resumes.

    Example: cosmos train nemo_assets --set max_steps=400
    """
    from cosmos_cli import ranks
    from cosmos_cli.train import launch, preflight, resumes, status

    ranks.mute_all_but_first()
    loaded = options.open_recipe(recipe, set_, print_recipe, json_)
    r = loaded.recipe
    run, processes = Run(r.run_dir), launch.world_size(r)
    command = partial(options.command_line, recipe=recipe, overrides=set_)
    if status_:
        stands = status.state(run)
        console.emit(Result(status.state_table(stands), figures=stands), as_json=json_)
        return
    if gpus is None:
        preflight.warn_of_hidden_gpus()
    if plan or gpus is not None or pcie:
        if not overwrite:
            resumes.warn_of_overwriting(r, run, command)
        console.emit(_plan(r, processes, gpus, pcie), as_json=json_)
        return
    ready = preflight.check_training(r, run, processes, None if overwrite else command)
    what = f"LoRA of rank {r.lora_rank} on {r.model}" if r.lora_rank else r.model
    console.say(
        f"{what}: {ready.clips} clips, {ready.held_out} more held out, "
        f"{r.global_batch_size} clips a step, {processes} process{'es' if processes > 1 else ''}, "
        f"ZeRO-{r.zero_stage}, {r.precision}, "
        f"steps {ready.start} to {r.max_steps}; run {run.root}"
    )
    figures = {
        "run_dir": str(run.root), "clips": ready.clips, "heldout_clips": ready.held_out,
        "processes": processes, "from": ready.start, **_outcome(loaded, ready, dry_run, overwrite),
    }  # fmt: skip
    artifacts = [path for path in (run.root, run.report) if path.exists()]
    if run.report in artifacts:
        console.say(f"report: {run.report}")
    best = "--step best" if figures.get("best_step") is not None else ""
    promoted = promoted_dir(r.spec, r.checkpoints_dir)
    if r.model_files.dit.resolve().is_relative_to(promoted.resolve()):
        # promote does not replace the base of a run.
        best = f"{best} --name {r.name}".strip()
    following = "train" if dry_run and not ready.finished else "promote"
    next_ = options.command_line(following, recipe, set_, best)
    console.emit(Result(str(run.root), artifacts, figures, next_), as_json=json_)


def _plan(r: Recipe, processes: int, gpus: str | None, pcie: int | None) -> Result:
    """Return what the recipe needs on this machine's GPUs, or on those that are named."""
    from cosmos_cli.recipe import advice, gpu_models
    from cosmos_cli.train import preflight

    count, gpu = processes, preflight.smallest_gpu()
    if gpus is not None:
        count, gpu = gpu_models.parse_gpus(gpus)
        if r.offload == "weights" and count > 1:
            fix = f"use `--gpus 1x{gpu.name}`, or `--set zero_stage=3 --set offload=none`"
            raise usage_error("--gpus", f"weights are streamed to one GPU, found {count}", fix)
    if pcie and gpu is None:
        fix = "add `--gpus 1xH100-80GB`"
        raise usage_error("--pcie", "has no effect, because no known GPU is here", fix)
    gpu = replace(gpu, pcie=pcie) if gpu and pcie else gpu
    preflight.check_world(r, count)
    figures = advice.check_memory(r, count, gpu)
    return Result(advice.describe(r, count, gpu), figures=figures)


def _outcome(
    loaded: LoadedRecipe, ready: preflight.Ready, dry_run: bool, overwrite: bool
) -> dict[str, Any]:
    """Train, or print the plan of a dry run, and return the figures of the result."""
    from cosmos_cli import ranks
    from cosmos_cli.recipe import advice
    from cosmos_cli.train import launch, preflight, status

    r = loaded.recipe
    run, processes = Run(r.run_dir), launch.world_size(r)
    if ready.finished:
        console.say(f"nothing to do: step {ready.start} is saved; raise max_steps to continue")
        return {"step": ready.start, "best_step": status.best_step(run)}
    if dry_run:
        gpu = preflight.smallest_gpu()
        figures = advice.check_memory(r, processes, gpu)
        console.say(advice.describe(r, processes, gpu))
        return {"deletes": [str(path) for path in ready.deletes], "plan": figures}
    if ranks.under_launcher():
        return launch.join(loaded, overwrite)
    preflight.check_gpus(r, processes)
    return launch.start(loaded, processes, overwrite)
