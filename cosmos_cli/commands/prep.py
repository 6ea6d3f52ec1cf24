"""`cosmos prep`: turn videos and captions into metas, text embeddings, latents and a manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosmos_cli import console, paths
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import UserError

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


def prep(
    recipe: options.RecipeArgument = "tiny",
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Prepare a dataset: check every video, then write captions, embeddings and latents.

    Example: cosmos prep my_videos.yaml --set prompt="A video of sks teal robot."
    """
    from cosmos_cli import ranks

    ranks.mute_all_but_first()
    r = options.open_recipe(recipe, set_, print_recipe, json_).recipe
    dataset = r.dataset
    console.say(f"preparing {dataset.videos} into {dataset.root}")
    dataset.video_files()
    from cosmos_cli.gpus import best_device
    from cosmos_cli.model.device import gpu_memory_errors
    from cosmos_cli.prep import prepare, sources
    from cosmos_cli.recipe import advice

    if dry_run:
        console.emit(_dry_run(r, dataset), as_json=json_)
        return

    with (
        console.log_file(dataset.root / "prep.log"),
        gpu_memory_errors(f"use {advice.smaller_clip(r)}"),
    ):
        try:
            manifest = prepare.prepare(r, best_device())
        except UserError:
            console.unmute()
            raise
        verdicts = manifest["videos"]
        rejected = [video for video in verdicts if video["verdict"] == "rejected"]
        _warn_of_rejected(dataset, rejected)
        console.say(
            f"{len(verdicts) - len(rejected)} of {len(verdicts)} videos used, "
            f"{len(rejected)} rejected, {len(manifest['clips'])} clips{_held_out(r, verdicts)}"
        )
    console.say(f"report: {dataset.report}")
    artifacts = [dataset.manifest, dataset.report]
    table, figures = sources.verdict_table(verdicts), _figures(manifest, len(rejected))
    next_ = options.command_line("train", recipe, set_)
    console.emit(Result(table, artifacts, figures, next_), as_json=json_)


def _figures(manifest: dict[str, Any], rejected: int) -> dict[str, Any]:
    keys = ("file", "verdict", "reason", "clips")
    return {
        "used": len(manifest["videos"]) - rejected,
        "rejected": rejected,
        "clips": len(manifest["clips"]),
        "captions_unused": manifest.get("captions_unused", {}),
        "captions_cut": manifest.get("captions_cut", {}),
        "videos": [{key: video[key] for key in keys} for video in manifest["videos"]],
    }


def _warn_of_rejected(dataset: paths.Dataset, rejected: list[dict[str, Any]]) -> None:
    """Warn of each rejected video, and count those beyond the first fifty."""
    from cosmos_cli.prep.sources import MOST_LINES

    for video in rejected[:MOST_LINES]:
        # An episode has a name of its own; other videos are named by their path.
        is_file = dataset.name_of(dataset.videos / video["path"]) == video["file"]
        where = dataset.videos / video["path" if is_file else "file"]
        shown = str(where).replace("\n", "\\n")
        console.warn(f"{shown}: rejected: {video['reason']}")
    if len(rejected) > MOST_LINES:
        console.warn(f"{len(rejected) - MOST_LINES} more videos are rejected")


def _dry_run(r: Recipe, dataset: paths.Dataset) -> Result:
    """Inspect the videos and captions, and count the clips and bytes that prep would write."""
    from cosmos_cli.prep import caption_choice, caption_notes, latent_files, prepare, sources

    videos = sources.inspect(r, dataset)
    caption_choice.find_captions(r, dataset, videos)
    notes = caption_notes.collect(r, dataset, videos)
    for line in [*notes.lines(r), *sources.remarks(r, videos)]:
        console.warn(line)
    sources.require_usable(r, dataset, videos)
    prepare.require_ready(r, dataset, videos)
    clips = sum(len(source.clips) for source in videos)
    bytes_needed = clips * latent_files.latent_bytes(r)
    console.say(f"would cache {clips} clips in {console.size(bytes_needed)}")
    figures = {"dry_run": True, "clips": clips, "bytes": bytes_needed, **notes.figures()}
    rows = [sources.manifest_row(dataset, source, "") for source in videos]
    return Result(sources.verdict_table(rows), figures=figures)


def _held_out(r: Recipe, verdicts: list[dict[str, Any]]) -> str:
    """Return how many videos are held out; warn if holdout_share asks for some and none are."""
    if not r.holdout_share:
        return ""
    count = sum(video.get("split") == "heldout" for video in verdicts)
    if not count:
        console.warn(
            f"holdout_share {r.holdout_share:g} holds out no video: it takes at least two "
            "different ones; training has no held-out error, and `--step best` is impossible"
        )
    return f"; {count} held out, holdout_share {r.holdout_share:g} of the videos"
