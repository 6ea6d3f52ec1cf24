"""The EDM error on held-out clips, at fixed noise levels and with fixed noise."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from cosmos_cli.model import edm
from cosmos_cli.train import data
from cosmos_cli.train.data import Batch, Clips


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, evenly spaced."""
    most = min(most, count)
    return [i * count // most for i in range(most)]


class HeldOut:
    """Measures the EDM error of some clips, each at several fixed noise levels.

    The samples do not depend on the step, the seed or the number of processes, so errors can be
    compared within a run and between runs.
    """

    def __init__(
        self, clips: Clips, most: int, sigmas: tuple[float, ...] = edm.FIXED_SIGMAS
    ) -> None:
        """Choose at most `most` of the clips, evenly spaced."""
        self.clips, self.sigmas = clips, sigmas
        self.chosen = spread(len(clips), most)
        self.samples = [(clip, level) for clip in self.chosen for level in range(len(sigmas))]

    def batch(self, sample: int) -> Batch:
        """Return one clip at one noise level, with its text, as a batch."""
        clip, level = self.samples[sample]
        x0, text_emb, fps = self.clips.read(clip)
        name = self.clips.clips[clip]["latent"]
        noise = torch.randn(x0.shape, generator=edm.keyed_generator((name, level)))
        return Batch(
            x0[None],
            torch.tensor([self.sigmas[level]]),
            noise[None],
            text_emb[None],
            torch.tensor([fps]),
            (name,),
        )

    @torch.no_grad()
    def measure(self, engine: Any, device: torch.device, step: int) -> dict[str, float]:
        """Return the mean EDM error and the error at each noise level; every rank must call this.

        ZeRO-3 gathers weights in every forward pass, so all ranks must run equally many. A rank
        that has no sample left repeats the last one without counting it.
        """
        levels, group_size = len(self.sigmas), engine.module.net.sequence.size
        # All processes of a sequence-parallel group measure the same clip, so it is counted
        # `group_size` times.
        rank, world = dist.get_rank() // group_size, dist.get_world_size() // group_size
        sums = torch.zeros(levels, dtype=torch.float64, device=device)
        not_finite = []
        engine.eval()
        for first in range(0, len(self.samples), world):
            sample = min(first + rank, len(self.samples) - 1)
            batch = self.batch(sample)
            _, edm_B = engine(*batch.to(device))
            if first + rank == sample:
                sums[self.samples[sample][1]] += edm_B.double().sum()
                if not math.isfinite(edm_B.item()):
                    not_finite += batch.samples
        engine.train()
        dist.all_reduce(sums)
        errors = (sums / (len(self.samples) // levels * group_size)).tolist()
        if not all(map(math.isfinite, errors)):
            raise data.not_finite_error("error", f"step {step}, held-out clips", not_finite)
        names = [f"heldout_sigma_{sigma:.2g}" for sigma in self.sigmas]
        return {"heldout": sum(errors) / levels, **dict(zip(names, errors, strict=True))}
