"""Keep one copy of streamed weights in CPU memory for all processes of a command.

The copy is in an anonymous file (memfd_create(2)). Such a file has no name and is not limited by
the size of /dev/shm. Linux frees it when the last process that uses it has ended, for any reason.

The file begins with one byte for each block, which is 1 when the block's weights are there. The
first process that loads a model fills the blocks that it streams; the others wait, and then use
them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cosmos_cli.model.device import pin

# Bytes before the first block: the start of a mapping must be a multiple of this.
PAGE = mmap.ALLOCATIONGRANULARITY
FILLED = b"\1"


class SharedWeights:
    """The copy of one model's weights, as one of its processes sees it."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("r+b", buffering=0)

    def lock_missing(self, indices: Iterable[int]) -> list[int]:
        """Return which of these blocks this process has to fill, once no other process fills any.

        If there are any, the others wait until this process calls `close` or ends.
        """
        fcntl.flock(self.file, fcntl.LOCK_EX)
        filled = os.pread(self.file.fileno(), PAGE, 0)
        found = [index for index in indices if filled[index : index + 1] != FILLED]
        if not found:
            fcntl.flock(self.file, fcntl.LOCK_UN)
        return found

    def memory(self, sizes: Sequence[int], index: int, device: torch.device) -> Tensor:
        """Return the memory of block `index`, uint8, pinned for a GPU if the system permits.

        `sizes` are the bytes of all blocks, the same in every process.
        """
        place = -(-max(sizes) // PAGE) * PAGE
        end = PAGE + len(sizes) * place
        if os.fstat(self.file.fileno()).st_size < end:
            os.ftruncate(self.file.fileno(), end)
        mapped = mmap.mmap(self.file.fileno(), sizes[index], offset=PAGE + index * place)
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
        if device.type == "cuda" and pin(memory, device):
            release = torch.cuda.cudart().cudaHostUnregister
            weakref.finalize(memory, release, memory.data_ptr()).atexit = False
        return memory

    def mark_filled(self, index: int) -> None:
        """Note that the weights of block `index` are in its memory."""
        os.pwrite(self.file.fileno(), FILLED, index)

    def close(self) -> None:
        """Let the other processes continue. Blocks stay in memory until their tensors are freed."""
        # Closing alone would keep the lock: each mapping has a duplicate of the file's descriptor.
        fcntl.flock(self.file, fcntl.LOCK_UN)
        self.file.close()
