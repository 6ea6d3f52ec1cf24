"""`cosmos download`: fetch and verify model weights and the dataset."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console, paths
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import asset_error, dataset_error, environment_error

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# Synthetic clips for the embedded model: of the new concept, and of things that it already knows.
CONCEPT_CLIPS, ORDINARY_CLIPS = 12, 24
# For the Video2World one: of the new law, and of free motion, where it does not show.
BOUNCE_CLIPS, FREE_CLIPS = 12, 16


class Stage(StrEnum):
    """The values of --for."""

    prep = "prep"
    train = "train"
    generate = "generate"
    evaluate = "evaluate"
    all = "all"


def download(
    recipe: options.RecipeArgument = "tiny",
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Verify and repair the files, then test the weights, about a minute."
        ),
    ] = False,
    for_: Annotated[
        Stage,
        typer.Option(
            "--for",
            help="Fetch only the files that this verb needs. The models of evaluate's scores "
            "are fetched with evaluate only.",
        ),
    ] = Stage.all,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Fetch the weights and the dataset of a recipe; complete files are kept.

    Example: cosmos download nemo_assets
    """
    from cosmos_cli.download import assets, fetch

    r = options.open_recipe(recipe, set_, print_recipe, json_).recipe
    wanted = assets.of_recipe(r, for_)
    listings = fetch.survey(fetch.damaged(wanted) if check else wanted)
    fetch.require_room(listings)
    if not dry_run:
        for listing in listings:
            fetch.fetch(listing)
    if check:
        next_ = options.command_line("prep", recipe, set_)
        console.emit(_check(r, next_, dry_run), as_json=json_)
        return
    if r.spec.embedded:
        console.say(f"the weights of {r.model} are part of the package: {paths.EMBEDDED_DIR}")
    root = Path(r.dataset_dir).absolute()
    figures = {"assets": [listing.figures for listing in listings], "dry_run": dry_run}
    if for_ in (Stage.all, Stage.prep):
        _render_clips(r, root, dry_run)
        if not dry_run or r.dataset_repo is None:
            figures["videos"] = _count_videos(r)
            console.say(f"{figures['videos']} videos in {root}")
    following = "prep" if for_ == Stage.all else for_.value
    extra = '--prompt "A red ball moves left."' if following == "generate" else ""
    next_ = options.command_line(following, recipe, set_, extra)
    console.emit(Result(str(root), [root], figures, next_), as_json=json_)


def _render_clips(r: Recipe, root: Path, dry_run: bool) -> None:
    if r.dataset_repo == "embedded":
        bounces = r.spec.takes_frames
        clips = BOUNCE_CLIPS + FREE_CLIPS if bounces else CONCEPT_CLIPS + ORDINARY_CLIPS
        console.say(f"rendering {clips} captioned clips into {root}")
        if not dry_run:
            from cosmos_cli.model.tiny import dataset

            if bounces:
                dataset.write_bounces(root, BOUNCE_CLIPS, FREE_CLIPS, seed=0)
            else:
                dataset.write_mascots(root, CONCEPT_CLIPS, ORDINARY_CLIPS, seed=0)


def _count_videos(r: Recipe) -> int:
    """Count the videos of the dataset.

    Raises:
        UserError: there are none.
    """
    from cosmos_cli.prep import lerobot

    dataset = r.dataset
    if lerobot.is_lerobot(dataset.videos):
        return len(lerobot.episodes(dataset.videos, r.camera))
    count = len(dataset.video_files())
    if not count:
        fix = "put your videos there, or use `--set videos_dir=FOLDER`"
        raise dataset_error(dataset.videos, "has no videos", fix)
    return count


def _check(r: Recipe, next_: str, dry_run: bool) -> Result:
    """Test whether the weights denoise as trained weights should."""
    files = r.model_files
    console.say(f"checking {files.tokenizer} and {files.dit}")
    if dry_run:
        from cosmos_cli.download import assets

        if r.base:
            # The other files are downloaded first.
            assets.require_networks(r, files.dit)
        return Result(figures={"dry_run": True})
    for path in (files.tokenizer, files.dit):
        if not path.exists():
            raise asset_error(path, "is missing", "run `cosmos download RECIPE` first")
    from cosmos_cli.evaluate import first_contact
    from cosmos_cli.gpus import best_device
    from cosmos_cli.model.device import gpu_memory_errors

    device = best_device()
    if device == "cpu" and not r.spec.embedded:
        what = "the downloaded files are complete, but testing the weights needs a GPU"
        raise environment_error(r.model, what, "run the same command on a machine with a GPU")
    with gpu_memory_errors("use a GPU with more memory"):
        figures = first_contact.check_model(r, device)
    return Result("the weights work", figures=figures, next=next_)
