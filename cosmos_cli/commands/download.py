"""`cosmos download`: model weights and the dataset, verified."""

from __future__ import annotations

from pathlib import Path

from cosmos_cli import console, layout
from cosmos_cli import download as hub
from cosmos_cli.commands import options
from cosmos_cli.console import Result

EMBEDDED_CLIPS = 12


def download(
    recipe: options.RecipeArgument = "tiny",
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Fetch the weights and the dataset of a recipe; what is there and whole is kept.

    Example: cosmos download nemo_assets
    """
    r = options.open_recipe(recipe, set_, print_recipe, json_).recipe
    fetched = [hub.fetch(asset, dry_run=dry_run) for asset in hub.assets(r)]
    if r.spec.embedded:
        console.say(f"{r.model}: its weights are part of the package, {layout.EMBEDDED_DIR}")
    root = Path(r.dataset_dir).absolute()
    if r.dataset_repo == "embedded":
        console.say(f"drawing {EMBEDDED_CLIPS} captioned clips into {root}")
        if not dry_run:
            from cosmos_cli.model import world

            world.write_dataset(root, EMBEDDED_CLIPS, seed=0)
    figures = {"assets": fetched, "dry_run": dry_run}
    if not dry_run:
        figures["videos"] = hub.count_videos(r)
        console.say(f"{figures['videos']} videos in {root}")
    console.emit(
        Result(str(root), [root], figures, options.command_line("prep", recipe, set_)),
        as_json=json_,
    )
