"""Scan pickles before they are loaded, and load them with the admitted names only. No torch.

A pickle is a program. Even if it may call only harmless functions, it can fill memory: with
`bytearray(10**10)`, with a memo index of 2**31, or by encoding a text a million times. So a scan
comes first.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, BinaryIO

# Python's documentation: unpickling damaged or hostile data may raise almost any exception.
DAMAGE = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, ValueError, LookupError, TypeError),
    *(AttributeError, ArithmeticError, AssertionError, EOFError, MemoryError, StopIteration),
)
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


def scan_pickle(stream: BinaryIO | Bounded, limit: int) -> None:
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


class Restricted(pickle.Unpickler):
    """Unpickles objects that are made of admitted names only.

    A file can set attributes on what it gets for a name, so make the objects of the table anew for
    each file.

    Args:
        stream: the pickle.
        admitted: what to give the pickle for each name "module.name". A key "package.*" stands for
            all names of a package.
        load: returns the object for a persistent id, with which torch refers to storages.

    Raises:
        pickle.UnpicklingError: the pickle refers to another name.
    """

    def __init__(
        self,
        stream: IO[bytes],
        admitted: Mapping[str, Any],
        load: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(stream)
        self.admitted, self.load_id = admitted, load

    def find_class(self, module: str, name: str) -> Any:
        for key in (f"{module}.{name}", f"{module.partition('.')[0]}.*"):
            if key in self.admitted:
                return self.admitted[key]
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is refused")

    def persistent_load(self, pid: Any) -> Any:
        if self.load_id is None:
            raise pickle.UnpicklingError("it refers to data outside of it")
        return self.load_id(pid)
