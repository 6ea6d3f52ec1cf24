"""Read the folder of a run: its metrics, its status and its report page. Does not import torch.

The training loop writes status.json and metrics.jsonl at every logged step. They can be read from
any process, while the run trains or long after.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil

from cosmos_cli import console, files, html, paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.paths import Run
from cosmos_cli.spec import PREVIEW_SIGMAS

Row = dict[str, Any]
HELD_OUT = "heldout"
NEAREST = "nearest_clip"
# A page shows the pictures of at most this many steps, in addition to the first.
MOST_STEPS = 10


def rows(run: Run) -> list[Row]:
    """Return the rows of metrics.jsonl, without a last line that was cut short by a kill."""
    if not run.metrics.exists():
        return []
    lines = files.read_text(run.metrics, files.FIGURES).splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (ValueError, RecursionError) as error:
        raise files.bad(run.metrics, files.FIGURES, f"is damaged: {error}") from error


def note(run: Run, figures: Row) -> None:
    """Write status.json: the figures, the time, and the process and host that wrote them."""
    who = {"time": time.time(), "pid": os.getpid(), "host": platform.node()}
    files.write_json(run.status, {**figures, **who})


def saved_step(run: Run) -> int:
    """Return the newest step that the run is known to have saved completely, or 0.

    A kill during a save leaves model files too, so these alone do not prove a complete save. They
    count only if status.json is missing, damaged or from a version that did not record the step.
    """
    try:
        return int(json.loads(files.read_text(run.status, files.JSON))["saved_step"])
    except files.NoSuchFile:
        # Training writes status.json before its first row, so the rows show that it was deleted.
        steps = [row["step"] for row in rows(run)]
    except (files.BadFile, ValueError, KeyError, TypeError):
        steps = []
    return max([*run.weight_files(), *steps], default=0)


def is_finished(run: Run) -> bool:
    """True if a run has finished, including the measurements and pictures after its last save."""
    return run.result.exists() and not files.read_json(run.result)["exit_code"]


def best_step(run: Run) -> int | None:
    """Return the saved step with the lowest held-out error, or None if none was measured."""
    saved = set(run.saved_steps("ema"))
    errors = [(row[HELD_OUT], row["step"]) for row in rows(run) if HELD_OUT in row]
    return min((pair for pair in errors if pair[1] in saved), default=(0.0, None))[1]


def state(run: Run) -> Row:
    """Return the state, progress, latest figures and saved steps of a run.

    Raises:
        UserError: there is no run.
    """
    if not run.status.exists():
        raise UserError(
            "there is no run", code=ExitCode.ASSET, where=str(run.root),
            fix="start it with `cosmos train RECIPE`",
        )  # fmt: skip
    status = files.read_json(run.status)
    result = files.read_json(run.result) if run.result.exists() else None
    known = rows(run)
    trained = [row for row in known if "loss" in row]
    measured = [row for row in known if HELD_OUT in row]
    figures = {
        "state": _state_name(status, result),
        "run_dir": str(run.root),
        "step": status["step"],
        "max_steps": status["max_steps"],
        **_pace(status),
        "last": trained[-1] if trained else None,
        "heldout": measured[-1] if measured else None,
        "heldout_base": measured[0] if measured and measured[0]["step"] == 0 else None,
        "saved_steps": run.saved_steps("ema"),
        "resumable_steps": run.resumable_steps(),
        "best_step": best_step(run),
        "seconds_since_news": round(time.time() - status["time"], 1),
    }
    if figures["state"] != "running":
        figures["seconds_left"] = None
    return figures


def _state_name(status: Row, result: Row | None) -> str:
    if result is not None:
        return "stopped" if result["exit_code"] else "finished"
    if status["host"] != platform.node():
        return f"unknown, on {status['host']}"
    try:
        # The process number may have been reused by a process that started later.
        alive = psutil.Process(status["pid"]).create_time() <= status["time"]
    except psutil.NoSuchProcess:
        alive = False
    return "running" if alive else "failed"


def _pace(status: Row) -> Row:
    """Return the seconds per step since this start, including saves and measurements."""
    steps = status["step"] - status.get("from", status["step"])
    if not steps:
        return {"seconds_per_step": None, "seconds_left": None}
    pace = (status["time"] - status["started"]) / steps
    left = (status["max_steps"] - status["step"]) * pace
    return {"seconds_per_step": round(pace, 3), "seconds_left": round(left, 1)}


def state_table(figures: Row) -> str:
    """Return the figures of `state` as text, one line each."""
    return "\n".join(f"{name:<10} {words}" for name, words in _state_words(figures))


def _state_words(figures: Row) -> list[tuple[str, str]]:
    last, measured, base = figures["last"], figures["heldout"], figures["heldout_base"]
    words = [
        ("run", figures["run_dir"]),
        (
            "state",
            f"{figures['state']}, updated {console.duration(figures['seconds_since_news'])} ago",
        ),
        ("step", f"{figures['step']} of {figures['max_steps']}"),
    ]
    if figures["seconds_per_step"]:
        words.append(("pace", f"{figures['seconds_per_step']:.2f} s a step"))
    if figures["seconds_left"] is not None:
        words.append(("left", console.duration(figures["seconds_left"])))
    if last:
        words.append(("loss", f"{last['loss']:.4f}, edm {last['edm']:.4f} at step {last['step']}"))
    if measured:
        against = f", {base[HELD_OUT]:.4f} before training" if base else ""
        words.append(("held out", f"{measured[HELD_OUT]:.4f} at step {measured['step']}{against}"))
    words.append(("saved", ", ".join(map(str, figures["saved_steps"])) or "nothing yet"))
    if figures["best_step"] is not None:
        words.append(("best", f"step {figures['best_step']}"))
    return words


# --- the page -------------------------------------------------------------------------------------


def write_page(run: Run) -> None:
    """Write report.html: the curves, settings and provenance of a run on one page."""
    files.write_text(run.report, html.page(f"Training run {run.root.name}", sections(run)))


def sections(run: Run) -> list[tuple[str, str]]:
    """Return the sections of a run's page, as (heading, HTML) for `html.page`."""
    known = rows(run)
    trained = [row for row in known if "loss" in row]
    measured = [row for row in known if HELD_OUT in row]
    bands = [key for key in (trained[0] if trained else {}) if key.startswith("edm_")]
    levels = [key for key in (measured[0] if measured else {}) if key.startswith(f"{HELD_OUT}_")]
    shown = [
        ("Status", html.table(_state_words(state(run)))),
        ("Error on the training clips", html.row(
            _curves(trained, {"edm": "all"}, "EDM error"),
            _curves(trained, {key: _band(key) for key in bands}, "EDM error by noise band"),
        )),
    ]  # fmt: skip
    if measured:
        shown.append(("Error on held-out clips", html.row(
            html.chart(_against_base(measured), "step", "EDM error, compared with the base model"),
            _curves(measured, {key: _band(key) for key in levels}, "EDM error by noise level"),
        )))  # fmt: skip
    shown += _pictures(run, [row for row in known if NEAREST in row])
    words = (
        "The loss is edm * exp(-v) + v, where v is a learned log-variance, so it may be negative. "
        "Watch the EDM error instead."
    )
    return [
        *shown,
        ("Loss, learning rate and gradient", html.text(words) + html.row(
            _curves(trained, {"loss": "loss"}, "loss with log-variance"),
            _curves(trained, {"learning_rate": "learning rate"}, "learning rate"),
            _curves(trained, {"grad_norm": "norm"}, "norm of the gradient before clipping"),
        )),
        ("Provenance", html.table(_provenance(run))),
        ("Recipe", html.code(files.read_text(run.resolved, files.RECIPE))),
    ]  # fmt: skip


def _pictures(run: Run, samples: list[Row]) -> Iterator[tuple[str, str]]:
    """Yield a section of previews and one of samples, if the run has any."""
    if steps := _thin_out(run.picture_steps("preview")):
        note = (
            "Each row starts with a frame of a clip. Next to it are the estimates that one step of "
            "the denoiser makes of this frame, with noise of sigma "
            f"{', '.join(f'{sigma:g}' for sigma in PREVIEW_SIGMAS)}."
        )
        rows = ((f"step {step}", html.media(run.preview(step))) for step in steps)
        yield "Previews", html.text(note) + html.table(rows)
    if steps := _thin_out(run.picture_steps("sample0")):
        prompts = files.read_json(run.sample_prompts)
        sheets = (
            [run.sample(step, i).with_suffix(".jpg") for i in range(len(prompts))] for step in steps
        )
        pictures = (
            (f"step {step}", *(html.media(path) for path in pictures if path.exists()))
            for step, pictures in zip(steps, sheets, strict=True)
        )
        names = {NEAREST: "nearest sample", "clips_apart": "typical between training clips"}
        distances = _curves(samples, names, "distance to the nearest training clip")
        yield "Samples", html.table(pictures, ("", *prompts)) + (distances if samples else "")


def _thin_out(steps: list[int]) -> list[int]:
    """Return the first step, the last, and evenly spaced steps between."""
    return sorted({*steps[:1], *steps[:: -max(1, -(-len(steps) // MOST_STEPS))]})


def _curves(points: Iterable[Row], names: dict[str, str], title: str) -> str:
    series = {
        name: [(row["step"], row[key]) for row in points if row.get(key) is not None]
        for key, name in names.items()
    }
    return html.chart(series, "step", title)


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
