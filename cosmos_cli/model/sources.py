"""The videos of a dataset: which there are, the verdict on each, its clips and its caption."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cosmos_cli import captions, console, layout, lerobot
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.keys import Recipe
from cosmos_cli.layout import VIDEO_SUFFIXES, Dataset
from cosmos_cli.model import video

MAX_CAPTION_BYTES = 1_000_000
# What file systems allow.
MAX_NAME_BYTES = 255


@dataclass
class Source:
    """One video, a file or an episode in one, and what prep decided about it.

    Args:
        name: the file's name, or the episode's; no other video has it.
        span: the frames of the file that are the episode; None for a file of its own.
        task: what a robot was told to do in it.
    """

    name: str
    path: Path
    span: range | None = None
    task: str = ""
    info: video.VideoInfo | None = None
    clips: list[video.Clip] = field(default_factory=list)
    caption: str = ""
    caption_source: str = ""
    reason: str = ""

    @property
    def stem(self) -> str:
        """The name that caption, embedding and latents share."""
        return Path(self.name).stem

    def latent_name(self, clip: video.Clip) -> str:
        """The file name of a clip's latent."""
        return f"{self.stem}.{clip.start:06d}.safetensors"

    def reject(self, reason: str) -> None:
        """Excludes the video; the first reason stays."""
        self.reason = self.reason or reason
        self.clips = []


def inspect(r: Recipe, dataset: Dataset) -> list[Source]:
    """Every video of the dataset with its clips, or the reason why it has none."""
    sources = _find(r, dataset)
    stems: dict[str, str] = {}
    probed: tuple[Path, video.VideoInfo] | None = None
    with console.progress("inspect", len(sources), "videos") as bar:
        for source in sources:
            first = stems.setdefault(source.stem, source.name)
            if first != source.name:
                source.reject(f"shares its name with {first}; rename one")
            else:
                try:
                    # The episodes of a file follow one another; its packets are scanned once.
                    if probed is None or probed[0] != source.path:
                        probed = (source.path, video.probe(source.path))
                    _choose_clips(r, source, probed[1])
                except video.VideoError as error:
                    source.reject(str(error))
            bar.advance(source.name)
    return sources


def _find(r: Recipe, dataset: Dataset) -> list[Source]:
    if not lerobot.is_lerobot(dataset.videos):
        below = (p for p in dataset.videos.glob("*/*") if p.suffix.lower() in VIDEO_SUFFIXES)
        for folder in sorted({path.parent for path in below}):
            console.warn(f"{folder}: the videos in this folder are not taken; move them up")
        return [Source(path.name, path) for path in dataset.video_files()]
    return [
        Source(e.name, e.path, range(e.first, e.first + e.frames), e.task)
        for e in lerobot.episodes(dataset.videos, r.camera)
    ]


def _choose_clips(r: Recipe, source: Source, info: video.VideoInfo) -> None:
    source.info = info if source.span is None else video.part(info, source.span)
    source.clips = video.select_clips(
        source.info, r.fps_policy, r.fps, r.num_frames, r.stride, r.max_clips_per_video
    )
    excess = len(os.fsencode(source.latent_name(source.clips[-1]))) - MAX_NAME_BYTES
    if excess > 0:
        raise video.VideoError(f"its name is {excess} bytes too long to name latents by; rename it")


# --- captions -------------------------------------------------------------------------------------


def known_captions(dataset: Dataset) -> dict[str, Any]:
    """The captions that the last run used, however it ended."""
    if not dataset.captions.exists():
        return {}
    known: dict[str, Any] = layout.read_json(dataset.captions)
    return known


def find_captions(r: Recipe, dataset: Dataset, sources: list[Source]) -> list[Source]:
    """Gives every usable video its caption; those that a vision-language model must see first.

    The first of these holds: `metas`, captions_file, the text beside the video, the robot's task,
    then the model's words or prompt. What prep itself wrote into `metas` does not count as such.
    A video that has none of them is rejected.

    Raises:
        UserError: captions_file cannot be used.
    """
    known = known_captions(dataset).get("videos", {})
    listed: dict[str, str] = {}
    if r.captions_file:
        names = {source.name for source in sources}
        listed, unknown = captions.read(Path(r.captions_file).absolute(), names)
        for line in unknown:
            console.warn(line)
    unseen = []
    for source in sources:
        if source.reason:
            continue
        path = dataset.metas / f"{source.stem}.txt"
        offered = _offered(r, dataset, source, listed.get(source.name, ""))
        meta = read_caption(path, source)
        best = next(filter(None, offered.values()), "")
        # Prep wrote this file from what was offered then; what is offered now holds.
        ours = _is_ours(meta, known.get(source.name, {}))
        source.caption = (best if ours else meta) or best or (meta if r.caption == "given" else "")
        origins = [name for name, text in offered.items() if text == source.caption]
        source.caption_source = origins[0] if origins else "metas"
        if source.caption or source.reason:
            continue
        if r.caption == "vlm" and read_description(r, dataset, source) is None:
            source.caption_source = "vlm"
            unseen.append(source)
        else:
            source.reject(f"no caption: write {path}, or set prompt")
    return unseen


def _offered(r: Recipe, dataset: Dataset, source: Source, listed: str) -> dict[str, str]:
    """The captions of a video by their origin, the first that is not empty holds."""
    beside = source.path.with_suffix(".txt") if source.span is None else None
    offered = {
        "captions_file": listed,
        "sidecar": read_caption(beside, source) if beside else "",
        "task": source.task,
    }
    prompt = captions.one_kind_of_line_end(r.prompt or "").strip()
    if r.caption == "given":
        return {**offered, "prompt": prompt}
    words = read_description(r, dataset, source)
    return {**offered, "vlm": "" if words is None else f"{prompt} {words}".strip()}


def _is_ours(meta: str, known: Mapping[str, str]) -> bool:
    """Whether prep wrote what is in `metas`.

    `known` is the caption of the last run, its source, and what it found in `metas`.
    """
    texts = (known.get("caption"), known.get("replaced"))
    return known.get("caption_source") != "metas" and meta in texts


def description_key(r: Recipe, source: Source) -> str:
    """What decides the words of a vision-language model about a video."""
    file = map(str, layout.stamp_of(source.path))
    return layout.sha256_text(str(r.caption_model), str(source.span), *file)


def read_description(r: Recipe, dataset: Dataset, source: Source) -> str | None:
    """The words of the vision-language model, None when it has not seen the video as it is now."""
    path = dataset.descriptions / f"{source.stem}.json"
    if not path.exists():
        return None
    value = layout.read_json(path)
    words: str = value["caption"]
    return words if value["key"] == description_key(r, source) else None


def read_caption(path: Path, source: Source) -> str:
    """The text of a file, "" when there is none; rejects the video when it cannot be read."""
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            source.reject(f"the caption {path.name} is larger than a megabyte")
            return ""
        # Editors on Windows put a mark in front.
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        source.reject(f"the caption {path.name} is no readable UTF-8 text")
        return ""


def write_captions(r: Recipe, dataset: Dataset, sources: list[Source]) -> None:
    """Notes where every caption comes from, then writes those that are not yet in `metas`.

    The note says what it replaces until that is done, so that a run that ends in between does not
    leave a caption of prep's that looks like a person's.
    """
    used = [source for source in sources if not source.reason]
    notes = {s.name: {"caption": s.caption, "caption_source": s.caption_source} for s in used}
    metas = {s.name: dataset.metas / f"{s.stem}.txt" for s in used}
    stale = {s.name: old for s in used if (old := read_caption(metas[s.name], s)) != s.caption}
    known = known_captions(dataset)
    for source in sources:
        # A copied caption keeps its time, by which it can be older than the pickle of another.
        noted = known.get("videos", {}).get(source.name, {}).get("caption", source.caption)
        if known.get("model", r.model) != r.model or noted != source.caption:
            (dataset.embeddings / f"{source.stem}.pickle").unlink(missing_ok=True)
    if any(stale.values()):
        during = {n: {**note, "replaced": stale.get(n, "")} for n, note in notes.items()}
        layout.write_json(dataset.captions, {"model": r.model, "videos": during})
    else:
        layout.write_json(dataset.captions, {"model": r.model, "videos": notes})
    for name in stale:
        layout.write_text(metas[name], notes[name]["caption"] + "\n")
    if any(stale.values()):
        layout.write_json(dataset.captions, {"model": r.model, "videos": notes})


# --- verdicts -------------------------------------------------------------------------------------


def require_usable(r: Recipe, dataset: Dataset, sources: list[Source]) -> None:
    """Ends prep when nothing is left to train on.

    Raises:
        UserError: there is no video, none can be used, or the recipe is strict and one cannot.
    """
    rejected = [source for source in sources if source.reason]
    also = tuple(
        UserError(source.reason, code=ExitCode.DATASET, where=str(source.path))
        for source in rejected
    )
    if len(rejected) == len(sources):
        found = f"none of {len(sources)} videos can be used" if sources else "holds no videos"
        empty = "put mp4 files there, or set videos_dir"
        if lerobot.is_lerobot(dataset.root):
            empty = f"it is a LeRobot dataset: set videos_dir to {dataset.root}"
        raise UserError(
            found,
            code=ExitCode.DATASET,
            where=str(dataset.videos),
            fix="see the reasons below" if sources else empty,
            also=also,
        )
    if rejected and r.strict:
        raise UserError(
            f"{len(rejected)} of {len(sources)} videos are rejected and the recipe is strict",
            code=ExitCode.DATASET,
            where=str(dataset.videos),
            fix="mend or remove them, or set strict to false",
            also=also,
        )


def verdict_table(videos: list[dict[str, Any]]) -> str:
    """A table of the videos of a manifest."""
    rows = [
        (
            row["file"],
            "held out" if row.get("split") == "heldout" else row["verdict"],
            f"{row['frames']} at {row['fps']:.4g}" if row["frames"] else "-",
            f"{row['width']}x{row['height']}" if row["frames"] else "-",
            str(row["clips"]),
            " ".join((row["reason"] or row["caption"]).split())[:90],
        )
        for row in videos
    ]
    return console.table(rows, ("video", "verdict", "frames", "size", "clips", "caption or reason"))


def row(dataset: Dataset, source: Source, digest: str) -> dict[str, Any]:
    """What the manifest says about a video."""
    info = source.info or video.VideoInfo(0, 0.0, 0, 0, 0.0, "")
    facts = asdict(info)
    del facts["begin"], facts["first"]
    return {
        "file": source.name,
        "path": source.path.relative_to(dataset.videos).as_posix(),
        "bytes": layout.size_of(source.path),
        "sha256": digest,
        "verdict": "rejected" if source.reason else "used",
        "reason": source.reason,
        **facts,
        "caption": source.caption,
        "caption_source": source.caption_source,
        "clips": len(source.clips),
    }
