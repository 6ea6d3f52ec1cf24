"""CPU memory that a save is copied to, so that training continues while the save is written.

The memory is taken and touched once, before the first step: a page that is touched for the first
time costs more than the copy. It is pinned as one piece, because PyTorch's own pinned blocks round
up to powers of two. If the machine or the job lacks the memory, nothing is kept, and a save is
written while training waits.

Shards, master weights and moments change only in the optimizer step. So they are copied by the
thread that writes them, on a stream of its own, during the next forward and backward pass; `wait`
holds the optimizer step back until they are copied. State in CPU memory takes the same way.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_cli import console, cpu_memory
from cosmos_cli.model.device import pin

# The memory is touched in pieces of this size, and only while this much more stays available.
PIECE, SPARE = 2**30, 4 * 10**9
# The alignment of copies in bytes, and the number of copies under way from the GPU at a time.
ALIGNMENT, ON_THEIR_WAY = 512, 4


class Staging:
    """Holds one save in CPU memory. Without `reserve`, `copy` and `later` copy only what they must.

    Call `reserve` once, and for each save `clear`, then `copy` and `later`, then `fill` from the
    thread that writes, and `wait` before the optimizer step.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.memory: mmap.mmap | None = None
        self.used = 0
        self.filled = threading.Event()
        self.filled.set()
        self._twins: dict[int, Tensor] = {}
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._copied: deque[torch.cuda.Event] = deque()

    def reserve(self, size: int, processes: int) -> None:
        """Take and pin `size` bytes, as each of `processes` on this machine does at the same time.

        Raises:
            MemoryError: the machine or the job lacks the memory, or it may not be pinned.
        """
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(os.strerror(error.errno or 0)) from error
        with contextlib.suppress(OSError):
            # Large pages are touched and pinned several times faster.
            memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        # Some virtual machines show more memory only once the first is touched, so ask each time.
        for piece in flat.split(PIECE):
            available = cpu_memory.available_bytes()
            if available < processes * piece.numel() + SPARE:
                raise MemoryError(f"{console.size(available)} are available")
            piece.zero_()
        if self.stream is not None and not pin(flat, self.stream.device):
            raise MemoryError("the system refuses to pin so much (see `ulimit -l`)")
        self.memory = memory

    def release(self) -> None:
        """Give the memory back."""
        if self.memory is not None and self.stream is not None:
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr())
        self.memory = None

    def clear(self) -> None:
        """Forget the save before; nothing may read it any more."""
        self.used = 0
        self._twins.clear()
        self._pending.clear()
        self.filled.set()

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor in CPU memory that is complete after `fill`."""
        if self.memory is None:
            return tensor.to("cpu", copy=True)
        target = self._take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        self.filled.clear()
        if self.stream is None or not tensor.is_cuda:
            self._pending.append((tensor, target))
            return target
        # A gathered tensor is copied at once, so that its GPU memory becomes free again.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            target.copy_(tensor, non_blocking=True)
            self._copied.append(self.stream.record_event())
        tensor.record_stream(self.stream)
        if len(self._copied) > ON_THEIR_WAY:
            self._copied.popleft().synchronize()
        return target

    def later(self, state: Any) -> Any:
        """Return a copy of nested state whose tensors `fill` copies; without memory, return it."""
        if self.memory is None:
            return state
        self.filled.clear()
        memo = {id(tensor): self._twin(tensor) for tensor in tensors_in(state)}
        return deepcopy(state, memo)

    def start(self) -> torch.cuda.Event | None:
        """Mark the moment on the GPU from which on `fill` may copy; for the main thread."""
        return None if self.stream is None else torch.cuda.current_stream().record_event()

    def fill(self, start: torch.cuda.Event | None) -> None:
        """Copy what `later` left to be copied, and wait for the copies."""
        try:
            if self.stream is None or start is None:
                self._fill()
                return
            self.stream.wait_event(start)
            with torch.cuda.stream(self.stream):
                self._fill()
            self.stream.synchronize()
        finally:
            self._pending.clear()
            self._copied.clear()
            self.filled.set()

    def _fill(self) -> None:
        for source, target in self._pending:
            target.copy_(source, non_blocking=True)

    def wait(self) -> float:
        """Wait until everything is copied, and return the seconds that it took."""
        began = time.monotonic()
        self.filled.wait()
        return time.monotonic() - began

    def _take(self, size: int) -> Tensor:
        """Return `size` bytes with a storage of their own: a file gets all of a storage."""
        start, end = self.used, self.used + size
        assert self.memory is not None
        if not size or end > len(self.memory):
            # The plan is rounded up, so this is for what it does not know.
            return torch.empty(size, dtype=torch.uint8)
        self.used = -(-end // ALIGNMENT) * ALIGNMENT
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=size, offset=start)

    def _twin(self, tensor: Tensor) -> Tensor:
        """Return a tensor in CPU memory that shares its storage as this one does."""
        storage = tensor.untyped_storage()
        # ZeRO-3 has empty tensors in the place of sharded ones; they share no memory.
        if (key := storage.data_ptr() or id(tensor)) not in self._twins:
            self._twins[key] = self._take(storage.nbytes())
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._pending.append((source, self._twins[key]))
        twin = torch.empty(0, dtype=tensor.dtype).set_(
            self._twins[key].untyped_storage(),
            tensor.storage_offset(), tensor.size(), tensor.stride(),
        )  # fmt: skip
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin)
        # A file of torch also holds the attributes that DeepSpeed gives a tensor.
        vars(twin).update(vars(tensor))
        return twin.requires_grad_(tensor.requires_grad)


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)
