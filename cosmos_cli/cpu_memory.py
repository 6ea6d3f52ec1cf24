"""Ask how much CPU memory this process may still take. No torch."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
# A file that was read more than once is in the active cache.
_CACHE = ("active", "inactive")


def available_bytes() -> float:
    """Return the CPU memory that this process may still take: of the machine and of its cgroups."""
    found: float = psutil.virtual_memory().available
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            folder = _CGROUPS / controllers / path.lstrip("/")
            within = (f for f in (folder, *folder.parents) if f.is_relative_to(_CGROUPS))
            found = min(found, *map(_left_in, within))
    return found


def _left_in(cgroup: Path) -> float:
    """Return the bytes that a cgroup of version 1 or 2 has left, without limit if it has none."""
    for limit, usage, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with contextlib.suppress(OSError, ValueError):
            left = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
            fields = dict(map(str.split, (cgroup / "memory.stat").read_text().splitlines()))
            # The cache of files is given up when memory is needed.
            return left + sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in _CACHE)
    return float("inf")
