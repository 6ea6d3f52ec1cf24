"""`cosmos train`: checks, then DeepSpeed over all ranks; the same command resumes."""

from __future__ import annotations

from cosmos_cli import console, launch
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.layout import Run


def train(
    recipe: options.RecipeArgument = "tiny",
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Post-train on the prepared dataset, on all GPUs; the same command resumes.

    Example: cosmos train nemo_assets --set max_steps=400
    """
    launch.mute_all_but_first()
    loaded = options.open_recipe(recipe, set_, print_recipe, json_)
    r = loaded.recipe
    run, ranks = Run(r.run_dir.absolute()), launch.world_size(r)
    launch.check_recipe(r, ranks)
    clips = launch.check_dataset(r)
    start = launch.check_resume(r, run, ranks)
    launch.check_disk(r, run, start)
    figures = {"run_dir": str(run.root), "clips": len(clips), "processes": ranks, "from": start}
    console.say(
        f"{r.model}: {len(clips)} clips, {r.global_batch_size} a step, {ranks} processes, "
        f"ZeRO-{r.zero_stage}, {r.precision}, steps {start} to {r.max_steps}; run {run.root}"
    )
    following = options.command_line("promote", recipe, set_)
    if start >= r.max_steps:
        console.say(f"nothing to do: step {start} is saved; raise max_steps to go on")
        figures["step"] = start
    elif dry_run:
        following = options.command_line("train", recipe, set_)
    elif launch.under_launcher():
        figures |= launch.join(loaded)
    else:
        figures |= launch.start(loaded, ranks)
    artifacts = [run.root] if run.root.exists() else []
    console.emit(Result(str(run.root), artifacts, figures, following), as_json=json_)
