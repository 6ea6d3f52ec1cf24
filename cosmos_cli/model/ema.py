"""Power-function EMA of the weights.

Source: Karras et al. 2023 (EDM2), section 3.1 and appendix C: gamma from the relative width, and
beta(t) = (1 - 1/t)^(gamma + 1).
"""

from __future__ import annotations

from collections.abc import Sequence

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
        for average, source in zip(self.shards, sources, strict=True):
            average.lerp_(source.detach().to(average.device).float(), 1 - beta)
