"""Choose the caption of each video, and note in the dataset where it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cosmos_cli import files, hashes
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import captions
from cosmos_cli.prep.sources import Source
from cosmos_cli.recipe.keys import Recipe

# The origin of a caption in a file of `metas` that has another name than the one prep writes.
OTHER_NAME = "metas, under another name"
PICKLE = ".pickle"


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
        listed: the captions in captions_file, or the metadata.csv or .jsonl found, by video.
        unknown: the rows of that file that name no video.
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


def caption_files(r: Recipe, dataset: Dataset, videos: list[Source]) -> CaptionFiles:
    """Find the caption files of a dataset.

    Raises:
        UserError: captions_file or a folder cannot be used.
    """
    names = [source.name for source in videos]
    in_own_file = {source.name: source.path for source in videos if source.span is None}
    own = {f"{source.stem}{captions.SUFFIX}" for source in videos}
    metas = captions.files_in(dataset.metas, captions.SUFFIX)
    path = Path(r.captions_file).absolute() if r.captions_file else None
    path = path or captions.table_in(dataset.videos, dataset.root)
    listed, unknown = captions.read(path, names) if path else ({}, [])
    return CaptionFiles(
        captions.owners([path for path in metas if path.name not in own], names),
        captions.sidecars(in_own_file),
        listed,
        unknown,
    )


def find_captions(r: Recipe, dataset: Dataset, videos: list[Source]) -> list[Source]:
    """Give every usable video its caption. Return those that a model must describe first.

    The first of these wins: `metas`, captions_file, the text next to the video, metadata.csv or
    metadata.jsonl, the robot's task, then the model's description or the recipe's prompt. Files
    that prep itself wrote into `metas` do not count. A video without any of them is rejected.

    Raises:
        UserError: captions_file cannot be used.
    """
    known = known_captions(dataset).get("videos", {})
    found = caption_files(r, dataset, videos)
    unseen = []
    for source in videos:
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


def adopt_embeddings(dataset: Dataset, videos: list[Source]) -> None:
    """Copy embeddings that came with the dataset to the names that prep uses.

    Such a name differs from the video's in case, Unicode form or the suffix of the video.

    Raises:
        UserError: one cannot be read.
    """
    known = known_captions(dataset).get("videos", {})
    found = captions.owners(
        captions.files_in(dataset.embeddings, PICKLE), [s.name for s in videos], (PICKLE,)
    ).files
    for source in videos:
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
    listed = {"captions_file": found.listed.get(source.name, "")}
    next_to = {"sidecar": _caption_of(found.sidecars, source)}
    offered = {
        OTHER_NAME: _caption_of(found.metas, source),
        # A table that was found, not named, comes after the file next to the video.
        **(listed | next_to if r.captions_file else next_to | listed),
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
    return hashes.sha256_text(str(r.caption_model), str(source.span), *file)


def content_key(r: Recipe, source: Source) -> str:
    """Return the hash of `description_key` with the file's content instead of its time stamp.

    A copy has another time stamp. The whole file is read, so this is compared only if
    `description_key` differs.
    """
    content = _sha256_of(source.path, files.stamp_of(source.path))
    return hashes.sha256_text(str(r.caption_model), str(source.span), content)


@lru_cache(maxsize=1)
def _sha256_of(path: Path, _version: tuple[int, int]) -> str:
    """Return the sha256 of a file. It is cached, because a file may hold many episodes."""
    return hashes.sha256_file(path)


def read_description(r: Recipe, dataset: Dataset, source: Source) -> str | None:
    """Return the captioning model's description, None if the video has changed or has none."""
    path = dataset.descriptions / f"{source.stem}.json"
    if not path.exists():
        return None
    value = files.read_json(path)
    words: str = value["caption"]
    if value["key"] == description_key(r, source):
        return words
    return words if "content" in value and value["content"] == content_key(r, source) else None


def read_caption(path: Path, source: Source) -> str:
    """Return the text of a file, "" if it is missing. Reject the video if it cannot be read."""
    if path.suffix.lower() == captions.JSON_SUFFIX:
        return captions.caption_in(path)
    try:
        return files.read_text(path, files.CAPTION).strip()
    except files.NoSuchFile:
        return ""
    except files.BadFile as error:
        source.reject(f"the caption {path.name} {error.what}")
        return ""


def write_captions(r: Recipe, dataset: Dataset, videos: list[Source]) -> None:
    """Note where every caption comes from, then write those that are not yet in `metas`.

    Until they are written, the note also holds the texts that they replace. Otherwise, if prep is
    killed in between, the next run would take an old caption of prep's for one that a person wrote.
    """
    used = [source for source in videos if not source.reason]
    notes = {s.name: {"caption": s.caption, "caption_source": s.caption_source} for s in used}
    metas = {s.name: dataset.metas / f"{s.stem}.txt" for s in used}
    stale = {s.name: old for s in used if (old := read_caption(metas[s.name], s)) != s.caption}
    known = known_captions(dataset)
    for source in videos:
        # A copied caption keeps its modification time, which may be before that of the embedding
        # of the old caption. So the texts are compared too.
        noted = known.get("videos", {}).get(source.name, {}).get("caption", source.caption)
        if known.get("model", r.model) != r.model or noted != source.caption:
            (dataset.embeddings / f"{source.stem}.pickle").unlink(missing_ok=True)
    replaces = any(stale.values())
    during = {n: {**note, "replaced": stale.get(n, "")} for n, note in notes.items()}
    files.write_json(dataset.captions, {"model": r.model, "videos": during if replaces else notes})
    for source in used:
        if source.name in stale:
            files.write_text(metas[source.name], source.caption + "\n")
            if source.caption_file:
                _copy_time(source.caption_file, metas[source.name])
    if replaces:
        files.write_json(dataset.captions, {"model": r.model, "videos": notes})
