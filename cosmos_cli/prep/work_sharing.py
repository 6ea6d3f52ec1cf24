"""Share one job among several processes, with locks on the bytes of one file. No torch.

The system frees the locks of a process that dies, even on another node of a shared disk.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosmos_cli import files, locks
from cosmos_cli.errors import UserError, usage_error

# Byte 0 is locked by every process at work, byte 1 + N by the process that does piece N.
_MEMBERS, _FIRST_PIECE = 0, 1


class Workers:
    """The processes that share one job. All must number its pieces in the same way."""

    def __init__(self, file: int, job: str, where: Path) -> None:
        self._file, self._job, self._where = file, job.encode(), where
        self.first = self._lock(_MEMBERS, fcntl.LOCK_EX | fcntl.LOCK_NB)
        """True if no other process is at work. Then none can join before `start`."""
        if not self.first:
            self._lock(_MEMBERS, fcntl.LOCK_SH)
            if not self._read().startswith(self._job):
                # The first process may have ended before it called `start`.
                self.first = self._lock(_MEMBERS, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not self.first:
                    raise self._another()
        if self.first:
            os.ftruncate(file, 0)
        self.can_share = not locks.missing(where)
        """False if the disk has no locks, so every process would do all the work."""

    def start(self) -> None:
        """Let other processes join."""
        if self.first:
            os.pwrite(self._file, self._job, 0)
            self._lock(_MEMBERS, fcntl.LOCK_SH)

    def take(self, number: int) -> bool:
        """Lock piece `number` until `release`; return False if another process has it."""
        return self._lock(_FIRST_PIECE + number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self, number: int) -> None:
        """Unlock a piece that was taken. When this process ends, all of its pieces are unlocked."""
        self._lock(_FIRST_PIECE + number, fcntl.LOCK_UN)

    @contextmanager
    def piece(self, number: int) -> Iterator[bool]:
        """Lock piece `number` while the context lasts; False if another process does it."""
        ours = self.take(number)
        try:
            yield ours
        finally:
            if ours:
                self.release(number)

    def wait_for_others(self) -> bool:
        """Wait until no other process is at work; True if one of them finished the job.

        Raises:
            UserError: another process began a different job in the meantime.
        """
        # Unlock first: two processes that both upgrade a shared lock would wait for each other
        # for ever.
        self._lock(_MEMBERS, fcntl.LOCK_UN)
        self._lock(_MEMBERS, fcntl.LOCK_EX)
        if not self._read().startswith(self._job):
            raise self._another()
        return self._read() == self._job + b"\n"

    def finished(self) -> None:
        """Tell the waiting processes that the job is done."""
        os.pwrite(self._file, b"\n", len(self._job))

    def _read(self) -> bytes:
        return os.pread(self._file, len(self._job) + 1, 0)

    def _lock(self, byte: int, how: int) -> bool:
        return locks.lock_byte(self._file, byte, how, self._where, "cosmos prep")

    def _another(self) -> UserError:
        what = "another `cosmos prep` is working here, with a different recipe or different videos"
        fix = "wait until it ends, or use `--set dataset_dir=FOLDER`"
        return usage_error(self._where, what, fix)


@contextmanager
def workers(path: Path, job: str) -> Iterator[Workers]:
    """Join the processes that do the same job, with the locks in the file `path`.

    The text `job` identifies the job by all that decides its result.

    Raises:
        UserError: other processes do a different job, or the file cannot be written.
    """
    with files.disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield Workers(file, job, path.parent)
    finally:
        os.close(file)
