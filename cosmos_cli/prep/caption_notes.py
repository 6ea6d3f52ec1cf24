"""Warn about caption files that no video uses, and about captions that the text encoder cuts."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosmos_cli import paths
from cosmos_cli.model import text
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import caption_choice, captions, embedding_files
from cosmos_cli.prep.sources import Source, first_names
from cosmos_cli.recipe.keys import Recipe

# What prep may leave unused: its singular and its plural, each with the reason, and the fix.
_UNUSED = {
    "caption_files": (
        "caption file belongs to no video",
        "caption files belong to no video",
        "the caption of x.mp4 must be named x.txt",
    ),
    "rows": (
        "row of captions_file belongs to no video",
        "rows of captions_file belong to no video",
        "each must name a video",
    ),
    "embeddings": (
        "embedding belongs to no video",
        "embeddings belong to no video",
        "the embedding of x.mp4 must be named x.pickle",
    ),
    "damaged_json": (
        "JSON file next to a video cannot be read",
        "JSON files next to videos cannot be read",
        'a caption looks like {"caption": "..."}',
    ),
}


@dataclass(frozen=True)
class CaptionNotes:
    """The findings about captions that deserve a warning.

    Args:
        unused: the names of unused files or rows by kind: paths relative to the dataset, or lines
            of captions_file.
        cut: the number of tokens of each caption that the text encoder cuts, by video.
    """

    unused: dict[str, list[str]]
    cut: dict[str, int]

    def figures(self) -> dict[str, Any]:
        """Return the entries of the manifest, without empty ones."""
        figures = {"captions_unused": self.unused, "captions_cut": self.cut}
        return {key: value for key, value in figures.items() if value}

    def lines(self, r: Recipe) -> list[str]:
        """Return one warning for each kind of finding, with the number and the first names."""
        lines = []
        for kind, names in self.unused.items():
            one, several, fix = _UNUSED[kind]
            what = f"{one} and is" if len(names) == 1 else f"{several} and are"
            text = f"{len(names)} {what} not used: {first_names(names)}; {fix}"
            lines.append(text)
        if self.cut:
            named = [f"{name} ({tokens} tokens)" for name, tokens in self.cut.items()]
            what = "1 caption is" if len(named) == 1 else f"{len(named)} captions are"
            lines.append(
                f"{what} longer than the {r.spec.text.tokens} tokens that the text encoder reads; "
                f"the rest is not used: {first_names(named)}"
            )
        return lines


def collect(r: Recipe, dataset: Dataset, videos: list[Source]) -> CaptionNotes:
    """Collect the warnings about captions. Call it after `caption_choice.find_captions`.

    Raises:
        UserError: captions_file, a folder or the text encoder's tokenizer cannot be read.
    """
    return CaptionNotes(_unused(r, dataset, videos), _cut_captions(r, dataset, videos))


def _unused(r: Recipe, dataset: Dataset, videos: list[Source]) -> dict[str, list[str]]:
    """Return the caption files, rows of captions_file and embeddings that belong to no video."""
    found = caption_choice.caption_files(r, dataset, videos)
    by_name = {source.name: source for source in videos}
    hidden = [
        path
        for name, path in found.metas.files.items()
        if by_name[name].caption and by_name[name].caption_source == "metas"
    ]
    next_to = (path for path in found.sidecars.unused if not captions.is_other_text(path))
    pickles = captions.files_in(dataset.embeddings, caption_choice.PICKLE)
    embeddings = captions.owners(pickles, list(by_name), (caption_choice.PICKLE,))
    unclear = [path for several in embeddings.unclear.values() for path in several]

    def names(files: Iterable[Path]) -> list[str]:
        return sorted({os.path.relpath(path, dataset.root) for path in files})

    kinds = {
        "caption_files": names([*found.metas.unused, *hidden, *next_to]),
        "rows": found.unknown,
        "embeddings": names([*embeddings.unused, *unclear]),
        "damaged_json": names(filter(captions.is_damaged_json, found.sidecars.files.values())),
    }
    return {kind: unused for kind, unused in kinds.items() if unused}


def _cut_captions(r: Recipe, dataset: Dataset, videos: list[Source]) -> dict[str, int]:
    """Return the number of tokens of each caption that the text encoder cuts, by video."""
    most = r.spec.text.tokens
    used = [v for v in videos if not v.reason]
    # Every token but the first and the last takes at least one byte, so no shorter caption is cut.
    long = [v for v in used if len(unicodedata.normalize("NFKC", v.caption).encode()) + 2 > most]
    folder = paths.model_files(r.spec, r.checkpoints_dir).text_encoder
    if long and (folder / "config.json").is_file():
        tokens = text.TextEncoder(folder, r.spec.text, "cpu", torch.float32)
        cut = tokens.cut(v.caption for v in long)
        return {v.name: cut[v.caption] for v in long if v.caption in cut}
    # If all embeddings came with the dataset, the text encoder may be missing. Then a caption
    # counts as cut if its embedding has the full length.
    pickles = {v.name: dataset.embeddings / f"{v.stem}.pickle" for v in long}
    lengths = {
        name: len(embedding_files.read_embedding(path, r.spec.text))
        for name, path in pickles.items()
        if path.exists()
    }
    return {name: length for name, length in lengths.items() if length == most}
