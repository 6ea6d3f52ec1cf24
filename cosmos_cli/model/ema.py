"""Power-function EMA of the weights.

Source: Karras et al. 2023 (EDM2), section 3.1 and appendix C: gamma as a function of the relative
width, and beta(t) = (1 - 1/t)^(gamma + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


def power_gamma(rate: float) -> float:
    """Return the exponent of the profile with relative standard deviation `rate`, 0 < rate < 0.28.

    Source: EDM2, equation 126: the largest real root of a cubic.
    """
    inverse = rate**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def power_beta(updates_before: int, gamma: float) -> float:
    """Return the weight of the old average in an update; 0 for the first update."""
    if updates_before == 0:
        return 0.0
    return float((1 - 1 / (updates_before + 1)) ** (gamma + 1))


class PowerEMA:
    """Keeps fp32 averages of some tensors, e.g. of this rank's shards of the parameters."""

    def __init__(self, sources: Sequence[Tensor], rate: float, device: str | None = None) -> None:
        """Start from copies of the sources on `device`; by default each stays on its own device."""
        self.gamma = power_gamma(rate)
        self.shards = [s.detach().to(device or s.device, torch.float32, copy=True) for s in sources]

    @torch.no_grad()
    def update(self, sources: Sequence[Tensor], updates_before: int) -> None:
        """Move the averages towards `sources`; call it after each optimizer step."""
        beta = power_beta(updates_before, self.gamma)
        offloaded = bool(sources) and sources[0].is_cuda and not self.shards[0].is_cuda
        # Convert one source at a time: fp32 copies of all would set the peak of GPU memory.
        wide = self._copy_from_gpu(sources) if offloaded else (s.detach().float() for s in sources)
        for average, source in zip(self.shards, wide, strict=True):
            average.lerp_(source, 1 - beta)

    def _copy_from_gpu(self, sources: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield each source in fp32 in CPU memory; the next one is copied in the meantime."""
        copied = torch.cuda.Event(), torch.cuda.Event()

        def pinned(i: int) -> Tensor:
            source = sources[i]
            return self._pinned[i % 2].view(source.dtype)[: source.numel()].view_as(source)

        def start_copy(i: int) -> None:
            pinned(i).copy_(sources[i], non_blocking=True)
            copied[i % 2].record()

        start_copy(0)
        for i, source in enumerate(sources):
            if i + 1 < len(sources):
                start_copy(i + 1)
            copied[i % 2].synchronize()
            yield self._fp32[: source.numel()].view_as(source).copy_(pinned(i))

    @cached_property
    def _pinned(self) -> list[Tensor]:
        """Two pinned buffers in CPU memory, each large enough for the largest source in fp32."""
        return [
            torch.empty(4 * len(self._fp32), dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]

    @cached_property
    def _fp32(self) -> Tensor:
        return torch.empty(max(shard.numel() for shard in self.shards))
