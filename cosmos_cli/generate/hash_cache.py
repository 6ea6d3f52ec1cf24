"""Hash large files, and keep the hashes in `$XDG_CACHE_HOME/cosmos` for later runs. No torch."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from pathlib import Path

from cosmos_cli import files, hashes
from cosmos_cli.errors import UserError
from cosmos_cli.generate.answers import cache_dir, keep_newest

# Smaller files are hashed each time, in about 10 ms.
LEAST_BYTES = 10**7
MOST_HASHES = 1000
# A file that changed within this time may change again without a new time stamp.
SETTLED_SECONDS = 2.0


def cached_sha256(path: Path) -> str:
    """Return `hashes.sha256_path`, without hashing files again that have not changed since.

    A change shows in the path, size, inode or time stamps of a file. A program can reset the mtime
    but not the ctime.

    Raises:
        UserError: as of `hashes.sha256_file`.
    """
    return hashes.sha256_path(path, _cached_file_sha256)


def _cached_file_sha256(path: Path) -> str:
    began, before = time.time(), _state(path)
    if before is None:
        return hashes.sha256_file(path)
    entry = cache_dir() / "hashes" / hashes.sha256_text(str(path.resolve()), *map(str, before))
    with suppress(OSError, ValueError):
        kept = entry.read_text(encoding="ascii")
        if re.fullmatch("[0-9a-f]{64}", kept):
            return kept
    digest = hashes.sha256_file(path)
    newest = max(before[2:]) / 1e9
    if _state(path) == before and began - newest > SETTLED_SECONDS:
        with suppress(OSError, UserError):
            files.remove_stale(entry.parent)
            files.write_text(entry, digest)
            keep_newest(entry.parent, MOST_HASHES)
    return digest


def _state(path: Path) -> tuple[int, int, int, int] | None:
    """Return size, inode, mtime and ctime in ns of a file worth a cache entry, or None."""
    try:
        status = path.stat()
    except OSError:
        return None
    if status.st_size < LEAST_BYTES:
        return None
    return status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
