"""Show the metrics and pictures of a run in TensorBoard, wandb or trackio. Does not import torch.

The tracker runs in a separate process that reads the run's files. So a tracker that fails, hangs or
asks for input can neither end the run nor slow it down.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_cli import console, files, hashes
from cosmos_cli.errors import environment_error
from cosmos_cli.paths import Run
from cosmos_cli.train import status

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# The pause between two reads of the run's files, and the time limit for the last read at the end.
PAUSE_SECONDS, END_SECONDS = 2.0, 60.0


def check_tracker(r: Recipe) -> None:
    """Refuse a tracker whose package is missing, before training starts.

    Raises:
        UserError: the package is not installed.
    """
    if r.tracker != "none" and importlib.util.find_spec(r.tracker) is None:
        fix = f"run `pip install {r.tracker}`, or add `--set tracker=none`"
        raise environment_error("tracker", f"the package {r.tracker} is not installed", fix)


@contextmanager
def following(r: Recipe, run: Run) -> Iterator[None]:
    """Run the recipe's tracker in its own process for as long as the context lasts."""
    if r.tracker == "none":
        yield
        return
    log = run.log.with_name("tracker.log")
    with files.disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("wb")
    with stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "cosmos_cli.train.trackers", str(run.root)],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env=_environment(run),
            # Ctrl-C must reach only the run. The tracker still shows what the run writes after it.
            start_new_session=True,
        )
    try:
        yield
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            code = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        if code:
            console.warn(f"{r.tracker} does not show all of the run, see {log}")


def _environment(run: Run) -> dict[str, str]:
    defaults = {
        "WANDB_MODE": "online" if "WANDB_API_KEY" in os.environ else "offline",
        "WANDB_DIR": str(run.root),
        "WANDB_RUN_ID": hashes.sha256_text(str(run.root))[:16],
        "TRACKIO_DIR": str(run.root / "trackio"),
        "PYTHONSAFEPATH": "1",
    }
    return {**defaults, **os.environ}


class TensorBoard:
    """Writes event files into the run's folder.

    They are rewritten at each start, because a resumed run may have undone steps.
    """

    def __init__(self, run: Run) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.root / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = EventFileWriter(str(folder))

    def figure(self, step: int, name: str, value: float) -> None:
        self._add(step, {"tag": name, "simple_value": value})

    def picture(self, step: int, name: str, path: Path) -> None:
        from PIL import Image

        with Image.open(path) as image:
            width, height = image.size
        shown = {"height": height, "width": width, "encoded_image_string": path.read_bytes()}
        self._add(step, {"tag": name, "image": shown})

    def close(self) -> None:
        self.writer.close()

    def _add(self, step: int, value: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), step=step, summary={"value": [value]})
        self.writer.add_event(event)


class Wandb:
    """Logs to wandb, or to trackio, which has the same interface."""

    def __init__(self, r: Recipe) -> None:
        self.module: Any = importlib.import_module(r.tracker)
        settings = json.loads(r.model_dump_json())
        self.module.init(project=r.project, name=r.name, config=settings, resume="allow")

    def figure(self, step: int, name: str, value: float) -> None:
        self.module.log({name: value}, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.module.log({name: self.module.Image(str(path))}, step=step)

    def close(self) -> None:
        self.module.finish()


class UnreadRows:
    """Reads the rows and pictures of a run, each of them once."""

    def __init__(self, run: Run) -> None:
        self.run, self.rows = run, status.RowReader(run)
        self.known: set[tuple[Any, ...]] = set()

    def read(self) -> list[tuple[int, dict[str, float | Path]]]:
        """Return each unread step with its figures and pictures by name.

        Steps are ascending, because some trackers require it.
        """
        found: list[tuple[int, dict[str, Any]]] = [
            (row["step"], {k: v for k, v in row.items() if k != "step" and v is not None})
            for row in self.rows.read()
        ]
        for path in self.run.samples.glob("step_*.jpg"):
            _, step, name = path.stem.split("_")
            found.append((int(step), {name: path}))
        keys = [(step, *values) for step, values in found]
        new = [item for key, item in zip(keys, found, strict=True) if key not in self.known]
        self.known.update(keys)
        return sorted(new, key=lambda item: item[0])

    def show(self, writer: TensorBoard | Wandb) -> None:
        """Pass all unread rows and pictures to a tracker."""
        for step, values in self.read():
            for name, value in values.items():
                if isinstance(value, Path):
                    writer.picture(step, name, value)
                else:
                    writer.figure(step, name, value)


def main(root: str) -> None:
    """Follow the run in a folder until stdin is closed."""
    # Slurm signals every process of a job, but a run that was told to stop still writes rows.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from cosmos_cli.recipe import loading

    run = Run(Path(root))
    r = loading.load(str(run.resolved)).recipe
    unread, ended = UnreadRows(run), threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    writer: TensorBoard | Wandb
    if r.tracker == "tensorboard":
        writer = TensorBoard(run)
    else:
        # These trackers continue a resumed run, so rows that already exist have been shown.
        unread.read()
        writer = Wandb(r)
    while not ended.wait(PAUSE_SECONDS):
        unread.show(writer)
    unread.show(writer)
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
