"""Several processes at one folder: who does what, by locks on the bytes of one file. No torch.

The system frees the locks of a process that dies, also on another node of a shared disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosmos_cli import layout
from cosmos_cli.errors import ExitCode, UserError

# Which byte stands for what: being at work at all, then each piece of work.
_MEMBERS, _FIRST_PIECE = 0, 1


class Crew:
    """The processes that do one job together; each must number its pieces of work the same."""

    def __init__(self, file: int, job: str, where: Path) -> None:
        self._file, self._job, self._where = file, job.encode(), where
        self.first = self._lock(_MEMBERS, fcntl.LOCK_EX | fcntl.LOCK_NB)
        """Whether nobody else is at work; then nobody comes in before `start`."""
        if not self.first:
            self._lock(_MEMBERS, fcntl.LOCK_SH)
            if not self._read().startswith(self._job):
                # Whoever was first may have given up before it began.
                self.first = self._lock(_MEMBERS, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self.first:
                    raise self._another()
        if self.first:
            os.ftruncate(file, 0)

    def start(self) -> None:
        """Lets others in."""
        if self.first:
            os.pwrite(self._file, self._job, 0)
            self._lock(_MEMBERS, fcntl.LOCK_SH)

    @contextmanager
    def piece(self, number: int) -> Iterator[bool]:
        """Whether piece `number` is ours to do; others leave it alone meanwhile."""
        ours = self._lock(_FIRST_PIECE + number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield ours
        finally:
            if ours:
                self._lock(_FIRST_PIECE + number, fcntl.LOCK_UN)

    def wait_for_others(self) -> bool:
        """Waits until nobody else is at work; whether somebody has finished the job meanwhile.

        Raises:
            UserError: somebody began another job meanwhile.
        """
        # Not an upgrade: two who wait for each other's lock would wait for ever.
        self._lock(_MEMBERS, fcntl.LOCK_UN)
        self._lock(_MEMBERS, fcntl.LOCK_EX)
        if not self._read().startswith(self._job):
            raise self._another()
        return self._read() == self._job + b"\n"

    def finished(self) -> None:
        """Tells those who wait that nothing is left to do."""
        os.pwrite(self._file, b"\n", len(self._job))

    def _read(self) -> bytes:
        return os.pread(self._file, len(self._job) + 1, 0)

    def _lock(self, byte: int, how: int) -> bool:
        try:
            fcntl.lockf(self._file, how, 1, byte)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise UserError(
                f"cannot be locked: {os.strerror(error.errno or 0)}",
                code=ExitCode.ASSET,
                where=str(self._where),
                fix="use a disk with file locks (Lustre has them when mounted with flock)",
            ) from error
        return True

    def _another(self) -> UserError:
        return UserError(
            "another cosmos prep is at work on it, with another recipe or other videos",
            code=ExitCode.USAGE,
            where=str(self._where),
            fix="wait for it, or set another dataset_dir",
        )


@contextmanager
def crew(path: Path, job: str) -> Iterator[Crew]:
    """Joins those who do `job`, a text that says what decides its result, around the file `path`.

    Raises:
        UserError: others are at work on another job, or the file cannot be written.
    """
    with layout.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield Crew(file, job, path.parent)
    finally:
        os.close(file)
