"""Print messages and progress on stderr, and the result on stdout as text or one JSON object."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cosmos_cli.errors import ExitCode, UserError, asset_error, fill_in
from cosmos_cli.files import disk_errors

PLAIN_SECONDS = 5.0
SCHEMA_VERSION = 1

# All but newlines and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_logs: list[TextIO] = []
_muted = False


@dataclass
class Result:
    """The result of a command: text for stdout, its figures, and the command to run next."""

    text: str = ""
    artifacts: list[Path] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    code: ExitCode = ExitCode.OK
    error: str = ""


def mute() -> None:
    """Mute this process. With several ranks, only one prints."""
    global _muted  # noqa: PLW0603
    _muted = True


def is_muted() -> bool:
    """True if this process is muted because another one prints for it."""
    return _muted


def unmute() -> None:
    """Unmute this process, so that its own failure is seen."""
    global _muted  # noqa: PLW0603
    _muted = False


def say(message: str) -> None:
    """Print a line on stderr and in the open logs."""
    message = printable(fill_in(message))
    if not _muted:
        with _ignore_write_errors(sys.stderr):
            print(fold(message, sys.stderr), file=sys.stderr, flush=True)
        _log(message)


def printable(text: str) -> str:
    """Return text with its control characters as escapes, so that it cannot steer a terminal."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def fold(text: str, stream: TextIO) -> str:
    """Return text with lines broken between words if the stream is a terminal that is narrower.

    A command in backticks stays in one piece, so that it can be copied. The last column of a table
    keeps its indentation.
    """
    if not stream.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 40)
    return "\n".join(
        # The next command is to be copied.
        line if len(line) <= width or line.startswith("next: ") else _fold_line(line, width)
        for line in text.splitlines()
    )


def _fold_line(line: str, width: int) -> str:
    columns = [found.end() for found in re.finditer(r"\S {2,}|^ +", line[: width * 2 // 3])]
    indent = max(columns, default=0)
    rows = [line[:indent]]
    for word in re.findall(r"(?:`[^`]*`|\S)+", line[indent:]):
        space = " " if rows[-1][indent:] else ""
        if space and len(rows[-1]) + 1 + len(word) > width:
            rows.append(" " * indent + word)
        else:
            rows[-1] += space + word
    return "\n".join(rows)


def warn(message: str) -> None:
    """Print a warning on stderr and in the open logs."""
    say(f"warning: {message}")


def emit(result: Result, *, as_json: bool) -> None:
    """Print the result on stdout, and errors and the next command on stderr."""
    if _muted:
        return
    if as_json:
        head = {
            "schema_version": SCHEMA_VERSION,
            "status": "ok" if result.code == ExitCode.OK else "error",
            "exit_code": int(result.code),
            "artifacts": [str(path) for path in result.artifacts],
        }
        tail = {"error": result.error} if result.error else {}
        _print(json.dumps({**head, **result.figures, **tail, "next": result.next}))
    elif result.text:
        _print(result.text)
    for line in result.error.splitlines():
        say(f"error: {line}")
    if result.next:
        say(f"next: {result.next}")


def record(value: dict[str, Any]) -> None:
    """Print one of several results on stdout as a line of JSON."""
    _print(json.dumps(value))


@contextmanager
def _ignore_write_errors(stream: TextIO) -> Iterator[None]:
    """Ignore errors of writing to a stream, and silence it once its reader is gone."""
    try:
        yield
    except OSError as error:
        if _is_gone(stream, error):
            _silence(stream)


def _is_gone(stream: TextIO, error: OSError) -> bool:
    """True if the reader of a stream is gone: a closed pipe (`| head`) or terminal."""
    if error.errno != errno.EIO:
        return isinstance(error, BrokenPipeError)
    return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)


def _silence(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, so that flushing its buffer at exit cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Terminal:
    """A stderr for rich that survives a closed terminal, which would otherwise end the command."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with _ignore_write_errors(self.stream):
            self.stream.write(text)

    def flush(self) -> None:
        with _ignore_write_errors(self.stream):
            self.stream.flush()


def _print(text: str) -> None:
    """Print on stdout. If its reader is gone, that is not a failure of the command.

    Raises:
        UserError: stdout cannot be written, for instance because its disk is full.
    """
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:
            # The encoding of stdout lacks a character, for instance of a file name.
            print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError as error:
        gone = _is_gone(sys.stdout, error)
        _silence(sys.stdout)
        if not gone:
            what = f"cannot be written: {error.strerror}"
            raise asset_error("standard output", what, "write it elsewhere: `> FILE`") from error


def failure(error: UserError) -> Result:
    """Return the result of a command that ended with a UserError."""
    return Result(
        artifacts=list(error.artifacts),
        figures=dict(error.figures),
        code=error.code,
        error=str(error),
    )


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Append all messages in the block to the log file `path`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a", encoding="utf-8", errors="surrogateescape")
    _logs.append(stream)
    try:
        yield
    finally:
        _logs.remove(stream)
        with contextlib.suppress(OSError):
            stream.close()


def _log(message: str) -> None:
    # If a log cannot be written, as on a full disk, the command must still report its own error.
    with contextlib.suppress(OSError):
        for stream in () if _muted else _logs:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=stream, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as text: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Return bytes as text in powers of 1000, such as 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def rate(per_second: float, unit: str) -> str:
    """Return a rate as text: 1.25 steps/s, or 14.30 s a step."""
    if 0 < per_second < 1:
        return f"{1 / per_second:.2f} s a {unit.removesuffix('s')}"
    return f"{per_second:.2f} {unit}/s"


class Progress:
    """Show progress: a live bar on a terminal, elsewhere a plain line every few seconds."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.started = self.printed = time.monotonic()
        self.bar: Any = None

    def advance(self, note: str = "", count: int = 1) -> None:
        """Add `count` to the units done. `note` is shown next to the rate."""
        self.done += count
        if self.bar is not None:
            shown = ", ".join(filter(None, [self.rate(), self.left(), printable(note)]))
            self.bar.update(self.bar.task_ids[0], completed=self.done, note=shown)
        if time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            (say if self.bar is None else _log)(self.line(note))

    def line(self, note: str = "") -> str:
        """Return the progress as one line with rate and time left."""
        head = f"{self.label} {self.done}/{self.total} {self.unit}"
        return ", ".join(filter(None, [head, note, self.rate(), self.left()]))

    def seconds(self) -> float:
        """Return the seconds since the start, without those that were paused."""
        return max(time.monotonic() - self.started, 1e-9)

    def rate(self) -> str:
        """Return the rate as text, as of `console.rate`."""
        return rate((self.done - self.first) / self.seconds(), self.unit)

    def left(self) -> str:
        """Return the time left as text."""
        counted = self.done - self.first
        if not counted:
            return "? left"
        return f"{duration((self.total - self.done) / counted * self.seconds())} left"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of the rate and the time left."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - began


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show the progress of `total` units, of which `done` were finished before."""
    counter = Progress(label, total, unit, done)
    if _muted or not sys.stderr.isatty():
        yield counter
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    terminal: Any = _Terminal(sys.stderr)
    with Bar(*columns, console=Console(file=terminal)) as bar:
        bar.add_task(label, total=total, completed=done, note="")
        counter.bar = bar
        yield counter


class Stopwatch:
    """Add up the seconds that each named phase takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to `phase`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Return rows under a header as text, with columns aligned by spaces."""
    header, *rows = [tuple(map(printable, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return fold("\n".join(lines), sys.stdout)
