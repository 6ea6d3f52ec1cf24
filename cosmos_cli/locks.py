"""Lock files against other processes, on this machine and on others that share the disk. No torch.

The system frees the locks of a process that dies. Two of its calls are used, for what the other
cannot do:

- `flock` locks an open file, for as long as any process has it open. So the launcher of a run
  keeps the lock of a `cosmos train` that was killed, until its ranks have saved.
- `lockf` locks single bytes, so that one file holds a lock for each piece of a shared job.

Some shared disks have no locks, for example Lustre mounted without flock. There a command that
works alone gets every lock, with one warning that names the folder: it is safe without. A command
that a launcher started as one of several ranks is refused.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from cosmos_cli import console, files
from cosmos_cli.errors import environment_error, usage_error


@contextmanager
def writing(path: Path, lock: str, command: str) -> Iterator[None]:
    """Keep other processes from writing a file while the block runs; `lock` is a name next to it.

    Raises:
        UserError: another process writes it, or the lock cannot be made.
    """
    name = path.with_name(lock)
    with held(name, command) as alone:
        if alone is None:
            what, fix = f"another `{command}` is writing it", "wait for it, or choose another file"
            raise usage_error(path, what, fix)
        try:
            yield
        finally:
            name.unlink(missing_ok=True)


@contextmanager
def held(path: Path, command: str, waiting: str = "") -> Iterator[int | None]:
    """Lock a file while the block runs, and yield its descriptor. The block may delete the file.

    If another process holds the lock, say `waiting` and wait for it. Without `waiting`, yield None.

    Raises:
        UserError: the file cannot be created, or the disk has no locks and there are several ranks.
    """
    while True:
        with files.disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try_now = partial(fcntl.flock, file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = _granted(try_now, path.parent, command)
            if not locked and waiting:
                console.say(waiting)
                locked = _granted(partial(fcntl.flock, file, fcntl.LOCK_EX), path.parent, command)
            # The previous holder may have deleted the file between our open and our lock.
            if not locked or files.file_id(path) == files.file_id(file):
                yield file if locked else None
                return
        finally:
            os.close(file)


def lock_byte(file: int, byte: int, how: int, folder: Path, command: str) -> bool:
    """Lock or unlock a byte of an open file as `how` says; False if another process holds it.

    Raises:
        UserError: the disk has no locks, and there are several ranks.
    """
    return _granted(partial(fcntl.lockf, file, how, 1, byte), folder, command)


def missing(folder: Path) -> bool:
    """True if a lock in the folder was granted because its disk has none."""
    return folder in _without


_without: set[Path] = set()


def _granted(lock: Callable[[], None], folder: Path, command: str) -> bool:
    try:
        lock()
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        _without.add(folder)
        _go_without(folder, command, f"cannot be locked ({os.strerror(error.errno or 0)})")
    return True


@cache
def _go_without(folder: Path, command: str, what: str) -> None:
    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        fix = (
            "use a disk with locks (Lustre: mount it with -o flock), or start "
            f"`{command} RECIPE` without a launcher"
        )
        raise environment_error(folder, f"{what}, and WORLD_SIZE is {ranks}", fix)
    console.warn(f"{folder}: {what}: make sure that only one `{command}` runs there")
