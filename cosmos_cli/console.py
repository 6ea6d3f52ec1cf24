"""What the user sees: messages and progress on stderr, the result on stdout, one JSON object."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.files import disk_errors

PLAIN_SECONDS = 5.0
SCHEMA_VERSION = 1

_logs: list[TextIO] = []
_muted = False


@dataclass
class Result:
    """What a command hands back: text for stdout, the same as figures, the command to run next."""

    text: str = ""
    artifacts: list[Path] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    next: str = ""
    code: ExitCode = ExitCode.OK
    error: str = ""


def mute() -> None:
    """Silences this process: of many ranks one speaks."""
    global _muted  # noqa: PLW0603
    _muted = True


def is_muted() -> bool:
    """True if another process speaks for this one."""
    return _muted


def unmute() -> None:
    """Lets this process speak again: its own failure must be seen."""
    global _muted  # noqa: PLW0603
    _muted = False


def say(message: str) -> None:
    """Prints a line on stderr and in the open logs."""
    if not _muted:
        with _unread(sys.stderr):
            print(message, file=sys.stderr, flush=True)
        _log(message)


def warn(message: str) -> None:
    """Prints a warning on stderr and in the open logs."""
    say(f"warning: {message}")


def emit(result: Result, *, as_json: bool) -> None:
    """Prints the result on stdout; errors and the next command go to stderr."""
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
    """Prints one of many results on stdout, as a line of JSON."""
    _print(json.dumps(value))


@contextmanager
def _unread(stream: TextIO) -> Iterator[None]:
    """Go on when nobody reads a stream any more, or its disk is full."""
    try:
        yield
    except OSError as error:
        if _is_gone(stream, error):
            _silence(stream)


def _is_gone(stream: TextIO, error: OSError) -> bool:
    """Return whether the reader of a stream went away: a pipe (`| head`) or a closed terminal."""
    if error.errno != errno.EIO:
        return isinstance(error, BrokenPipeError)
    return stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)


def _silence(stream: TextIO) -> None:
    """Send a stream nowhere, so that what it holds back cannot fail when Python ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Terminal:
    """stderr for rich, which a terminal that is gone would end, and with it the command."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with _unread(self.stream):
            self.stream.write(text)

    def flush(self) -> None:
        with _unread(self.stream):
            self.stream.flush()


def _print(text: str) -> None:
    """Prints on stdout; that the reader went away is no failure of the command.

    Raises:
        UserError: its disk is full.
    """
    try:
        try:
            print(text, flush=True)
        except UnicodeEncodeError:
            # The reader's alphabet is smaller than that of a file name.
            print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError as error:
        gone = _is_gone(sys.stdout, error)
        _silence(sys.stdout)
        if not gone:
            raise UserError(
                f"cannot be written: {error.strerror}", code=ExitCode.ASSET,
                where="standard output", fix="free some space, or write it elsewhere",
            ) from error  # fmt: skip


def failure(error: UserError) -> Result:
    """The result of a command that a UserError ended."""
    return Result(
        artifacts=list(error.artifacts),
        figures=dict(error.figures),
        code=error.code,
        error=str(error),
    )


@contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Appends what is said meanwhile to `path`."""
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
    # A log that cannot be written, say on a full disk, must not hide what it would have said.
    with contextlib.suppress(OSError):
        for stream in () if _muted else _logs:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=stream, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 8 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Progress:
    """Counts something long: a live bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self.first = done
        self.started = self.printed = time.monotonic()
        self.bar: Any = None

    def advance(self, note: str = "", count: int = 1) -> None:
        """Counts `count` more; `note` is shown behind the rate."""
        self.done += count
        if self.bar is not None:
            shown = ", ".join(filter(None, [note, self.rate()]))
            self.bar.update(self.bar.task_ids[0], completed=self.done, note=shown)
        if time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            (say if self.bar is None else _log)(self.line(note))

    def line(self, note: str = "") -> str:
        """Where it stands, as one line with rate and time left."""
        spent = time.monotonic() - self.started
        counted = self.done - self.first
        left = duration((self.total - self.done) / counted * spent) if counted else "?"
        head = f"{self.label} {self.done}/{self.total} {self.unit}"
        return ", ".join(filter(None, [head, note, self.rate(), f"{left} left"]))

    def rate(self) -> str:
        """How fast it goes, e.g. 1.25 clips/s."""
        spent = max(time.monotonic() - self.started, 1e-9)
        return f"{(self.done - self.first) / spent:.2f} {self.unit}/s"


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Shows the progress of `total` things, `done` of which were there before."""
    counter = Progress(label, total, unit, done)
    if _muted or not sys.stderr.isatty():
        yield counter
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeRemainingColumn(),
    )
    terminal: Any = _Terminal(sys.stderr)
    with Bar(*columns, console=Console(file=terminal)) as bar:
        bar.add_task(label, total=total, completed=done, note="")
        counter.bar = bar
        yield counter


class Stopwatch:
    """Adds up the seconds that each phase of something takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts what happens meanwhile as `phase`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> str:
    """Rows under a header, columns aligned by spaces."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join(lines)
