"""Write the page of a run: its curves, pictures, settings and provenance. No torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from cosmos_cli import files, html, paths
from cosmos_cli.paths import Run
from cosmos_cli.spec import PREVIEW_SIGMAS
from cosmos_cli.train import status
from cosmos_cli.train.status import HELD_OUT, NEAREST, Row

# A page shows the pictures of at most this many steps, in addition to the first.
MOST_STEPS = 10
EDM_ERROR = (
    "The EDM error is the squared error of the denoised clip. Its weights make it about 1 for an "
    "untrained network at every noise level. Lower is better."
)


def write_page(run: Run) -> None:
    """Write report.html: the curves, settings and provenance of a run on one page."""
    text = html.page(f"Training run {run.root.name}", sections(run, run.root))
    files.write_text(run.report, text)


def has_facts(run: Run) -> bool:
    """True if a run has the files that its page shows; a run that was copied may lack them."""
    return run.status.exists() and (run.root / "env.json").exists()


def sections(run: Run, folder: Path) -> list[tuple[str, str]]:
    """Return the sections of a page in `folder` about a run, as (heading, HTML) for `html.page`."""
    known = status.rows(run)
    trained = [row for row in known if "loss" in row]
    measured = [row for row in known if HELD_OUT in row]
    bands = [key for key in (trained[0] if trained else {}) if key.startswith("edm_")]
    keys = measured[0] if measured else {}
    levels = [key for key in keys if key.startswith(f"{HELD_OUT}_sigma_")]
    counts = [key for key in keys if key.startswith(f"{HELD_OUT}_given_")]
    shown = [
        ("Status", html.table(_status(run))),
        ("Error on the training clips", html.text(EDM_ERROR) + html.row(
            _smooth_curves(trained, {"edm": "all"}, "EDM error"),
            _smooth_curves(trained, {key: _band(key) for key in bands}, "EDM error by noise band"),
        )),
    ]  # fmt: skip
    if measured:
        words = "Measured with fixed noise on videos that are not trained on. Lower is better."
        shown.append(("Error on held-out clips", html.text(words) + html.row(
            html.chart(_against_base(measured), "step", "EDM error"),
            _curves(measured, {key: _band(key) for key in levels}, "EDM error by noise level"),
            *([_curves(measured, {key: _band(key) for key in counts}, "EDM error by given frames")]
              if counts else []),
        )))  # fmt: skip
    shown += scores_section(run)
    shown += _pictures(run, folder, [row for row in known if NEAREST in row])
    words = (
        "The loss is edm * exp(-v) + v, where v is a learned log-variance, so it may be negative. "
        "Watch the EDM error instead."
    )
    return [
        *shown,
        ("Loss, learning rate and gradient", html.text(words) + html.row(
            _smooth_curves(trained, {"loss": "loss"}, "loss with log-variance"),
            _curves(trained, {"learning_rate": "learning rate"}, "learning rate"),
            _smooth_curves(trained, {"grad_norm": "norm"}, "norm of the gradient before clipping"),
        )),
        ("Provenance", html.table(_provenance(run))),
        ("Recipe", html.code(files.read_text(run.resolved, files.RECIPE))),
    ]  # fmt: skip


def _status(run: Run) -> list[tuple[str, str]]:
    """Return the status as of now: a page does not change, so it shows no age and no time left."""
    figures = status.state(run)
    now = time.strftime("%Y-%m-%d %H:%M %Z")
    rows = status.state_rows({**figures, "seconds_left": None})
    return [(name, f"{figures['state']}, as of {now}" if name == "state" else words)
            for name, words in rows]  # fmt: skip


def scores_section(run: Run) -> list[tuple[str, str]]:
    """Return a section with the scores of the saves, none if they were not evaluated."""
    if not run.scores.exists():
        return []
    try:
        found = files.read_json(run.scores, files.FIGURES)
        chosen, best = found["chosen_step"], found["best_step"]
    except (files.BadFile, KeyError, TypeError):
        # A page must not end the training that draws it.
        return []
    by_scores = (
        f"step {chosen}, which has the most scores that are better than the base's, less those "
        "that are worse, and among equal steps the best mean rank"
        if chosen
        else "the base, since no step has more better scores than worse ones"
    )
    by_error = "was not measured in training" if best is None else f"is lowest at step {best}"
    words = (
        f"The {found['weights'].upper()} weights of each save, with the same {found['prompts']} "
        f"prompts and seeds. Step 0 is the base. The scores choose {by_scores}. The held-out error "
        f"{by_error}."
    )
    curves = []
    for name, better in found["better"].items():
        points = sorted((int(step), own[name]) for step, own in found["means"].items())
        legend = f"{better or 'neither direction'} is better"
        curves.append(html.chart({legend: points}, "step", name))
    return [("Scores of the saves", html.text(words) + html.row(*curves))]


def _pictures(run: Run, folder: Path, samples: list[Row]) -> Iterator[tuple[str, str]]:
    """Yield a section of previews and one of samples, if the run has any."""
    if steps := _thin_out(run.picture_steps("preview")):
        note = (
            "Each row starts with a frame of a clip. Next to it are the estimates that one step of "
            "the denoiser makes of this frame from a noised clip, with more noise from column to "
            "column. Sigma is the standard deviation of the noise."
        )
        heads = ("clip", *(f"sigma {sigma:g}" for sigma in PREVIEW_SIGMAS))
        rows = ((f"step {step}", html.media(run.preview(step), heads=heads)) for step in steps)
        yield "Previews", html.text(note) + html.table(rows)
    if steps := _thin_out(run.picture_steps("sample0")):
        tables = ""
        for prompts, own in groupby(steps, partial(status.sample_prompts, run)):
            pictures = (
                (f"step {step}", *(_sample(run, step, i, folder) for i in range(len(prompts))))
                for step in own
            )
            tables += html.table(pictures, ("", *prompts))
        note = "Videos of captions of the dataset. A picture shows four frames and opens the video."
        names = {NEAREST: "nearest sample", "clips_apart": "typical between training clips"}
        distances = _curves(samples, names, "distance to the nearest training clip")
        yield "Samples", html.text(note) + tables + (distances if samples else "")


def _sample(run: Run, step: int, index: int, folder: Path) -> str:
    mp4 = run.sample(step, index)
    picture = mp4.with_suffix(".jpg")
    if not picture.exists():
        return ""
    target = os.path.relpath(mp4, folder) if mp4.exists() else ""
    return html.media(picture, mp4.name if target else "", target)


def _thin_out(steps: list[int]) -> list[int]:
    """Return the first step, the last, and evenly spaced steps between."""
    return sorted({*steps[:1], *steps[:: -max(1, -(-len(steps) // MOST_STEPS))]})


def _curves(points: list[Row], names: dict[str, str], title: str) -> str:
    return html.chart(_series(points, names), "step", title)


def _smooth_curves(points: list[Row], names: dict[str, str], title: str) -> str:
    series = _series(points, names)
    smoothed = {name: html.smooth(line) for name, line in series.items()}
    return html.chart(smoothed, "step", f"smoothed {title}", faint=series)


def _series(points: list[Row], names: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    return {
        name: [(row["step"], row[key]) for row in points if row.get(key) is not None]
        for key, name in names.items()
    }


def _against_base(measured: list[Row]) -> dict[str, list[tuple[float, float]]]:
    series = {"held-out clips": [(row["step"], row[HELD_OUT]) for row in measured]}
    if measured[0]["step"] == 0:
        base = measured[0][HELD_OUT]
        series["base"] = [(0, base), (measured[-1]["step"], base)]
    return series


def _band(key: str) -> str:
    """Return a label for a key: "sigma below 0.5" for "edm_sigma_below_0.5"."""
    return key.partition("_")[2].replace("_", " ")


def _provenance(run: Run) -> list[tuple[str, str]]:
    environment = files.read_json(run.root / "env.json")
    facts = [(key, value) for key, value in environment.items() if value]
    steps = run.resumable_steps()
    if steps:
        saved = files.read_json(run.resume_state(steps[-1]) / paths.MANIFEST_FILE)
        facts += [("dataset manifest sha256", saved["dataset"]), ("processes", saved["world_size"])]
    return [(key, " ".join(map(str, v)) if isinstance(v, list) else str(v)) for key, v in facts]
