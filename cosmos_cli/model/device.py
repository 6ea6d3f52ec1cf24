"""Where a single process computes."""

from __future__ import annotations

import os

import torch


def best_device() -> str:
    """Returns cuda when there is a GPU, else cpu."""
    if torch.cuda.is_available():
        return "cuda"
    # transformers imports DeepSpeed when it is installed, which without this guesses on stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "cpu"
