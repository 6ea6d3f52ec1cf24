"""Find the videos of a dataset, and decide for each its clips and its verdict."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cosmos_cli import console, files
from cosmos_cli.errors import ExitCode, UserError, dataset_error
from cosmos_cli.model import video
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import lerobot
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.recipe.rules import LEAST_SHARE_OF_PIXELS

# A warning names at most this many videos or files and counts the others.
MOST_NAMED = 5
# A message names at most this many videos, one on a line, and counts the others.
MOST_LINES = 50
# File systems allow no longer file names.
MAX_NAME_BYTES = 255


@dataclass
class Source:
    """One video, which is a file or an episode in a file, and what prep decided about it.

    Args:
        name: the unique name of the file (with its folders, as `Dataset.name_of`) or the episode.
        span: the frames of the file that form the episode; None if the file is the video.
        task: the instruction that the robot was given.
        caption_file: the caption's file in `metas`, if its name is not the one that prep writes.
    """

    name: str
    path: Path
    span: range | None = None
    task: str = ""
    info: video.VideoInfo | None = None
    clips: list[video.Clip] = field(default_factory=list)
    caption: str = ""
    caption_source: str = ""
    caption_file: Path | None = None
    reason: str = ""

    @property
    def stem(self) -> str:
        """The name without its suffix, which caption, embedding and latents share."""
        return Path(self.name).stem

    def latent_name(self, clip: video.Clip) -> str:
        return f"{self.stem}.{clip.start:06d}.safetensors"

    def reject(self, reason: str) -> None:
        """Exclude the video. If it already has a reason, that one stays."""
        self.reason = self.reason or reason
        self.clips = []


def inspect(r: Recipe, dataset: Dataset) -> list[Source]:
    """Return every video of the dataset, with its clips or the reason why it is rejected."""
    sources = _find(r, dataset)
    stems: dict[str, str] = {}
    probed: tuple[Path, video.VideoInfo] | None = None
    with console.progress("inspect", len(sources), "videos") as bar:
        for source in sources:
            if source.reason:
                bar.advance(source.name)
                continue
            first = stems.setdefault(source.stem, source.name)
            if first != source.name:
                source.reject(f"shares its name with {first}; rename one")
            else:
                try:
                    # The episodes of a file follow each other, so each file is scanned only once.
                    if probed is None or probed[0] != source.path:
                        probed = (source.path, video.probe(source.path))
                    _choose_clips(r, source, probed[1])
                except video.VideoError as error:
                    source.reject(str(error))
            bar.advance(source.name)
    return sources


def _find(r: Recipe, dataset: Dataset) -> list[Source]:
    if not lerobot.is_lerobot(dataset.videos):
        return _name(dataset, dataset.video_files())
    return [
        Source(e.name, e.path, range(e.first, e.first + e.frames), e.task, reason=e.reason)
        for e in lerobot.episodes(dataset.videos, r.camera)
    ]


def _name(dataset: Dataset, paths: list[Path]) -> list[Source]:
    """Return the videos with their names. Of `a__b.mp4` and `a/b.mp4`, the second is rejected."""
    named: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: len(path.parts)):
        named.setdefault(dataset.name_of(path), path)
    kept = {path: Source(name, path) for name, path in named.items()}
    # The rejected ones come last: where a stem is shared, the first video has it.
    found = [kept[path] for path in paths if path in kept]
    for path in paths:
        if path not in kept:
            name, first = (
                one.relative_to(dataset.videos).as_posix()
                for one in (path, named[dataset.name_of(path)])
            )
            found.append(Source(name, path, reason=f"shares its name with {first}; rename one"))
    return found


def _choose_clips(r: Recipe, source: Source, info: video.VideoInfo) -> None:
    source.info = info if source.span is None else video.part(info, source.span)
    source.clips = video.select_clips(
        source.info, r.fps_policy, r.fps, r.num_frames, r.stride, r.max_clips_per_video
    )
    excess = len(os.fsencode(source.latent_name(source.clips[-1]))) - MAX_NAME_BYTES
    if excess > 0:
        raise video.VideoError(
            f"its name is {excess} bytes too long to name its latents; shorten it"
        )


def require_usable(r: Recipe, dataset: Dataset, sources: list[Source]) -> None:
    """Check that there are videos to train on.

    Raises:
        UserError: there is no video, none is usable, or the recipe is strict and one is unusable.
    """
    rejected = [source for source in sources if source.reason]
    also = tuple(dataset_error(source.path, source.reason) for source in rejected[:MOST_LINES])
    if len(rejected) == len(sources):
        found = f"none of {len(sources)} videos can be used" if sources else "holds no videos"
        empty = "put mp4 files there, or use `--set videos_dir=FOLDER`"
        if lerobot.is_lerobot(dataset.root):
            empty = f"it is a LeRobot dataset: use `--set videos_dir={dataset.root}`"
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
            fix="repair or remove them, or use `--set strict=false`",
            also=also,
        )


# What may be wrong with the colours or the motion of a video, and FFmpeg's options that convert it.
_MARKS = {
    "hdr": (
        "HDR (PQ or HLG), which is decoded without tone mapping: its colours are pale",
        "-vf zscale=t=linear:npl=100,format=gbrpf32le,zscale=p=bt709,tonemap=hable,"
        "zscale=t=bt709:m=bt709:r=tv -crf 12 -pix_fmt yuv420p",
    ),
    "interlaced": (
        "marked as interlaced: moving edges may be combed",
        "-vf bwdif=mode=send_frame -crf 12 -pix_fmt yuv420p",
    ),
}


def remarks(r: Recipe, sources: list[Source]) -> list[str]:
    """Return a warning for each kind of video that is used but should be treated in another way."""
    lines = []
    least = LEAST_SHARE_OF_PIXELS * r.height * r.width
    used = [v for v in sources if v.info and not v.reason]
    small = [v.info for v in used if v.info and v.info.height * v.info.width < least]
    if small:
        (size, _), *_ = Counter(f"{info.width}x{info.height}" for info in small).most_common(1)
        count = "1 video is" if len(small) == 1 else f"{len(small)} videos are"
        folder = shlex.quote(str(r.dataset.videos))
        lines.append(
            f"{count} enlarged to {r.width}x{r.height}, most from {size}: that adds cost and no "
            f"detail; `cosmos recipes new {r.name}_small --videos {folder}` keeps it"
        )
    for mark, (what, how) in _MARKS.items():
        found = [v for v in sources if v.info and not v.reason and getattr(v.info, mark)]
        if found:
            count = "1 video is" if len(found) == 1 else f"{len(found)} videos are"
            fix = video.repair(found[0].path, how)
            names = first_names([v.name for v in found])
            lines.append(f"{count} {what}: {names}; {fix} converts {found[0].name}")
    return lines


def first_names(names: list[str]) -> str:
    """Return at most MOST_NAMED names as text, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def verdict_table(videos: list[dict[str, Any]]) -> str:
    """Return a table of the videos of a manifest, of the rejected ones first if there are many."""
    if len(videos) > MOST_LINES:
        videos = sorted(videos, key=lambda video: video["verdict"] != "rejected")
    rows = [
        (
            row["file"].replace("\n", "\\n"),
            "held out" if row.get("split") == "heldout" else row["verdict"],
            f"{row['frames']} at {row['fps']:.4g}" if row["frames"] else "-",
            f"{row['width']}x{row['height']}" if row["frames"] else "-",
            str(row["clips"]),
            " ".join((row["reason"] or row["caption"]).split())[:90],
        )
        for row in videos[:MOST_LINES]
    ]
    header = ("video", "verdict", "frames", "size", "clips", "caption or reason")
    more = f"\n... and {len(videos) - MOST_LINES} more" if len(videos) > MOST_LINES else ""
    return console.table(rows, header) + more


def manifest_row(dataset: Dataset, source: Source, digest: str) -> dict[str, Any]:
    """Return the row of the manifest for a video."""
    info = source.info or video.VideoInfo(0, 0.0, 0, 0, 0.0, "")
    facts = asdict(info)
    del facts["begin"], facts["first"]
    for mark in ("hdr", "interlaced"):
        if not facts[mark]:
            del facts[mark]
    return {
        "file": source.name,
        "path": source.path.relative_to(dataset.videos).as_posix(),
        "bytes": files.size_of(source.path),
        "sha256": digest,
        "verdict": "rejected" if source.reason else "used",
        "reason": source.reason,
        **facts,
        "caption": source.caption,
        "caption_source": source.caption_source,
        "clips": len(source.clips),
    }
