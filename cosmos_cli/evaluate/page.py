"""Write the page of an evaluation: its verdicts, figures and videos."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos_cli import console, files, html, paths
from cosmos_cli.evaluate import comparison, continuation, evaluation, features
from cosmos_cli.evaluate.samples import Sample
from cosmos_cli.model import mp4
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.spec import GIVEN_FRAMES
from cosmos_cli.train import page as run_page

Rows = list[tuple[str, ...]]

MOSAIC_COLUMNS = 4
CONTINUED = (
    "Every model continued the same clips with the same seeds, each from its first frame and from "
    "its first 9. The column by chance is the trivial prediction, the last given frame repeated."
)


def figure_rows(figures: dict[str, Any]) -> Rows:
    """Return the figures as table rows: a name, the value of chance, and each model's value."""
    models = list(figures["models"].values())

    def rows(group: str, form: str, chance: Mapping[str, str] | None = None) -> Rows:
        """Return the rows of a group of figures, none if a model lacks it."""
        if not all(group in model for model in models):
            return []
        by_chance = dict.fromkeys(models[0][group], "") if chance is None else chance
        return [
            (name, words, *(format(model[group][name], form) for model in models))
            for name, words in by_chance.items()
        ]

    shares = {name: f"{share:.0%}" for name, share in evaluation.CHANCE.items()}
    table = rows("scores", ".1%", shares)
    table += rows("video_scores", ".4g") + rows("features", ".4f")
    if all("held_out_distance" in model for model in models):
        found = [model["held_out_distance"] for model in models]
        cells = (f"{own['distance']:.4g} (p = {own['p']:.2g})" for own in found)
        table.append((features.DISTANCE, "0 on average", *cells))
    if "repeated" in figures:
        trivial = {name: f"{value:.4g}" for name, value in figures["repeated"].items()}
        table += rows("continuation", ".4g", trivial)
    if "psnr" in figures:
        table.append(("reconstruction", "", *[f"{figures['psnr']:.1f} dB"] * len(models)))
    for level, *cells in rows("edm", ".4f"):
        table.append((f"EDM error, {level.replace('_', ' ')}", *cells))
    if all("nearest_clip" in model for model in models):
        nearest = (f"{model['nearest_clip']:.3f}" for model in models)
        apart = f"{figures['clips_apart']:.3f} between clips"
        table.append(("nearest training clip", apart, *nearest))
    return table


def _horizon(figures: dict[str, Any]) -> str:
    """Return a plot of each score over the new frames, side by side for few and many given ones."""
    plots: dict[str, list[str]] = {}
    for name, lines in figures["horizon"].items():
        series = {who: list(enumerate(line, 1)) for who, line in lines.items()}
        # Names that differ in the given frames alone share a row.
        plots.setdefault(name.rpartition(",")[0], []).append(html.chart(series, "new frame", name))
    note = "Mean over the clips, the median for the position error."
    return html.text(note) + "".join(html.row(*own) for own in plots.values())


def keep_larger(page: Path, figures: dict[str, Any]) -> None:
    """Rename an earlier evaluation at `page` if it has more videos or other models than this one.

    Raises:
        UserError: a file cannot be renamed.
    """
    if not page.exists():
        return
    record = page.with_suffix(".json")
    earlier = _record(record)
    has_fewer = earlier["prompts"] <= figures["prompts"]
    if has_fewer and earlier["models"].keys() <= figures["models"].keys():
        return
    count = "earlier" if earlier["prompts"] == math.inf else earlier["prompts"]
    names = (f"{page.stem}_{count}{'-' * n}" for n in itertools.count())
    stem = next(name for name in names if not page.with_name(f"{name}{page.suffix}").exists())
    with files.disk_errors(page):
        for path in (page, record, *map(page.with_name, earlier["files"])):
            if path.is_file():
                path.rename(path.with_name(stem + path.name[len(page.stem) :]))
    console.say(f"the earlier evaluation is kept as {page.with_name(stem + page.suffix)}")


def _record(path: Path) -> dict[str, Any]:
    """Return what an evaluation recorded. Without a record it may have been larger than any."""
    record = None
    with contextlib.suppress(files.BadFile):
        record = files.read_json(path)
    if isinstance(record, dict) and {"prompts", "models", "files"} <= record.keys():
        return record
    return {"prompts": math.inf, "models": {}, "files": []}


def _figures(figures: dict[str, Any]) -> str:
    """Return the table of the figures and what each of them means."""
    notes = []
    if "clips" in figures:
        notes.append(f"The EDM error is measured on the {figures['clips']} clips of the dataset.")
    if "horizon" in figures:
        notes.append(CONTINUED)
    elif figures["prompts"]:
        notes.append("Every model generated videos of the same prompts with the same seeds.")
    if "psnr" in figures:
        notes.append(
            "The tiny model draws a synthetic world, so the content of its videos can be read from "
            "their pixels. The new concept is what the demo dataset teaches: a teal robot with a "
            "yellow head."
        )
    rows = figure_rows(figures)
    names = [row[0].partition(",")[0] for row in rows]
    known = evaluation.MEANINGS | continuation.MEANINGS
    better = [(*row, known[name][1]) for row, name in zip(rows, names, strict=True)]
    meanings = [(name, known[name][0]) for name in dict.fromkeys(names)]
    table = html.table(better, ("", "by chance", *figures["models"], "better"))
    table += html.table(meanings, ("figure", "meaning"))
    if lacking := figures.get("not_measured"):
        table += html.table(lacking.items(), ("not measured", "because"))
    return html.text(" ".join(notes)) + table


def write_page(
    path: Path, r: Recipe, figures: dict[str, Any], samples: dict[str, list[Sample]]
) -> list[Path]:
    """Write one self-contained page and, next to it, its videos; return all paths."""
    run = paths.Run(r.run_dir)
    sections = run_page.scores_section(run) if "steps" in figures else []
    note = html.text(comparison.NOTE)
    for heading, table in comparison.tables(figures["comparisons"]):
        sections.append((heading, note + html.table(*table)))
        note = ""
    shown = {name: [s for s in own if s.pixels is not None] for name, own in samples.items()}
    write = _write_mosaics if r.spec.embedded else _write_videos
    videos, written = write(path, r, shown)
    if figures.get("horizon"):
        sections.append(("Over the horizon", _horizon(figures)))
    sections += [*videos, ("Figures", _figures(figures))]
    if run_page.has_facts(run):
        sections += [own for own in run_page.sections(run, path.parent) if own not in sections]
    hashes = ((name, model["weights"]) for name, model in figures["models"].items())
    sections.append(("Weights", html.table(hashes, ("", "sha256"))))
    files.write_text(path, html.page(f"Evaluation of {r.model}", sections))
    record = path.with_suffix(".json")
    files.write_json(record, {**figures, "files": [video.name for video in written]})
    return [path, *written, record]


Sections = list[tuple[str, str]]


def _write_mosaics(
    path: Path, r: Recipe, samples: dict[str, list[Sample]]
) -> tuple[Sections, list[Path]]:
    """Write the videos of the synthetic world as one mosaic for each model and kind of prompt."""
    sections, written = [], []
    others = f"Continued from {GIVEN_FRAMES[-1]} frames" if r.spec.takes_frames else "Other prompts"
    kinds = (("The mascot (score concept)", "concept", True), (others, "others", False))
    for heading, kind, mascot in kinds:
        shown = {n: [s for s in own if s.trial.of_mascot == mascot] for n, own in samples.items()}
        if not any(shown.values()):
            continue
        parts = []
        for name, made in shown.items():
            mosaic = path.with_name(f"{path.stem}_{_slug(name)}_{kind}.mp4")
            write_mosaic(mosaic, made, r)
            written.append(mosaic)
            parts.append(html.media(mosaic, name))
        prompts = ((s.trial.prompt,) for s in next(iter(shown.values())))
        listed = html.table(prompts, ("prompts of these videos, row by row",))
        sections.append((heading, html.row(*parts) + listed))
    return sections, written


def _slug(name: str) -> str:
    return name.replace(" ", "_")


def _write_videos(
    path: Path, r: Recipe, samples: dict[str, list[Sample]]
) -> tuple[Sections, list[Path]]:
    """Write small copies of each model's first videos, next to each other with their scores."""
    rows, written = [], []
    for index, made in enumerate(zip(*samples.values(), strict=True)):
        cells = []
        for name, sample in zip(samples, made, strict=True):
            copy = path.with_name(f"{path.stem}_{_slug(name)}_{index + 1}.mp4")
            with files.atomic_file(copy) as temporary:
                mp4.write_mp4(temporary, sample.pixels, r.fps, r.video_crf)
            written.append(copy)
            found = (f"{score} {value:.3g}" for score, value in sample.scores.items())
            cells.append(html.media(copy, f"{name}: {', '.join(found)}"))
        trial = made[0].trial
        rows.append(html.text(f"{trial.prompt} (seed {trial.seed})") + html.row(*cells))
    if not rows:
        return [], []
    note = "Small copies of the first videos, with the scores of each."
    return [("Videos", html.text(note) + "".join(rows))], written


def write_mosaic(path: Path, samples: Iterable[Sample], r: Recipe) -> None:
    """Write the videos as a grid in one mp4."""
    pixels = [sample.pixels for sample in samples]
    pixels += [torch.zeros_like(pixels[0])] * (-len(pixels) % MOSAIC_COLUMNS)
    strips = [
        torch.cat(pixels[first : first + MOSAIC_COLUMNS], dim=3)
        for first in range(0, len(pixels), MOSAIC_COLUMNS)
    ]
    with files.atomic_file(path) as temporary:
        mp4.write_mp4(temporary, torch.cat(strips, dim=2), r.fps, r.video_crf)
