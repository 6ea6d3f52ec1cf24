"""The EDM error of clips that training never sees, at fixed noise levels with fixed noise."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from cosmos_cli.model import data, edm
from cosmos_cli.model.data import Batch, Clips


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spread over them."""
    most = min(most, count)
    return [i * count // most for i in range(most)]


class HeldOut:
    """Some clips, each at every one of some noise levels.

    Nothing about a sample depends on the step, the seed or the number of processes, so that all
    measurements of one model compare, within a run and between runs.
    """

    def __init__(
        self, clips: Clips, most: int, sigmas: tuple[float, ...] = edm.FIXED_SIGMAS
    ) -> None:
        """At most `most` of the clips, evenly spread over them."""
        self.clips, self.sigmas = clips, sigmas
        self.chosen = spread(len(clips), most)
        self.samples = [(clip, level) for clip in self.chosen for level in range(len(sigmas))]

    def batch(self, sample: int) -> Batch:
        """One clip at one noise level, with its text."""
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
        """The mean EDM error and that of each noise level; every rank must call it.

        ZeRO-3 gathers weights in every forward pass, so that all ranks make as many: those without
        a sample left repeat the last one and do not count it.
        """
        levels, shared = len(self.sigmas), engine.module.net.sequence.size
        # Processes that share a clip measure the same one, and count it that often.
        rank, world = dist.get_rank() // shared, dist.get_world_size() // shared
        sums = torch.zeros(levels, dtype=torch.float64, device=device)
        culprits = []
        engine.eval()
        for first in range(0, len(self.samples), world):
            sample = min(first + rank, len(self.samples) - 1)
            batch = self.batch(sample)
            _, edm_B = engine(*batch.to(device))
            if first + rank == sample:
                sums[self.samples[sample][1]] += edm_B.double().sum()
                if not math.isfinite(edm_B.item()):
                    culprits += batch.samples
        engine.train()
        dist.all_reduce(sums)
        errors = (sums / (len(self.samples) // levels * shared)).tolist()
        if not all(map(math.isfinite, errors)):
            raise data.not_finite("error", f"step {step}, held-out clips", culprits)
        names = [f"heldout_sigma_{sigma:.2g}" for sigma in self.sigmas]
        return {"heldout": sum(errors) / levels, **dict(zip(names, errors, strict=True))}
