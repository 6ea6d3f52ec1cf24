"""Where a single process computes, and what to say when its memory is not enough."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cosmos_cli.errors import ExitCode, UserError


def best_device() -> str:
    """Returns cuda when there is a GPU, each rank of a launcher with its own, else cpu."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return "cuda"
    # transformers imports DeepSpeed when it is installed, which without this guesses on stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "cpu"


@contextmanager
def gpu_memory_errors(fix: str) -> Iterator[None]:
    """Turns running out of GPU memory into a line that says what would need less.

    Raises:
        UserError: GPU_MEMORY.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        what = f"out of GPU memory: {str(error).partition('. ')[0]}"
        raise UserError(what, code=ExitCode.GPU_MEMORY, fix=fix) from error
