"""Propose a recipe for a folder of videos, with a reason for every value. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cosmos_cli.paths import Dataset
from cosmos_cli.recipe import strict_yaml
from cosmos_cli.spec import COSMOS_7B as SPEC

if TYPE_CHECKING:
    from cosmos_cli.model.video import VideoInfo

# Frame rates within this share of each other count as equal, such as 23.976 and 24.
SAME_RATE = 0.02
# If cropping keeps less than this share of the frames, pad them with black instead.
LEAST_KEPT_BY_CROP = 0.6
SMALLEST_BATCH = 8
# How often the run shows each clip, within the limits on its number of steps.
PASSES = 50
FEWEST_STEPS, MOST_STEPS = 200, 2000


class Line(NamedTuple):
    """One line of a recipe: a key, its value and the reason for the value."""

    key: str
    value: Any
    because: str


def propose(
    name: str, folder: Path, videos: Sequence[VideoInfo], captioned: int, gpus: Sequence[str]
) -> list[Line]:
    """Choose a value for each key from the videos and the GPUs of this machine.

    Args:
        name: the name of the recipe and of its run.
        folder: the folder of the videos.
        videos: the usable videos.
        captioned: the number of videos that have a caption.
        gpus: the names of this machine's GPUs.
    """
    from cosmos_cli.model.video import frames_at_policy

    rate, policy = _rate(videos)
    lengths = sorted(frames_at_policy(info, policy.value, rate.value) for info in videos)
    frames = _num_frames(lengths, rate.value)
    clips = sum(length // frames.value for length in lengths)
    uncaptioned = len(videos) - captioned
    caption = f"{uncaptioned} of {len(videos)} videos have no caption; describe them here"
    return [
        Line("model", SPEC.name, "it is the released model that can be post-trained"),
        *_places(name, folder),
        Line("prompt", f"A video of {name.replace('_', ' ')}.", caption)
        if uncaptioned
        else Line("prompt", None, "every video has its own caption"),
        frames,
        *_shape(videos),
        rate,
        policy,
        *_schedule(clips, gpus),
        Line("output_root", "outputs", "the run is saved in output_root/project/group/name"),
        Line("name", name, "it is the name of this recipe"),
    ]


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


def _shape(videos: Sequence[VideoInfo]) -> list[Line]:
    (height, width), count = Counter((info.height, info.width) for info in videos).most_common(1)[0]
    size = (SPEC.height, SPEC.width)
    trained = f"the model was trained at {SPEC.width}x{SPEC.height}"
    if sum(info.height > info.width for info in videos) * 2 > len(videos):
        size, trained = size[::-1], f"most videos are in portrait format ({trained})"
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
    return [
        Line("height", size[0], trained),
        Line("width", size[1], f"{count} of {len(videos)} videos are {width}x{height}"),
        resize,
    ]


def _schedule(clips: int, gpus: Sequence[str]) -> list[Line]:
    count = max(len(gpus), 1)
    batch = count * -(-SMALLEST_BATCH // count)
    clips = max(clips, 1)
    wanted = round(clips * PASSES / batch, -2)
    steps = int(min(max(wanted, FEWEST_STEPS), MOST_STEPS))
    hardware = (
        f"this machine has {len(gpus)} x {gpus[0]}" if gpus else "no GPU was found on this machine"
    )
    return [
        Line("learning_rate", 4.957595e-5, "NVIDIA's own training uses it"),
        Line("warmup_steps", steps // 20, "it is a twentieth of the run"),
        Line(
            "max_steps", steps, f"each of {clips} clips is seen {steps * batch / clips:.0f} times"
        ),
        Line("save_every_steps", steps // 5, "five checkpoints can be compared"),
        Line(
            "global_batch_size",
            batch,
            f"it is at least {SMALLEST_BATCH} and a multiple of the number of GPUs",
        ),
        Line("micro_batch_size", 1, "one clip fills a GPU"),
        Line("num_processes", "auto", hardware),
        Line(
            "precision",
            "bf16",
            "the model's weights are in bf16, and NVIDIA GPUs since 2020 compute in it",
        ),
    ]
