"""Turn prompts into mp4 files, each with a sidecar and a contact sheet."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer
from typer.core import TyperCommand

from cosmos_cli import console, files, paths
from cosmos_cli.commands import options
from cosmos_cli.errors import Interrupted, UserError, together, usage_error

if TYPE_CHECKING:
    from cosmos_cli.generate.jobs import Result, Settings
    from cosmos_cli.generate.requests import Given, Request
    from cosmos_cli.recipe.keys import Recipe

Compared = Literal["base", "exact"]
RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="[RECIPE]", help="Default: the model's own recipe.")
]
PromptOption = Annotated[
    list[str] | None, typer.Option(help="A description of the video; may be repeated.")
]
BatchOption = Annotated[
    Path | None,
    typer.Option(
        "--batch",
        help="JSONL file. Each line is an object with prompt and, optionally, seed, "
        "negative_prompt, num_steps, guidance, image or video, num_input_frames, and output, a "
        "file inside --output.",
    ),
]
PromptsOption = Annotated[
    str | None,
    typer.Option(
        metavar="-",
        help="Read prompts, or objects as in --batch, from standard input, one per line. Keep "
        "the model loaded and print one JSON line per video.",
    ),
]
ImageOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A png, jpeg or webp picture: the first frame of the video. Uses a Video2World model.",
    ),
]
VideoOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A video to continue, instead of --image.")
]
InputFramesOption = Annotated[
    int | None,
    typer.Option(help="Continue the last 1 or 9 frames of --video. Default: 9."),
]
RolloutOption = Annotated[
    int,
    typer.Option(
        min=1,
        max=1000,
        metavar="N",
        help="Continue the video N - 1 times, from the last 9 frames of each segment.",
    ),
]
SeedOption = Annotated[
    int | None, typer.Option(min=0, max=2**32 - 1, help="Default: sampling_seed.")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="An .mp4 file or a folder.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="promoted, base, the name of a model in checkpoints_dir, or a folder or weights file. "
        "Default: the model promoted last, else the downloaded base, else the tiny model."
    ),
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH[:STRENGTH]",
        help="A LoRA file or its folder. STRENGTH is 1 by default. May be repeated.",
    ),
]
CompareOption = Annotated[
    Compared | None,
    typer.Option(
        help="Also generate with the base model, or with `speed: exact`, and show both side by "
        "side. Default: base."
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", "--yes", help="Generate again and replace existing files.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that share the videos, or split the guidance passes and tokens of each. "
        "Default: one per GPU.",
    ),
]


class Command(TyperCommand):
    """The command line of generate, where the value of --compare may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        for word, following in zip(args, [*args[1:], ""], strict=False):
            words.append(word)
            if word == "--compare" and following not in get_args(Compared):
                words.append("base")
        return super().parse_args(ctx, words)


def generate(
    recipe: RecipeArgument = None,
    prompt: PromptOption = None,
    batch_: BatchOption = None,
    prompts: PromptsOption = None,
    image: ImageOption = None,
    video: VideoOption = None,
    num_input_frames: InputFramesOption = None,
    rollout: RolloutOption = 1,
    seed: SeedOption = None,
    output: OutputOption = Path("outputs"),
    model: ModelOption = None,
    lora: LoraOption = None,
    compare: CompareOption = None,
    overwrite: OverwriteOption = False,
    num_processes: ProcessesOption = None,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Generate videos with the model promoted last, else the downloaded base, else the tiny one.

    Existing videos are not generated again, so the same command resumes where it stopped.
    Example: cosmos generate --prompt "A video of sks teal robot." --set num_steps=20
    """
    from cosmos_cli.generate import batch, choice
    from cosmos_cli.generate.jobs import Settings
    from cosmos_cli.generate.requests import Request, read_batch

    output = files.expand(output)
    if recipe is not None:
        options.name_recipe(recipe, set_)
    overrides = [*(set_ or ()), *([] if seed is None else [f"sampling_seed={seed}"])]
    given = _given(image, video, num_input_frames)
    requests = [Request(text) for text in prompt or ()]
    requests += read_batch(files.expand(batch_)) if batch_ else []
    frames = bool(given or rollout > 1 or any(request.has_input for request in requests))
    chosen = choice.choose_model(recipe, model, overrides, frames=frames)
    overrides = [*chosen.overrides, *overrides]
    r = options.open_recipe(chosen.recipe, overrides, print_recipe, json_, trains=False).recipe
    others = bool(prompt or batch_ or compare or num_processes)
    _check_options(prompts, others, bool(compare and rollout > 1), output, len(requests))
    weights = choice.add_loras(
        choice.find_weights(r, chosen.weights), tuple(map(choice.read_lora, lora or ()))
    )
    settings = Settings(r, weights, output, overwrite, given=given, segments=rollout)
    both = [settings]
    if compare:
        both = batch.compared(settings, compare, chosen.recipe, overrides)
    _announce(settings, requests)
    if dry_run:
        result = _preview(both, [*requests, *(batch.stdin_requests() if prompts else ())])
    elif prompts is None:
        result = _finish(batch.batch(both, requests, num_processes), r, streaming=False)
    else:
        result = _finish(batch.stream(settings), r, streaming=True)
    result.figures["weights"] = {"path": str(weights.path), "sha256": weights.sha256}
    console.emit(result, as_json=json_)


def _check_options(
    prompts: str | None, others: bool, compares_rollout: bool, output: Path, count: int
) -> None:
    """Refuse options that do not go together.

    `others` is True if an option is given that does not go with --prompts, `compares_rollout` if
    --compare and --rollout are given. `count` is the number of videos, 0 if it is not known.

    Raises:
        UserError: two options contradict one another.
    """
    if prompts is None and not count:
        fix = 'use `--prompt "A red ball moves left."`, `--batch FILE` or `--prompts -`'
        raise usage_error("--prompt", "no prompt was given", fix)
    if prompts is not None and (others or prompts != "-"):
        fix = "use `--prompts -` without --prompt, --batch, --compare and --num-processes"
        raise usage_error("--prompts", "reads from standard input only", fix)
    if prompts is not None and sys.stdin is None:
        fix = "pipe prompts into it: `cosmos generate --prompts - < prompts.txt`"
        raise usage_error("--prompts", "standard input is closed", fix)
    if compares_rollout:
        fix = "leave out --rollout or --compare"
        raise usage_error("--compare", "shows single videos side by side", fix)
    if output.suffix.lower() == ".mp4" and output.is_dir():
        fix = f"name a file in it: `--output {shlex.quote(str(output / 'video.mp4'))}`"
        raise usage_error(f"--output {output}", "is a folder", fix)
    if output.suffix.lower() == ".mp4" and (prompts or count > 1):
        fix = "give a folder, such as `--output outputs`"
        raise usage_error("--output", f"one file for {count or 'many'} videos", fix)
    if output.suffix.lower() in paths.VIDEO_SUFFIXES - {".mp4"} and not output.is_dir():
        fix = "name an .mp4 file, or a folder"
        raise usage_error(f"--output {output}", f"{output.suffix} files are not written", fix)


def _given(image: Path | None, video: Path | None, frames: int | None) -> Given | None:
    """Return the input that the options name.

    Raises:
        UserError: they contradict one another.
    """
    from cosmos_cli.generate.requests import Request

    if image and video:
        raise usage_error("--image", "--image and --video are both given", "give one of them")
    path = image or video
    where = "--image" if image else "--video" if video else "--num-input-frames"
    if path:
        return Request("", where).given(files.expand(path), bool(video), frames)
    if frames is not None:
        raise usage_error(where, "needs a video", "add `--video FILE`")
    return None


def _announce(settings: Settings, requests: list[Request]) -> None:
    """Say what is to be generated, and if NVIDIA's command would lengthen a prompt of it."""
    r = settings.r
    steps = "fast" if r.speed == "fast" else f"{r.num_steps} steps"
    segments = f"{settings.segments} segments of " if settings.segments > 1 else ""
    console.say(
        f"{r.model} ({settings.weights.path}): {segments}{r.num_frames} frames, "
        f"{r.width}x{r.height} at {r.fps:g} fps, {steps}, guidance {r.guidance:g}"
    )
    words = [len(request.prompt.split()) for request in requests if request.prompt]
    short = [count for count in words if count <= r.upsampler_word_limit]
    if r.spec.embedded or r.spec.takes_frames or r.upsampler != "off" or not short:
        return
    folder = Path(r.checkpoints_dir, paths.UPSAMPLER_DIR)
    option = f"--set {shlex.quote(f'upsampler={folder}')}"
    fetch = f"run `cosmos download RECIPE {option} --for generate`, then "
    first = "the prompt has" if len(short) == 1 else f"{len(short)} prompts have at most"
    console.say(
        f"{first} {max(short)} words: NVIDIA's command lengthens such prompts by default, here the "
        f"upsampler is off; to turn it on, {'' if folder.is_dir() else fetch}add `{option}`"
    )


def _finish(results: Iterator[Result], r: Recipe, *, streaming: bool) -> console.Result:
    """Run all jobs; return the result of the command if none failed.

    Raises:
        UserError: the gravest error, with the finished videos.
        Interrupted: a signal came; holds the finished videos.
    """
    from cosmos_cli.model.device import gpu_memory_errors
    from cosmos_cli.recipe import advice

    fix = f"use `--set memory=in_turn` or {advice.smaller_clip(r)}"
    seen: list[Result] = []
    try:
        with gpu_memory_errors(fix):
            for result in results:
                seen.append(result)
                if streaming:
                    console.record(result.record())
        if errors := [result.error for result in seen if result.error]:
            raise together(errors)
    except (UserError, Interrupted) as end:
        end.artifacts = _paths(seen)
        end.figures = {"videos": [result.record() for result in seen]}
        raise
    if r.passes < r.exact_passes and any(result.made for result in seen):
        console.say(
            f"speed fast: a video took {r.passes} passes of the denoiser; "
            f"`speed: exact` takes {r.exact_passes}"
        )
    made = _paths(seen)
    shown = made[-1].with_suffix(".html") if made else Path()
    shown = shown if shown.exists() else shown.with_suffix(".mp4")
    return console.Result(
        "" if streaming else "\n".join(map(str, made)),
        list(made),
        {"videos": [result.record() for result in seen], "dry_run": False},
        f"xdg-open {shlex.quote(str(shown))}" if made and not streaming else "",
    )


def _paths(seen: list[Result]) -> tuple[Path, ...]:
    return tuple(result.job.path for result in seen if result.job and result.made)


def _preview(settings: list[Settings], requests: list[Request]) -> console.Result:
    """Return the videos that would be generated.

    Raises:
        UserError: the gravest error of a request, or a network is missing.
    """
    from cosmos_cli.generate import batch

    results = list(batch.plan_all(settings, requests))
    if errors := [result.error for result in results if result.error]:
        raise together(errors)
    todo = [result.job for result in results if result.job and not result.made]
    for own in {job.r.sampling_precision: job.r for job in todo}.values():
        batch.require_other_networks(own)
    text = "\n".join(str(result.job.path) for result in results if result.job)
    figures = {"videos": [result.record() for result in results], "dry_run": True}
    return console.Result(text, figures=figures)
