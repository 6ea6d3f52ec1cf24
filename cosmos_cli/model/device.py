"""Choose the device of a process, test whether it can compile, and report a lack of memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cosmos_cli import console
from cosmos_cli.errors import ExitCode, UserError

# Bytes of the CUDA context, which would otherwise count as memory of other programs.
_OWN_SHARE = 2e9
# Out-of-memory messages that do not come as torch.OutOfMemoryError: those of torch's CPU allocator,
# CUDA, cuBLAS, cuDNN and FFmpeg. If cuDNN lacks workspace, it reports that it found no engine.
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed",
    "unable to find an engine to execute",
)  # fmt: skip


def best_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu". A rank of a launcher selects its own GPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return "cuda"
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if torch.version.cuda and shown.strip() not in ("", "-1"):
        console.warn(f"CUDA finds no GPU for CUDA_VISIBLE_DEVICES={shown}: this runs on the CPU")
    # transformers imports DeepSpeed if it is installed. Without this variable, DeepSpeed guesses
    # the accelerator and prints to stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "cpu"


def compiles(setting: str, worth_it: bool, device: torch.device, loss: str) -> bool:
    """True if the recipe's `compile` asks for compilation and torch can compile for the device.

    The setting auto compiles when `worth_it`; `loss` is as for `can_compile`.
    """
    return (setting == "on" or (setting == "auto" and worth_it)) and can_compile(device, loss)


def can_compile(device: torch.device, loss: str) -> bool:
    """True if torch can compile for a device; if not, warn and name the consequence `loss`.

    Compiling needs a C compiler, Python's headers and, on a GPU, Triton. A small compilation tests
    all of them.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).partition("\n")[0]
        console.warn(f"nothing is compiled here, so {loss}: {reason}")
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error reports that GPU or CPU memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
    )


def number_format(device: str) -> torch.dtype:
    """Return the dtype of weights and activations: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def has_room(device: torch.device, needed: float) -> bool:
    """True if `needed` bytes can be allocated on a device; always True for a CPU.

    They are really allocated, because free memory may be fragmented. torch keeps them cached for
    later allocations.
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
    """Turn running out of GPU memory into a `UserError` with the given fix.

    Raises:
        UserError: (GPU_MEMORY) out of memory.
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
