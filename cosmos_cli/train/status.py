"""Read and write the metrics and the status of a run. No torch.

The training loop writes status.json and metrics.jsonl at every logged step. They can be read from
any process, while the run trains or long after.
"""

from __future__ import annotations

import json
import os
import platform
import time
from typing import Any

import psutil

from cosmos_cli import console, files
from cosmos_cli.errors import asset_error
from cosmos_cli.paths import Run

Row = dict[str, Any]
HELD_OUT = "heldout"
NEAREST = "nearest_clip"


def rows(run: Run) -> list[Row]:
    """Return the rows of metrics.jsonl, without a last line that was cut short by a kill."""
    return RowReader(run).read()


class RowReader:
    """Reads metrics.jsonl while it grows, each byte once, unless the file is replaced."""

    def __init__(self, run: Run) -> None:
        self.path = run.metrics
        self.file: tuple[int, int] | None = None
        self.offset = 0

    def read(self) -> list[Row]:
        """Return the whole rows since the last call, or all of them if the file is a new one."""
        try:
            stream = files.open_regular(self.path, files.FIGURES)
        except files.NoSuchFile:
            return []
        with stream:
            file = files.file_id(stream.fileno())
            if file != self.file or stream.seek(0, os.SEEK_END) < self.offset:
                self.file, self.offset = file, 0
            stream.seek(self.offset)
            content = stream.read(files.FIGURES.limit)
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError) as error:
            raise files.bad(self.path, files.FIGURES, f"is damaged: {error}") from error


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
        return int(files.read_json(run.status, files.FIGURES)["saved_step"])
    except files.NoSuchFile:
        # Training writes status.json before its first row, so the rows show that it was deleted.
        steps = [row["step"] for row in rows(run)]
    except (files.BadFile, ValueError, KeyError, TypeError):
        steps = []
    return max([*run.weight_files(), *steps], default=0)


def sample_prompts(run: Run, step: int) -> list[str]:
    """Return the prompts of a step's samples, in the order of their indices."""
    path = run.sample_prompts(step)
    # Earlier versions wrote one file for all steps.
    path = path if path.exists() else run.samples / "prompts.json"
    prompts: list[str] = files.read_json(path, files.FIGURES) if path.exists() else []
    return prompts


def is_finished(run: Run) -> bool:
    """True if a run has finished, including the measurements and pictures after its last save."""
    return run.result.exists() and not files.read_json(run.result, files.FIGURES)["exit_code"]


def require_saved(run: Run, weights: str) -> list[int]:
    """Return the saved steps of a run's weights, of the kind ema or reg.

    Raises:
        UserError: there are none.
    """
    if saved := run.saved_steps(weights):
        return saved
    fix = "run `cosmos train RECIPE` first"
    raise asset_error(run.checkpoints.absolute(), "the run has no checkpoint", fix)


def best_step(run: Run, weights: str = "ema") -> int | None:
    """Return the step with the lowest held-out error of those whose weights are saved, or None.

    It is None if none of them was measured.
    """
    saved = set(run.saved_steps(weights))
    errors = [(row[HELD_OUT], row["step"]) for row in rows(run) if HELD_OUT in row]
    return min((pair for pair in errors if pair[1] in saved), default=(0.0, None))[1]


def least_step(run: Run) -> int | None:
    """Return the step with the lowest held-out error, saved or not, or None if none was measured.

    Step 0 is the base model.
    """
    errors = [(row[HELD_OUT], row["step"]) for row in rows(run) if HELD_OUT in row]
    return min(errors, default=(0.0, None))[1]


def state(run: Run) -> Row:
    """Return the state, progress, latest figures and saved steps of a run.

    Raises:
        UserError: there is no run.
    """
    if not run.status.exists():
        raise asset_error(run.root, "there is no run", "start it with `cosmos train RECIPE`")
    status = files.read_json(run.status, files.FIGURES)
    result = files.read_json(run.result, files.FIGURES) if run.result.exists() else None
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
        "least_step": least_step(run),
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
    """Return the seconds per step since this start: saves are included, pictures are not."""
    steps = status["step"] - status.get("from", status["step"])
    if not steps:
        return {"seconds_per_step": None, "seconds_left": None}
    # An earlier version did not record this.
    running = status.get("running_seconds", status["time"] - status["started"])
    pace = running / steps
    left = (status["max_steps"] - status["step"]) * pace
    return {"seconds_per_step": round(pace, 3), "seconds_left": round(left, 1)}


def state_table(figures: Row) -> str:
    """Return the figures of `state` as text, one line each."""
    return "\n".join(f"{name:<10} {words}" for name, words in state_rows(figures))


def state_rows(figures: Row) -> list[tuple[str, str]]:
    """Return the figures of `state` as (name, words) for a table."""
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
        words.append(("pace", console.rate(1 / figures["seconds_per_step"], "steps")))
    if figures["seconds_left"] is not None:
        words.append(("left", console.duration(figures["seconds_left"])))
    if last:
        words.append(("loss", f"{last['loss']:.4f}, edm {last['edm']:.4f} at step {last['step']}"))
    if measured:
        against = f", {base[HELD_OUT]:.4f} before training" if base else ""
        words.append(("held out", f"{measured[HELD_OUT]:.4f} at step {measured['step']}{against}"))
    words.append(("saved", ", ".join(map(str, figures["saved_steps"])) or "nothing yet"))
    if figures["best_step"] is not None:
        words.append(("best", f"step {figures['best_step']}{_better(figures)}"))
    return words


def _better(figures: Row) -> str:
    """Return a remark if a step with a lower held-out error than the best saved one exists."""
    best, least = figures["best_step"], figures["least_step"]
    if least == best:
        return ""
    name = f"step {least}" if least else "the base model"
    return f", of the saved steps; {name} had a lower held-out error"
