"""Find the videos of a dataset, and decide for each its verdict, its clips and its caption."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cosmos_cli import console, files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import video
from cosmos_cli.paths import VIDEO_SUFFIXES, Dataset
from cosmos_cli.prep import captions, lerobot
from cosmos_cli.recipe.keys import Recipe

# The origin of a caption in a file of `metas` that has another name than the one prep writes.
OTHER_NAME = "metas, under another name"
PICKLE = ".pickle"
# What prep may leave unused: its singular, its plural and the fix.
_UNUSED = {
    "caption_files": ("caption file", "caption files", "the caption of x.mp4 must be named x.txt"),
    "rows": ("row of captions_file", "rows of captions_file", "each `file` must name a video"),
    "embeddings": ("embedding", "embeddings", "the embedding of x.mp4 must be named x.pickle"),
}
# A line names at most this many files or videos and counts the others.
MOST_NAMED = 5
# File systems allow no longer file names.
MAX_NAME_BYTES = 255


@dataclass
class Source:
    """One video, which is a file or an episode in a file, and what prep decided about it.

    Args:
        name: the unique name of the file or the episode.
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
        below = (p for p in dataset.videos.glob("*/*") if p.suffix.lower() in VIDEO_SUFFIXES)
        for folder in sorted({path.parent for path in below}):
            console.warn(f"{folder}: the videos in this folder are not used; move them up")
        return [Source(path.name, path) for path in dataset.video_files()]
    return [
        Source(e.name, e.path, range(e.first, e.first + e.frames), e.task, reason=e.reason)
        for e in lerobot.episodes(dataset.videos, r.camera)
    ]


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


# --- captions -------------------------------------------------------------------------------------


def known_captions(dataset: Dataset) -> dict[str, Any]:
    """Return the captions that the last run used, even if it did not finish."""
    if not dataset.captions.exists():
        return {}
    known: dict[str, Any] = files.read_json(dataset.captions, files.MANIFEST)
    return known


@dataclass(frozen=True)
class CaptionFiles:
    """The caption files of a dataset and the videos that they belong to.

    Args:
        metas: files in `metas` with another name than the one prep writes, `<stem>.txt`.
        sidecars: files next to the videos.
        listed: the captions in captions_file by video.
        unknown: the rows of captions_file that name no video.
    """

    metas: captions.Owners
    sidecars: captions.Owners
    listed: dict[str, str]
    unknown: list[str]

    def unclear(self, source: Source) -> list[Path]:
        """Return the files that may each be the video's caption, if nothing else decides it."""
        if several := self.metas.unclear.get(source.name):
            return several
        known = source.name in self.metas.files or source.name in self.listed
        return [] if known else self.sidecars.unclear.get(source.name, [])


def caption_files(r: Recipe, dataset: Dataset, sources: list[Source]) -> CaptionFiles:
    """Find the caption files of a dataset.

    Raises:
        UserError: captions_file or a folder cannot be used.
    """
    names = [source.name for source in sources]
    in_own_file = [source.name for source in sources if source.span is None]
    own = {f"{source.stem}{captions.SUFFIX}" for source in sources}
    metas = captions.files_in(dataset.metas, captions.SUFFIX)
    sidecars = captions.files_in(dataset.videos, *captions.BESIDE_SUFFIXES) if in_own_file else []
    path = Path(r.captions_file).absolute() if r.captions_file else None
    listed, unknown = captions.read(path, names) if path else ({}, [])
    return CaptionFiles(
        captions.owners([path for path in metas if path.name not in own], names),
        captions.owners(sidecars, in_own_file, captions.BESIDE_SUFFIXES),
        listed,
        unknown,
    )


def find_captions(r: Recipe, dataset: Dataset, sources: list[Source]) -> list[Source]:
    """Give every usable video its caption. Return those that a model must describe first.

    The first of these wins: `metas`, captions_file, the text next to the video, the robot's task,
    then the model's description or the recipe's prompt. Files that prep itself wrote into `metas`
    do not count. A video without any of them is rejected.

    Raises:
        UserError: captions_file cannot be used.
    """
    known = known_captions(dataset).get("videos", {})
    found = caption_files(r, dataset, sources)
    unseen = []
    for source in sources:
        if source.reason:
            continue
        path = dataset.metas / f"{source.stem}.txt"
        offered = _offered(r, dataset, source, found)
        meta = read_caption(path, source)
        best = next(filter(None, offered.values()), "")
        # If prep wrote this file in an earlier run, the captions that were found now replace it.
        ours = _is_ours(meta, known.get(source.name, {}))
        if (several := found.unclear(source)) and (ours or not meta):
            source.reject(f"its caption may be {' or '.join(p.name for p in several)}; rename one")
            continue
        source.caption = (best if ours else meta) or best or (meta if r.caption == "given" else "")
        origins = [name for name, text in offered.items() if text == source.caption]
        source.caption_source = origins[0] if origins else "metas"
        if source.caption_source == OTHER_NAME:
            source.caption_file = found.metas.files.get(source.name)
        if source.caption or source.reason:
            continue
        if r.caption == "vlm" and read_description(r, dataset, source) is None:
            source.caption_source = "vlm"
            unseen.append(source)
        else:
            source.reject(f"no caption: write it to {path}, or use `--set prompt=TEXT`")
    return unseen


def unused_files(r: Recipe, dataset: Dataset, sources: list[Source]) -> list[tuple[str, list[str]]]:
    """List the caption files, rows of captions_file and embeddings that belong to no video.

    Returns:
        Pairs of a kind and its names: paths relative to the dataset, or lines of captions_file.

    Raises:
        UserError: captions_file or a folder cannot be used.
    """
    found = caption_files(r, dataset, sources)
    by_name = {source.name: source for source in sources}
    hidden = [
        path
        for name, path in found.metas.files.items()
        if by_name[name].caption and by_name[name].caption_source == "metas"
    ]
    texts = [
        *found.metas.unused,
        *hidden,
        *(path for path in found.sidecars.unused if not captions.is_other_text(path)),
    ]
    embeddings = captions.owners(_pickles(dataset), list(by_name), (PICKLE,))
    unclear = [path for several in embeddings.unclear.values() for path in several]

    def names(found: list[Path]) -> list[str]:
        return sorted({os.path.relpath(path, dataset.root) for path in found})

    kinds = {
        "caption_files": names(texts),
        "rows": found.unknown,
        "embeddings": names([*embeddings.unused, *unclear]),
    }
    return [(kind, unused) for kind, unused in kinds.items() if unused]


def unused_lines(unused: list[tuple[str, list[str]]]) -> list[str]:
    """Return a warning for each kind of unused file, with their number and the first names."""
    lines = []
    for kind, names in unused:
        one, several, fix = _UNUSED[kind]
        what = f"{one} belongs" if len(names) == 1 else f"{several} belong"
        use = "is" if len(names) == 1 else "are"
        lines.append(f"{len(names)} {what} to no video and {use} not used: {shown(names)}; {fix}")
    return lines


def shown(names: list[str]) -> str:
    """Return the first names as text, and the number of the others."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _pickles(dataset: Dataset) -> list[Path]:
    return captions.files_in(dataset.embeddings, PICKLE)


def adopt_embeddings(dataset: Dataset, sources: list[Source]) -> None:
    """Copy embeddings that came with the dataset to the names that prep uses.

    Such a name differs from the video's in case, Unicode form or the suffix of the video.

    Raises:
        UserError: one cannot be read.
    """
    known = known_captions(dataset).get("videos", {})
    found = captions.owners(_pickles(dataset), [s.name for s in sources], (PICKLE,)).files
    for source in sources:
        path = dataset.embeddings / f"{source.stem}{PICKLE}"
        # After the first run, prep knows which embedding belongs to the caption of a known video.
        if source.reason or source.name in known or source.name not in found or path.exists():
            continue
        content = files.read_bytes(found[source.name], files.EMBEDDING)
        with files.atomic_file(path) as temporary:
            temporary.write_bytes(content)
            _copy_time(found[source.name], temporary)


def _copy_time(source: Path, target: Path) -> None:
    """Copy the modification time, which tells prep if an embedding is older than its caption."""
    time = source.stat().st_mtime_ns
    os.utime(target, ns=(time, time))


def _offered(r: Recipe, dataset: Dataset, source: Source, found: CaptionFiles) -> dict[str, str]:
    """Return the captions of a video by origin. The first one that is not empty wins."""
    offered = {
        OTHER_NAME: _caption_of(found.metas, source),
        "captions_file": found.listed.get(source.name, ""),
        "sidecar": _caption_of(found.sidecars, source),
        "task": source.task,
    }
    prompt = captions.one_kind_of_line_end(r.prompt or "").strip()
    if r.caption == "given":
        return {**offered, "prompt": prompt}
    words = read_description(r, dataset, source)
    return {**offered, "vlm": "" if words is None else f"{prompt} {words}".strip()}


def _caption_of(place: captions.Owners, source: Source) -> str:
    path = place.files.get(source.name)
    return read_caption(path, source) if path else ""


def _is_ours(meta: str, known: Mapping[str, str]) -> bool:
    """True if prep wrote the text `meta` in `metas`.

    `known` is the last run's note: the caption, its source, and the text it replaced in `metas`.
    """
    texts = (known.get("caption"), known.get("replaced"))
    return known.get("caption_source") != "metas" and meta in texts


def description_key(r: Recipe, source: Source) -> str:
    """Return a hash of all that decides a captioning model's description of a video."""
    file = map(str, files.stamp_of(source.path))
    return files.sha256_text(str(r.caption_model), str(source.span), *file)


def read_description(r: Recipe, dataset: Dataset, source: Source) -> str | None:
    """Return the captioning model's description, None if the video has changed or has none."""
    path = dataset.descriptions / f"{source.stem}.json"
    if not path.exists():
        return None
    value = files.read_json(path)
    words: str = value["caption"]
    return words if value["key"] == description_key(r, source) else None


def read_caption(path: Path, source: Source) -> str:
    """Return the text of a file, "" if it is missing. Reject the video if it cannot be read."""
    try:
        return files.read_text(path, files.CAPTION).strip()
    except files.NoSuchFile:
        return ""
    except files.BadFile as error:
        source.reject(f"the caption {path.name} {error.what}")
        return ""


def write_captions(r: Recipe, dataset: Dataset, sources: list[Source]) -> None:
    """Note where every caption comes from, then write those that are not yet in `metas`.

    Until they are written, the note also holds the texts that they replace. Otherwise, if prep is
    killed in between, the next run would take an old caption of prep's for one that a person wrote.
    """
    used = [source for source in sources if not source.reason]
    notes = {s.name: {"caption": s.caption, "caption_source": s.caption_source} for s in used}
    metas = {s.name: dataset.metas / f"{s.stem}.txt" for s in used}
    stale = {s.name: old for s in used if (old := read_caption(metas[s.name], s)) != s.caption}
    known = known_captions(dataset)
    for source in sources:
        # A copied caption keeps its modification time, which may be before that of the embedding
        # of the old caption. So the texts are compared too.
        noted = known.get("videos", {}).get(source.name, {}).get("caption", source.caption)
        if known.get("model", r.model) != r.model or noted != source.caption:
            (dataset.embeddings / f"{source.stem}.pickle").unlink(missing_ok=True)
    if any(stale.values()):
        during = {n: {**note, "replaced": stale.get(n, "")} for n, note in notes.items()}
        files.write_json(dataset.captions, {"model": r.model, "videos": during})
    else:
        files.write_json(dataset.captions, {"model": r.model, "videos": notes})
    for source in used:
        if source.name in stale:
            files.write_text(metas[source.name], source.caption + "\n")
            if source.caption_file:
                _copy_time(source.caption_file, metas[source.name])
    if any(stale.values()):
        files.write_json(dataset.captions, {"model": r.model, "videos": notes})


# --- verdicts -------------------------------------------------------------------------------------


def require_usable(r: Recipe, dataset: Dataset, sources: list[Source]) -> None:
    """Check that there are videos to train on.

    Raises:
        UserError: there is no video, none is usable, or the recipe is strict and one is unusable.
    """
    rejected = [source for source in sources if source.reason]
    also = tuple(
        UserError(source.reason, code=ExitCode.DATASET, where=str(source.path))
        for source in rejected
    )
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


def verdict_table(videos: list[dict[str, Any]]) -> str:
    """Return a table of the videos of a manifest."""
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
    """Return the row of the manifest for a video."""
    info = source.info or video.VideoInfo(0, 0.0, 0, 0, 0.0, "")
    facts = asdict(info)
    del facts["begin"], facts["first"]
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
