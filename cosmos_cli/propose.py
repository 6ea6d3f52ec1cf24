"""A recipe for a folder of videos: every choice with its reason. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cosmos_cli import flatyaml
from cosmos_cli.layout import Dataset
from cosmos_cli.model.spec import COSMOS_7B as SPEC

if TYPE_CHECKING:
    from cosmos_cli.model.video import VideoInfo

# Rates this close are one rate: 23.976 counts as 24.
SAME_RATE = 0.02
# Below this share of a picture, cropping costs more than black borders do.
CROP_KEEPS = 0.6
SMALLEST_BATCH = 8
# How often each clip is seen, and the steps that are sensible whatever that gives.
PASSES = 50
FEWEST_STEPS, MOST_STEPS = 200, 2000


class Choice(NamedTuple):
    """One line of a recipe."""

    key: str
    value: Any
    because: str


def propose(
    name: str, folder: Path, videos: Sequence[VideoInfo], captioned: int, gpus: Sequence[str]
) -> list[Choice]:
    """The choices for `videos` that lie in `folder`, `captioned` of which have a caption."""
    from cosmos_cli.model.video import frames_at_policy

    rate, policy = _rate(videos)
    lengths = sorted(frames_at_policy(info, policy.value, rate.value) for info in videos)
    frames = _num_frames(lengths, rate.value)
    clips = sum(length // frames.value for length in lengths)
    uncaptioned = len(videos) - captioned
    caption = f"{uncaptioned} of {len(videos)} videos have no caption; say here what they show"
    return [
        Choice("model", SPEC.name, "it is the released model that can be post-trained"),
        *_places(name, folder),
        Choice("prompt", f"A video of {name.replace('_', ' ')}.", caption)
        if uncaptioned
        else Choice("prompt", None, "every video has its own caption"),
        frames,
        *_shape(videos),
        rate,
        policy,
        *_schedule(clips, gpus),
        Choice("output_root", "outputs", "runs lie in output_root/project/group/name"),
        Choice("name", name, "it is the name of this recipe"),
    ]


def render(choices: Sequence[Choice], header: Sequence[str]) -> str:
    """The choices as a recipe file under a comment of some lines."""
    lines = [f"{choice.key}: {flatyaml.dump(choice.value)}" for choice in choices]
    column = max(len(line) for line in lines if len(line) <= 60)
    body = [
        f"{line:<{column}}  # because {choice.because}"
        for line, choice in zip(lines, choices, strict=True)
    ]
    return "\n".join([*(f"# {line}".rstrip() for line in header), "", *body, ""])


def dataset_of(name: str, folder: Path) -> Dataset:
    """A dataset around `folder` if it lies in one, else a new one that leaves it untouched."""
    if (folder / "videos").is_dir():
        return Dataset(folder, folder / "videos")
    if folder.name == "videos" and (folder.parent / "metas").is_dir():
        return Dataset(folder.parent, folder)
    return Dataset(Path("datasets") / name, folder)


def _places(name: str, folder: Path) -> list[Choice]:
    dataset = dataset_of(name, folder)
    root = Choice("dataset_dir", str(dataset.root), "prep writes captions and latents there")
    if dataset.videos == dataset.root / "videos":
        return [root]
    return [root, Choice("videos_dir", str(dataset.videos), "the videos stay where they are")]


def _rate(videos: Sequence[VideoInfo]) -> tuple[Choice, Choice]:
    rates = Counter(round(info.fps, 3) for info in videos)
    common, count = rates.most_common(1)[0]
    if common >= SPEC.fps * (1 - SAME_RATE):
        fps, reason = SPEC.fps, f"the model was trained at {SPEC.fps:g}"
    else:
        fps, reason = common, "faster would only repeat frames"
    choice = Choice("fps", fps, f"{count} of {len(videos)} videos have {common:g}; {reason}")
    if all(abs(rate / fps - 1) <= SAME_RATE for rate in rates):
        return choice, Choice("fps_policy", "keep", f"every video has about {fps:g} fps")
    span = f"{min(rates):g} to {max(rates):g}"
    return choice, Choice("fps_policy", "resample", f"the videos have {span} fps")


def _num_frames(lengths: list[int], fps: float) -> Choice:
    """The longest clip that three of four videos are long enough for."""
    enough = max(lengths[len(lengths) // 4], 1)
    tok = SPEC.tokenizer
    frames = min((enough - 1) // tok.temporal * tok.temporal + 1, tok.chunk_frames)
    fit = sum(length >= frames for length in lengths)
    reason = f"{fit} of {len(lengths)} videos have that many at {fps:g} fps"
    more = "" if frames < tok.chunk_frames else "; it is the model's own length"
    return Choice("num_frames", frames, reason + more)


def _shape(videos: Sequence[VideoInfo]) -> list[Choice]:
    (height, width), count = Counter((info.height, info.width) for info in videos).most_common(1)[0]
    size = (SPEC.height, SPEC.width)
    trained = f"the model was trained at {SPEC.height}x{SPEC.width}"
    if sum(info.height > info.width for info in videos) * 2 > len(videos):
        size, trained = size[::-1], f"most videos stand upright ({trained})"
    shape = size[1] / size[0]
    shares = [
        min(info.width / info.height / shape, shape * info.height / info.width) for info in videos
    ]
    lost = f"{1 - min(shares):.0%}"
    if sum(shares) / len(shares) < CROP_KEEPS:
        resize = Choice("resize", "pad", f"cropping would cut off up to {lost} of a picture")
    else:
        resize = Choice("resize", "crop", f"it keeps proportions and cuts off at most {lost}")
    return [
        Choice("height", size[0], trained),
        Choice("width", size[1], f"{count} of {len(videos)} videos are {height}x{width}"),
        resize,
    ]


def _schedule(clips: int, gpus: Sequence[str]) -> list[Choice]:
    count = max(len(gpus), 1)
    batch = count * -(-SMALLEST_BATCH // count)
    clips = max(clips, 1)
    wanted = round(clips * PASSES / batch, -2)
    steps = int(min(max(wanted, FEWEST_STEPS), MOST_STEPS))
    here = (
        f"this machine has {len(gpus)} x {gpus[0]}" if gpus else "no GPU was found on this machine"
    )
    return [
        Choice("learning_rate", 4.957595e-5, "it is the reference's"),
        Choice("warmup_steps", steps // 20, "it is a twentieth of the run"),
        Choice(
            "max_steps", steps, f"each of {clips} clips is seen {steps * batch / clips:.0f} times"
        ),
        Choice("save_every_steps", steps // 5, "five checkpoints can be compared"),
        Choice(
            "global_batch_size",
            batch,
            f"it is a multiple of the GPUs and not below {SMALLEST_BATCH}",
        ),
        Choice("micro_batch_size", 1, "one clip fills a GPU"),
        Choice("num_processes", "auto", here),
        Choice(
            "precision", "bf16", "the model's weights are, and every GPU since 2020 computes in it"
        ),
    ]
