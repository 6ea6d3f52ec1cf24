"""Look through a pickle before it is loaded, so that a small one cannot make a huge object.

A pickle is a program. Even where only harmless functions may be named, `bytearray(10**10)`, a place
in the memo of 2**31 or a text that is encoded a million times take all memory. No torch.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any, BinaryIO

# What the 7B's state dict has is 22,000 steps; a million take a second to look through.
MOST_STEPS = 1_000_000
# Bytes that calls may make of a pickle's longest text, should each of them take it.
MOST_MADE = 256 * 10**6
# The pickles of a file that torch wrote before 1.6, before the numbers.
OLD_FORMAT_PICKLES = 5

_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"})
_PLACES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
# A module and a name, each on a line.
_NAMES = frozenset({"GLOBAL", "INST"})
# Torch admits it, and it makes zeros of a number.
_REFUSED = b"bytearray"
_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}


class Bounded:
    """A file of which at most `limit` bytes are read in all.

    Raises:
        ValueError: more is asked for.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream, self.left = stream, limit
        self.seek, self.tell = stream.seek, stream.tell

    def seekable(self) -> bool:
        """True: zipfile asks."""
        return True

    def read(self, count: int = -1) -> bytes:
        """Return up to `count` bytes."""
        content = self.stream.read(self.left + 1 if count < 0 else min(count, self.left + 1))
        return self._count(content)

    def readline(self) -> bytes:
        """Return the bytes up to the end of a line."""
        return self._count(self.stream.readline(self.left + 1))

    def _count(self, content: bytes) -> bytes:
        self.left -= len(content)
        if self.left < 0:
            raise ValueError("it is too large")
        return content


def scan(stream: BinaryIO | Bounded, limit: int) -> None:
    """Read one pickle of at most `limit` bytes without building anything.

    Raises:
        ValueError: it is damaged, has too many steps, or could make far more than its size.
    """
    bounded = stream if isinstance(stream, Bounded) else Bounded(stream, limit)
    calls = longest = 0
    for steps, (name, argument) in enumerate(_operations(bounded)):
        calls += name in _CALLS
        if isinstance(argument, str | bytes | bytearray):
            longest = max(longest, len(argument))
        if steps > MOST_STEPS:
            raise ValueError(f"it has more than {MOST_STEPS:,} steps")
        if name in _PLACES and int(argument) > MOST_STEPS:
            raise ValueError("it asks for a place far beyond what it has")
        if name == "FRAME" and argument > limit:
            raise ValueError("a part of it claims more bytes than there are")
        if name in _NAMES and argument.strip() == _REFUSED:
            raise ValueError("it names bytearray, refused")
        if calls * longest > MOST_MADE:
            raise ValueError("it would make far more than it holds")


def _operations(stream: Bounded) -> Iterator[tuple[str, Any]]:
    """Yield what `pickletools.genops` does, but lines of text as their bytes, undecoded."""
    name = ""
    while name != "STOP":
        operation = _OPERATIONS.get(stream.read(1).decode("latin1"))
        if operation is None:
            raise ValueError("it is no pickle, or ends too early")
        name, argument = operation.name, None
        if operation.arg and operation.arg.n == pickletools.UP_TO_NEWLINE:
            argument = stream.readline()
            if name in _NAMES:
                argument = stream.readline()
        elif operation.arg:
            argument = operation.arg.reader(stream)  # type: ignore[arg-type]
        yield name, argument


def scan_old_format(stream: BinaryIO, limit: int) -> None:
    """Scan the pickles at the start of a file that torch wrote before 1.6.

    Raises:
        ValueError: as of `scan`.
    """
    bounded = Bounded(stream, limit)
    for _ in range(OLD_FORMAT_PICKLES):
        scan(bounded, limit)
