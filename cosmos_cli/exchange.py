"""Replace a folder so that a kill at any moment leaves the old one or the new one. No torch.

Beside `NAME` may lie `.NAME.lock`, `.NAME.building` (unfinished or outdated, may be deleted) and
`.NAME.old`. The latter exists on file systems that cannot exchange two folders in one step: for a
moment it is the only copy of the old folder, while `NAME` is missing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosmos_cli import console, files, paths
from cosmos_cli.errors import ExitCode, UserError

# Linux: sys/fcntl.h and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The kernel, a sandbox or the file system cannot exchange; EPERM is what older Docker answers.
_CANNOT_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})
# A replacement in two renames leaves the place empty for far less than this.
_PATIENCE_SECONDS = 5.0


def true_path(folder: Path) -> Path:
    """Return the folder that a link leads to, which may not exist, or the folder itself."""
    return Path(os.path.realpath(folder))


def left_aside(folder: Path) -> Path | None:
    """Return the old folder that a kill between two renames has left, None where there is none."""
    true = true_path(folder)
    old = _beside(true, "old")
    # Earlier versions deleted an old folder under this name: without weights it is a rest of one.
    lost = not os.path.lexists(true) and paths.weights_in(old) != old
    return old if lost else None


def restore(folder: Path) -> None:
    """Put back what `left_aside` finds, unless a running promotion is about to fill the place.

    Raises:
        UserError: it cannot be put back.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while old := left_aside(folder):
        true = true_path(folder)
        try:
            with _lock(true) as ours:
                if ours:
                    _restore(true)
                    return
        except (OSError, UserError) as error:
            raise _not_restored(folder, old) from error
        if time.monotonic() > deadline:
            raise _not_restored(folder, old)
        time.sleep(0.05)


def _not_restored(folder: Path, old: Path) -> UserError:
    return UserError(
        f"is missing: a cosmos promote that was stopped left the model in {old}",
        code=ExitCode.ASSET, where=str(folder),
        fix=f"once no cosmos promote is running, mv '{old}' '{true_path(folder)}'",
    )  # fmt: skip


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is to be replaced, and put back what a kill left aside.

    Raises:
        UserError: another process holds the lock, or the disk refuses.
    """
    true = true_path(folder)
    with files.disk_errors(true.parent):
        true.parent.mkdir(parents=True, exist_ok=True)
    with _lock(true) as ours:
        if not ours:
            raise UserError(
                "another cosmos promote is writing this model", code=ExitCode.USAGE,
                where=str(folder), fix="wait for it, or promote under another --name",
            )  # fmt: skip
        with files.disk_errors(true):
            _restore(true)
        yield


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it takes the place of `folder` in one step.

    Whatever ends the work before that leaves `folder` as it was and deletes the unfinished one.
    The caller holds `alone`.

    Raises:
        UserError: the disk refuses.
    """
    true = true_path(folder)
    building = _beside(true, "building")
    if os.path.ismount(true):
        raise _fixed(folder, "it is a mount point")
    with files.disk_errors(building):
        _delete(building)
        building.mkdir(parents=True)
    try:
        yield building
        with files.disk_errors(folder):
            _put(building, true)
        _discard(_beside(true, "old"))
    finally:
        with files.disk_errors(folder):
            # A signal may have come between two renames.
            _restore(true)
        _discard(building)


def _fixed(folder: Path, why: str) -> UserError:
    return UserError(
        f"cannot be replaced: {why}", code=ExitCode.ASSET, where=str(folder),
        fix="promote under another --name",
    )  # fmt: skip


def _put(building: Path, true: Path) -> None:
    files.sync(building)
    try:
        if os.path.lexists(true):
            exchange(building, true)
        else:
            building.rename(true)
    except OSError as error:
        # A bind mount; a folder of a container's image, which overlayfs cannot rename.
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise _fixed(true, os.strerror(error.errno)) from error
        raise
    files.sync(true.parent)


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders of a disk, in one step where kernel and file system can."""
    if not exchange_at_once(one, other):
        exchange_by_renames(one, other)


def exchange_at_once(one: Path, other: Path) -> bool:
    """Exchange two folders by Linux' renameat2; False, with nothing done, where it cannot.

    Raises:
        OSError: the disk refuses.
    """
    # Python has no binding; C libraries before glibc 2.28 have no function.
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def exchange_by_renames(one: Path, other: Path) -> None:
    """Exchange two folders in three renames; a kill behind the first leaves `other` aside."""
    old = _beside(other, "old")
    _delete(old)
    other.rename(old)
    one.rename(other)
    # Under this name nobody restores it, so that a kill may end its deletion halfway.
    old.rename(one)


def _beside(true: Path, what: str) -> Path:
    return true.with_name(f".{true.name}.{what}")


def _restore(true: Path) -> None:
    if old := left_aside(true):
        old.rename(true)
        console.warn(f"{true} was missing: put back from {old.name}, left by a stopped promotion")


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(path: Path) -> None:
    try:
        _delete(path)
    except OSError as error:
        console.warn(f"{path} is of no more use, but cannot be deleted: {error.strerror}")


@contextmanager
def _lock(true: Path) -> Iterator[bool]:
    """Yield whether the lock of a folder is ours; its file lies beside it while it is held."""
    path = _beside(true, "lock")
    file = _open_locked(path)
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            os.close(file)


def _open_locked(path: Path) -> int | None:
    """Return the open file with its lock, None where another process has the lock."""
    while True:
        with files.disk_errors(path):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError as error:
            # Some shared disks have no locks, such as Lustre unless it is mounted with flock.
            what = f"cannot be locked ({error.strerror}): start no second cosmos promote into it"
            console.warn(f"{path.parent}: {what}")
            return file
        # Whoever held the lock before may have deleted the file between our open and our lock.
        if files.file_id(path) == files.file_id(file):
            return file
        os.close(file)
