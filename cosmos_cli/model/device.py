"""Where a single process computes."""

from __future__ import annotations

import torch


def best_device() -> str:
    """cuda when there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"
