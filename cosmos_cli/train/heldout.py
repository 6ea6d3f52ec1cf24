"""The EDM error on held-out clips, at fixed noise levels and with fixed noise."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_cli.model import cond_frames, edm
from cosmos_cli.prep.holdout import spread
from cosmos_cli.train import data
from cosmos_cli.train.data import Batch, Clips


class HeldOut:
    """Measures the EDM error of some clips, each at several fixed noise levels.

    A Video2World model is measured with each of `counts` latent frames given, and the error is that
    of the others. A Text2World model has the one count 0.
    The samples do not depend on the step, the seed or the number of processes, so errors can be
    compared within a run and between runs.
    """

    def __init__(
        self,
        clips: Clips,
        most: int,
        sigmas: tuple[float, ...] = edm.FIXED_SIGMAS,
        counts: tuple[int, ...] = cond_frames.COUNTS,
    ) -> None:
        """Choose at most `most` of the clips, evenly spaced; the model's spec scales `sigmas`."""
        self.clips = clips
        self.sigmas = tuple(clips.spec.sigma_scale * sigma for sigma in sigmas)
        self.counts = counts if clips.spec.takes_frames else (0,)
        self.chosen = spread(len(clips), most)
        levels = range(len(sigmas))
        self.samples = list(product(self.chosen, levels, self.counts))

    def batch(self, sample: int) -> Batch:
        """Return one clip at one noise level, with its text, as a batch."""
        clip, level, count = self.samples[sample]
        x0, text_emb, fps = self.clips.read(clip)
        name = self.clips.clips[clip]["latent"]
        noise = torch.randn(x0.shape, generator=edm.keyed_generator((name, level)))
        given = None
        if self.clips.spec.takes_frames:
            generator = edm.keyed_generator((name, level, "given frames"))
            own = torch.randn(x0.shape, generator=generator)
            given = cond_frames.stack([(count, cond_frames.AUG_MEDIAN, own)])
        return Batch(
            x0[None],
            torch.tensor([self.sigmas[level]]),
            noise[None],
            text_emb[None],
            torch.tensor([fps]),
            (name,),
            given,
        )

    @torch.no_grad()
    def measure(self, engine: Any, device: torch.device, step: int) -> dict[str, float]:
        """Return the mean EDM error and its mean at each noise level and each count of frames.

        Every rank must call this. ZeRO-3 gathers weights in every forward pass, so all ranks must
        run equally many. A rank that has no sample left repeats the last one without counting it.
        """
        group_size = engine.module.net.sequence.size
        # All processes of a sequence-parallel group measure the same clip, so it is counted
        # `group_size` times.
        rank, world = dist.get_rank() // group_size, dist.get_world_size() // group_size
        shape = len(self.sigmas), len(self.counts)
        sums = torch.zeros(shape, dtype=torch.float64, device=device)
        not_finite = []
        engine.eval()
        for first in range(0, len(self.samples), world):
            sample = min(first + rank, len(self.samples) - 1)
            batch = self.batch(sample)
            _, edm_B = engine(*batch.to(device))
            if first + rank == sample:
                _, level, count = self.samples[sample]
                sums[level, self.counts.index(count)] += edm_B.double().sum()
                if not math.isfinite(edm_B.item()):
                    not_finite += batch.samples
        engine.train()
        dist.all_reduce(sums)
        errors = sums / (len(self.chosen) * group_size)
        if not errors.isfinite().all():
            raise data.not_finite_error("error", f"step {step}, held-out clips", not_finite)
        return self.figures(errors)

    def figures(self, errors: Tensor) -> dict[str, float]:
        """Return named means of the errors at each noise level (rows) and count (columns)."""
        levels = errors.mean(dim=1).tolist()
        named = {"heldout": sum(levels) / len(levels)}
        named |= {f"heldout_sigma_{s:.2g}": e for s, e in zip(self.sigmas, levels, strict=True)}
        if len(self.counts) > 1:
            columns = zip(self.counts, errors.mean(dim=0).tolist(), strict=True)
            named |= {f"heldout_given_{count}": error for count, error in columns}
        return named
