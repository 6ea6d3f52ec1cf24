"""Test whether a device can compile and has memory, and recognise when it ran out of memory."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from cosmos_cli.errors import ExitCode, UserError

# Bytes of the CUDA context, which would otherwise count as memory of other programs.
_OWN_SHARE = 2e9
# Out-of-memory messages that do not come as torch.OutOfMemoryError: those of torch's CPU allocator,
# CUDA, cuBLAS, cuDNN and FFmpeg. If cuDNN lacks workspace, it reports that it found no engine.
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "status_alloc_failed",
    "unable to find an engine to execute",
)  # fmt: skip


def why_not_compiled(device: torch.device) -> str:
    """Return why torch cannot compile for a device, or "" if it can.

    Compiling needs a C compiler, Python's headers and, on a GPU, Triton. A small compilation tests
    all of them.
    """
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        return str(error).partition("\n")[0]
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error reports that GPU or CPU memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in said for words in _OUT_OF_MEMORY)
    )


def default_dtype(device: str) -> torch.dtype:
    """Return the dtype of weights and activations: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def pin(memory: Tensor, device: torch.device) -> bool:
    """Pin CPU memory that PyTorch did not allocate, for copies to a GPU; False if that is refused.

    Whoever frees the memory must call cudaHostUnregister first.
    """
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
        return True
    with suppress(RuntimeError):
        # CUDA reports the refusal once more, at the next operation.
        torch.zeros(1, device=device)
    return False


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


def free_gpu_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can still allocate.

    This is below the free memory if the process is limited to a share of the GPU.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    held, used = torch.cuda.memory_reserved(index), torch.cuda.memory_allocated(index)
    limit = torch.cuda.get_per_process_memory_fraction(index) * total
    return int(min(free + held, limit) - used)


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
        what = f"out of GPU memory: it has {total / 1e9:.1f} GB"
        if others > _OWN_SHARE:
            what += f", of which other programs hold {others / 1e9:.1f} GB"
        raise UserError(what, code=ExitCode.GPU_MEMORY, fix=fix) from error
