"""Replace a folder so that a kill at any moment leaves the old one or the new one. No torch.

Three names may exist next to `NAME`:

- `.NAME.lock`: the lock file, while a process holds it.
- `.NAME.building`: an unfinished or outdated folder, which may be deleted.
- `.NAME.old`: the old folder, on file systems that cannot exchange two folders in one step. For a
  moment it is the only copy, while `NAME` is missing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosmos_cli import console, files, locks, paths
from cosmos_cli.errors import UserError, asset_error, usage_error

# Linux: sys/fcntl.h and linux/fs.h.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# The kernel, a sandbox or the file system cannot exchange folders. Older Docker returns EPERM.
_CANNOT_EXCHANGE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})
# While a replacement by renames runs, the folder is missing for far less than this.
_PATIENCE_SECONDS = 5.0


def true_path(folder: Path) -> Path:
    """Return the folder itself or the target of a link, which need not exist."""
    return Path(os.path.realpath(folder))


def left_aside(folder: Path) -> Path | None:
    """Return the old folder that a kill between two renames left behind, or None."""
    true = true_path(folder)
    old = _beside(true, "old")
    # Earlier versions deleted the old folder under this name. Without weights, it is a partly
    # deleted one.
    lost = not os.path.lexists(true) and paths.weights_in(old) != old
    return old if lost else None


def restore(folder: Path) -> None:
    """Put back the folder that `left_aside` finds, unless a running promotion is replacing it.

    Raises:
        UserError: the folder cannot be put back.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while old := left_aside(folder):
        true = true_path(folder)
        try:
            with _lock(true) as locked:
                if locked:
                    _restore(true)
                    return
        except (OSError, UserError) as error:
            raise _not_restored(folder, old) from error
        if time.monotonic() > deadline:
            raise _not_restored(folder, old)
        time.sleep(0.05)


def _not_restored(folder: Path, old: Path) -> UserError:
    what = f"is missing: a cosmos promote that was stopped left the model in {old}"
    fix = f"once no cosmos promote is running: `mv '{old}' '{true_path(folder)}'`"
    return asset_error(folder, what, fix)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder that is to be replaced, and restore it if a kill left it aside.

    Raises:
        UserError: another process holds the lock, or the file system reports an error.
    """
    true = true_path(folder)
    with _lock(true) as locked:
        if not locked:
            fix = "wait for it, or promote under another --name"
            raise usage_error(folder, "another cosmos promote is writing this model", fix)
        with files.disk_errors(true):
            _restore(true)
        yield


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. On success it replaces `folder` in one step.

    If the block fails, `folder` stays as it was and the unfinished folder is deleted.
    The caller must be inside `alone`.

    Raises:
        UserError: the folder is a mount point, or the file system reports an error.
    """
    true = true_path(folder)
    building = _beside(true, "building")
    if os.path.ismount(true):
        raise _irreplaceable(folder, "it is a mount point")
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
            # A signal may have interrupted the exchange between two renames.
            _restore(true)
        _discard(building)


def _irreplaceable(folder: Path, why: str) -> UserError:
    return asset_error(folder, f"cannot be replaced: {why}", "promote under another --name")


def _put(building: Path, true: Path) -> None:
    files.sync(building)
    try:
        if os.path.lexists(true):
            exchange(building, true)
        else:
            building.rename(true)
    except OSError as error:
        # A bind mount, or a folder of a container image, which overlayfs cannot rename.
        if error.errno in (errno.EBUSY, errno.EXDEV):
            raise _irreplaceable(true, os.strerror(error.errno)) from error
        raise
    files.sync(true.parent)


def exchange(one: Path, other: Path) -> None:
    """Exchange two folders of one disk, in one step if kernel and file system support it."""
    if not exchange_at_once(one, other):
        exchange_by_renames(one, other)


def exchange_at_once(one: Path, other: Path) -> bool:
    """Exchange two folders with Linux's renameat2. If unsupported, do nothing and return False.

    Raises:
        OSError: renameat2 fails for another reason.
    """
    # Python has no binding for renameat2, and glibc before 2.28 has no such function.
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
    """Exchange two folders in three renames. A kill after the first leaves `other` as `.old`."""
    old = _beside(other, "old")
    _delete(old)
    other.rename(old)
    one.rename(other)
    # Nothing restores a folder of this name, so a kill halfway through its deletion does no harm.
    old.rename(one)


def _beside(true: Path, what: str) -> Path:
    return true.with_name(f".{true.name}.{what}")


def _restore(true: Path) -> None:
    if old := left_aside(true):
        old.rename(true)
        console.warn(f"{true} was missing: put back from {old.name}, left by a stopped promotion")


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(path: Path) -> None:
    try:
        _delete(path)
    except OSError as error:
        console.warn(f"{path} is no longer needed, but cannot be deleted: {error.strerror}")


@contextmanager
def _lock(true: Path) -> Iterator[bool]:
    """Yield True if this process got the lock. The lock file exists only while it is held."""
    path = _beside(true, "lock")
    with locks.held(path, "cosmos promote") as lock:
        try:
            yield lock is not None
        finally:
            if lock is not None:
                path.unlink(missing_ok=True)
