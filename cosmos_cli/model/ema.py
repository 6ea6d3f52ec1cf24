"""Power-function EMA of the weights.

Source: Karras et al. 2023 (EDM2), section 3.1 and appendix C: gamma from the relative width, and
beta(t) = (1 - 1/t)^(gamma + 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


def power_gamma(rate: float) -> float:
    """The exponent whose profile has the relative standard deviation `rate`, 0 < rate < 0.28.

    Source: EDM2, equation 126: the largest real root of a cubic.
    """
    inverse = rate**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def power_beta(updates_before: int, gamma: float) -> float:
    """The share of the old average kept by an update; 0 for the first one."""
    if updates_before == 0:
        return 0.0
    return float((1 - 1 / (updates_before + 1)) ** (gamma + 1))


class PowerEMA:
    """fp32 averages of some tensors, e.g. this rank's shards of the parameters."""

    def __init__(self, sources: Sequence[Tensor], rate: float, device: str | None = None) -> None:
        """Begins with the sources as they are, on `device`, by default each where its source is."""
        self.gamma = power_gamma(rate)
        self.shards = [s.detach().to(device or s.device, torch.float32, copy=True) for s in sources]

    @torch.no_grad()
    def update(self, sources: Sequence[Tensor], updates_before: int) -> None:
        """Moves the averages towards `sources` after an optimizer step."""
        beta = power_beta(updates_before, self.gamma)
        # One at a time: fp32 copies of all sources together would be the peak of GPU memory.
        moved = bool(sources) and sources[0].is_cuda and not self.shards[0].is_cuda
        arriving = self._from_gpu(sources) if moved else (s.detach().float() for s in sources)
        for average, source in zip(self.shards, arriving, strict=True):
            average.lerp_(source, 1 - beta)

    def _from_gpu(self, sources: Sequence[Tensor]) -> Iterator[Tensor]:
        """Each source in fp32 on the host, which the next one reaches while it is in use."""
        arrived = torch.cuda.Event(), torch.cuda.Event()

        def place(i: int, source: Tensor) -> Tensor:
            return self._landing[i % 2].view(source.dtype)[: source.numel()].view_as(source)

        def send(i: int) -> None:
            place(i, sources[i]).copy_(sources[i], non_blocking=True)
            arrived[i % 2].record()

        send(0)
        for i, source in enumerate(sources):
            if i + 1 < len(sources):
                send(i + 1)
            arrived[i % 2].synchronize()
            wide = self._wide[: source.numel()].view_as(source)
            yield wide.copy_(place(i, source))

    @cached_property
    def _landing(self) -> list[Tensor]:
        """Two places on the host that a GPU can write to, each for the largest source in fp32."""
        return [
            torch.empty(4 * len(self._wide), dtype=torch.uint8, pin_memory=True) for _ in range(2)
        ]

    @cached_property
    def _wide(self) -> Tensor:
        return torch.empty(max(shard.numel() for shard in self.shards))
