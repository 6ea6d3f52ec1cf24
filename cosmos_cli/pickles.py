"""Scan a pickle before it is loaded, so that a small one cannot create a huge object. No torch.

A pickle is a program. Even if it may call only harmless functions, it can fill memory: with
`bytearray(10**10)`, with a memo index of 2**31, or by encoding a text a million times.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import Any, BinaryIO

# The 7B's state dict has 22,000 opcodes. Scanning a million takes a second.
MOST_STEPS = 1_000_000
# The limit in bytes of the number of calls times the longest string: each call may copy it.
MOST_MADE = 256 * 10**6
# The number of pickles before the tensor data in a file from before torch 1.6.
OLD_FORMAT_PICKLES = 5

_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"})
_MEMO_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
# These opcodes have two arguments, a module and a name, on one line each.
_NAMES = frozenset({"GLOBAL", "INST"})
# torch allows bytearray, which allocates as many zeros as a number says.
_REFUSED = b"bytearray"
_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}


class Bounded:
    """A wrapper that reads at most `limit` bytes of a file in total.

    Raises:
        ValueError: more bytes are read.
    """

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream, self.left = stream, limit
        self.seek, self.tell = stream.seek, stream.tell

    def seekable(self) -> bool:
        """Return True, as zipfile requires."""
        return True

    def read(self, count: int = -1) -> bytes:
        content = self.stream.read(self.left + 1 if count < 0 else min(count, self.left + 1))
        return self._count(content)

    def readline(self) -> bytes:
        return self._count(self.stream.readline(self.left + 1))

    def _count(self, content: bytes) -> bytes:
        self.left -= len(content)
        if self.left < 0:
            raise ValueError("it is too large")
        return content


def scan(stream: BinaryIO | Bounded, limit: int) -> None:
    """Scan one pickle of at most `limit` bytes without executing it.

    Raises:
        ValueError: it is damaged, has too many opcodes, or could allocate far more than its size.
    """
    bounded = stream if isinstance(stream, Bounded) else Bounded(stream, limit)
    calls = longest = 0
    for steps, (name, argument) in enumerate(_operations(bounded)):
        calls += name in _CALLS
        if isinstance(argument, str | bytes | bytearray):
            longest = max(longest, len(argument))
        if steps > MOST_STEPS:
            raise ValueError(f"it has more than {MOST_STEPS:,} opcodes")
        if name in _MEMO_PUTS and int(argument) > MOST_STEPS:
            raise ValueError("it uses a memo index far beyond its own size")
        if name == "FRAME" and argument > limit:
            raise ValueError("one of its frames is longer than the file may be")
        if name in _NAMES and argument.strip() == _REFUSED:
            raise ValueError("it refers to bytearray, which is refused")
        if calls * longest > MOST_MADE:
            raise ValueError("it would allocate far more memory than its own size")


def _operations(stream: Bounded) -> Iterator[tuple[str, Any]]:
    """Yield opcodes and arguments like `pickletools.genops`, but leave text lines undecoded."""
    name = ""
    while name != "STOP":
        operation = _OPERATIONS.get(stream.read(1).decode("latin1"))
        if operation is None:
            raise ValueError("it is not a pickle, or ends too early")
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
        ValueError: as for `scan`.
    """
    bounded = Bounded(stream, limit)
    for _ in range(OLD_FORMAT_PICKLES):
        scan(bounded, limit)
