"""Where a single process computes, and what to say when its memory is not enough."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cosmos_cli import console
from cosmos_cli.errors import ExitCode, UserError

# CUDA's own share of a GPU's memory looks like another program's.
_OWN_SHARE = 2e9
# What errors other than torch's own say: its allocator on a CPU, CUDA, cuBLAS, cuDNN, FFmpeg. For
# want of workspace, cuDNN finds no engine.
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed",
    "unable to find an engine to execute",
)  # fmt: skip


def best_device() -> str:
    """Returns cuda when there is a GPU, each rank of a launcher with its own, else cpu."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return "cuda"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if torch.version.cuda and shown.strip() not in ("", "-1"):
        console.warn(f"CUDA shows no GPU for CUDA_VISIBLE_DEVICES={shown}: this runs on the CPU")
    # transformers imports DeepSpeed when it is installed, which without this guesses on stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "cpu"


def compiles(wish: str, worth: bool, device: torch.device, loss: str) -> bool:
    """Whether to compile: as the recipe's key wishes, auto where it pays; and if it can be."""
    return (wish == "on" or (wish == "auto" and worth)) and can_compile(device, loss)


def can_compile(device: torch.device, loss: str) -> bool:
    """Whether torch can compile for a device; where it cannot, says so and what that costs.

    It needs a C compiler, Python's headers and on a GPU Triton, which a small try shows.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).partition("\n")[0]
        console.warn(f"nothing is compiled here, so {loss}: {reason}")
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, that of a GPU or of the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
    )


def has_room(device: torch.device, needed: float) -> bool:
    """Return whether some bytes can be allocated on a device; a CPU is not asked.

    Allocating them also counts what fragments cannot hold; torch keeps them for what comes next.
    """
    if device.type == "cpu":
        return True
    try:
        parts = [torch.empty(int(needed / 8), dtype=torch.uint8, device=device) for _ in range(8)]
    except torch.OutOfMemoryError:
        return False
    return len(parts) == 8


@contextmanager
def gpu_memory_errors(fix: str) -> Iterator[None]:
    """Turns running out of GPU memory into a line that says what would need less.

    Raises:
        UserError: GPU_MEMORY.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        others = total - free - torch.cuda.memory_reserved()
        what = f"out of GPU memory: it has {console.size(total)}"
        if others > _OWN_SHARE:
            what += f", of which other programs hold {console.size(others)}"
        raise UserError(what, code=ExitCode.GPU_MEMORY, fix=fix) from error
