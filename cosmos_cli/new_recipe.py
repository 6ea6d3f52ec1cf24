"""Propose a recipe for a folder of videos, with a reason for every value. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cosmos_cli.paths import Dataset
from cosmos_cli.recipe import strict_yaml, training_plan
from cosmos_cli.recipe.rules import LEAST_SHARE_OF_PIXELS
from cosmos_cli.recipe.training_plan import Machine
from cosmos_cli.spec import COSMOS_7B as SPEC

if TYPE_CHECKING:
    from cosmos_cli.model.video import VideoInfo

# Frame rates within this share of each other count as equal, such as 23.976 and 24.
SAME_RATE = 0.02
# If cropping keeps less than this share of the frames, pad them with black instead.
LEAST_KEPT_BY_CROP = 0.6


class Line(NamedTuple):
    """One line of a recipe: a key, its value and the reason for the value."""

    key: str
    value: Any
    because: str


def propose(
    name: str, folder: Path, videos: Sequence[VideoInfo], captioned: int, machine: Machine
) -> tuple[list[Line], list[str]]:
    """Choose a value for each key from the usable videos and the GPUs.

    Return the lines of the recipe, and lines that say what the run needs.
    """
    from cosmos_cli.model.video import frames_at_policy

    rate, policy = _rate(videos)
    lengths = sorted(frames_at_policy(info, policy.value, rate.value) for info in videos)
    frames = _num_frames(lengths, rate.value)
    height, width, resize = _shape(videos)
    uncaptioned = len(videos) - captioned
    caption = f"{uncaptioned} of {len(videos)} videos have no caption; describe them here"
    places = _places(name, folder)
    held_out = _holdout(len(videos))
    clip = training_plan.Clip(frames.value, height.value, width.value)
    chosen = training_plan.choose_way(clip, lengths, held_out.value, machine)
    if chosen.clip != clip:
        smaller = f"larger or longer clips do not fit on {machine} or do not end in time"
        frames = Line("num_frames", chosen.clip.frames, smaller)
        height = Line("height", chosen.clip.height, smaller)
        width = Line("width", chosen.clip.width, smaller)
    lines = [
        Line("model", SPEC.name, "it is the released model that can be post-trained"),
        *places,
        Line("prompt", f"A video of {name.replace('_', ' ')}.", caption)
        if uncaptioned
        else Line("prompt", None, "every video has its own caption"),
        frames,
        height,
        width,
        resize,
        rate,
        policy,
        held_out,
        *(Line(*row) for row in chosen.lines),
        Line("output_root", "outputs", "the run is saved in output_root/project/group/name"),
        Line("name", name, "it is the name of this recipe"),
    ]
    needs = training_plan.describe_way(chosen, machine)
    shortest = 1 + SPEC.tokenizer.temporal
    if lengths[len(lengths) // 4] < shortest:
        needs += [
            f"At {rate.value:g} fps, many videos have fewer than {shortest} frames.",
            f"With num_frames {frames.value}, the run learns pictures and no motion.",
        ]
    return lines, needs


def to_yaml(choices: Sequence[Line], header: Sequence[str]) -> str:
    """Return the text of the recipe file, with `header` as a comment above the choices."""
    lines = [f"{choice.key}: {strict_yaml.dump_value(choice.value)}" for choice in choices]
    column = max(len(line) for line in lines if len(line) <= 60)
    body = [
        f"{line:<{column}}  # because {choice.because}"
        for line, choice in zip(lines, choices, strict=True)
    ]
    return "\n".join([*(f"# {line}".rstrip() for line in header), "", *body, ""])


def dataset_of(name: str, folder: Path) -> Dataset:
    """Return the dataset that `folder` belongs to, or a new one that does not change `folder`."""
    if (folder / "videos").is_dir():
        return Dataset(folder, folder / "videos")
    if folder.name == "videos" and (folder.parent / "metas").is_dir():
        return Dataset(folder.parent, folder)
    return Dataset(Path("datasets") / name, folder)


def _places(name: str, folder: Path) -> list[Line]:
    dataset = dataset_of(name, folder)
    root = Line("dataset_dir", str(dataset.root), "prep writes captions and latents there")
    if dataset.videos == dataset.root / "videos":
        return [root]
    return [root, Line("videos_dir", str(dataset.videos), "the videos stay where they are")]


def _rate(videos: Sequence[VideoInfo]) -> tuple[Line, Line]:
    rates = Counter(round(info.fps, 3) for info in videos)
    common, count = rates.most_common(1)[0]
    if common >= SPEC.fps * (1 - SAME_RATE):
        fps, reason = SPEC.fps, f"the model was trained at {SPEC.fps:g}"
    else:
        fps, reason = common, "a higher rate would only repeat frames"
    choice = Line("fps", fps, f"{count} of {len(videos)} videos have {common:g}; {reason}")
    if all(abs(rate / fps - 1) <= SAME_RATE for rate in rates):
        return choice, Line("fps_policy", "keep", f"every video has about {fps:g} fps")
    found = f"{common:g} fps is" if len(rates) == 1 else f"{min(rates):g} to {max(rates):g} fps are"
    return choice, Line("fps_policy", "resample", f"{found} resampled to {fps:g}")


def _num_frames(lengths: list[int], fps: float) -> Line:
    """Choose the longest clip for which three of four videos are long enough."""
    lower_quartile = max(lengths[len(lengths) // 4], 1)
    tok = SPEC.tokenizer
    frames = min((lower_quartile - 1) // tok.temporal * tok.temporal + 1, tok.chunk_frames)
    fit = sum(length >= frames for length in lengths)
    reason = f"{fit} of {len(lengths)} videos are long enough at {fps:g} fps"
    more = "" if frames < tok.chunk_frames else "; the model was trained at this length"
    return Line("num_frames", frames, reason + more)


def _shape(videos: Sequence[VideoInfo]) -> tuple[Line, Line, Line]:
    """Choose the size that the model was trained at, or that of smaller videos."""
    (height, width), count = Counter((info.height, info.width) for info in videos).most_common(1)[0]
    size = (SPEC.height, SPEC.width)
    reason = f"the model was trained at {SPEC.width}x{SPEC.height}"
    if sum(info.height > info.width for info in videos) * 2 > len(videos):
        size, reason = size[::-1], f"most videos are in portrait format ({reason})"
    if height * width < LEAST_SHARE_OF_PIXELS * size[0] * size[1]:
        step = SPEC.size_multiple
        most = SPEC.max_size // step
        size = (min(max(height // step, 1), most) * step, min(max(width // step, 1), most) * step)
        reason = f"enlarging them to {SPEC.width}x{SPEC.height} would add cost and no detail"
    shape = size[1] / size[0]
    shares = [
        min(info.width / info.height / shape, shape * info.height / info.width) for info in videos
    ]
    lost = f"{1 - min(shares):.0%}"
    if sum(shares) / len(shares) < LEAST_KEPT_BY_CROP:
        resize = Line("resize", "pad", f"cropping would cut off up to {lost} of a frame")
    else:
        resize = Line(
            "resize", "crop", f"it keeps the proportions and cuts off at most {lost} of a frame"
        )
    return (
        Line("height", size[0], reason),
        Line("width", size[1], f"{count} of {len(videos)} videos are {width}x{height}"),
        resize,
    )


def _holdout(videos: int) -> Line:
    if videos < 2:
        return Line("holdout_share", 0.0, "a single video cannot be held out")
    share = 0.1 if videos >= 10 else 0.2
    return Line("holdout_share", share, "the error on held-out videos chooses the best step")
