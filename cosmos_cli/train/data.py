"""Read prepared clips in an order that can be resumed and does not depend on the process count."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_cli import hashes
from cosmos_cli.errors import ExitCode, UserError, dataset_error
from cosmos_cli.model import cond_frames, edm
from cosmos_cli.model.cond_frames import CondFrames
from cosmos_cli.prep import embedding_files, latent_files
from cosmos_cli.spec import ModelSpec


@dataclass(frozen=True)
class Batch:
    """A batch of clips on the CPU with their sampled noise and noise levels.

    Text dropout is already applied. `given`, for a Video2World model, holds the number of given
    latent frames, their noise levels and noise. Letters as in edm.py.
    """

    x0: Tensor
    sigma_B: Tensor
    noise: Tensor
    text_emb: Tensor
    fps_B: Tensor
    names: tuple[str, ...]
    given: tuple[Tensor, Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> tuple[Any, ...]:
        """Return the arguments of EDMLoss, moved to `device`; `CondFrames` is last, if any."""
        tensors = (self.x0, self.sigma_B, self.noise, self.text_emb, self.fps_B)
        moved = [t.to(device, non_blocking=True) for t in tensors]
        if not self.given:
            return tuple(moved)
        given = (t.to(device, non_blocking=True) for t in self.given)
        return *moved, CondFrames.of(moved[0], *given)

    @property
    def samples(self) -> list[str]:
        """Return the name and noise level of each clip, for messages."""
        pairs = zip(self.names, self.sigma_B.tolist(), strict=True)
        return [f"{name} (sigma {sigma:.4g})" for name, sigma in pairs]


def not_finite_error(what: str, where: str, own: list[str]) -> UserError:
    """Return the error of a non-finite loss or gradient; every rank must call this.

    It names the offending samples of all ranks. `own` holds those of this rank.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    # All ranks of a sequence-parallel group name the same clip, so drop duplicates.
    names = dict.fromkeys(name for part in gathered for name in part)
    return UserError(
        f"the {what} is not finite: {', '.join(names) or 'the log-variance head'}",
        code=ExitCode.TRAINING,
        where=where,
        fix="check these clips, or lower learning_rate; the last save is intact",
    )


@dataclass(frozen=True)
class Share:
    """One rank's samples of every global batch, taken `micro` at a time.

    They are [first, first + count) of the global batch.
    """

    first: int
    count: int
    micro: int

    @classmethod
    def of(cls, rank: int, world: int, global_batch: int, micro: int) -> Share:
        """Return the share of one data-parallel rank.

        Raises:
            ValueError: the global batch does not divide into micro batches over the ranks.
        """
        if global_batch % (world * micro):
            raise ValueError(
                f"a global batch of {global_batch} does not divide over {world} ranks "
                f"in micro batches of {micro}"
            )
        count = global_batch // world
        return cls(rank * count, count, micro)

    def micro_batches(self) -> Iterator[range]:
        """Yield the samples of each micro batch, as indices into the global batch."""
        for start in range(self.first, self.first + self.count, self.micro):
            yield range(start, start + self.micro)


def clip_of(sample: int, clips: int, seed: int) -> int:
    """Return the clip index of a global sample number. Every epoch has a new permutation."""
    epoch, position = divmod(sample, clips)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randperm(clips, generator=generator)[position])


class Clips:
    """The clips of a manifest, read from disk on demand."""

    def __init__(self, root: Path, clips: list[dict[str, Any]], spec: ModelSpec) -> None:
        self.root, self.clips, self.spec = root, clips, spec

    def __len__(self) -> int:
        return len(self.clips)

    def read(self, index: int) -> tuple[Tensor, Tensor, float]:
        """Return x0 (C, T, H, W) fp32, the padded text embedding (M, D) fp32, and frames/s.

        Raises:
            UserError: a file is missing or damaged, or is not the one that the manifest lists.
        """
        clip = self.clips[index]
        self._require_listed(self.root / clip["text"], clip.get("text_sha256"), "embedding")
        embedding = embedding_files.read_embedding(self.root / clip["text"], self.spec.text)
        text_emb = embedding_files.pad(embedding.float(), self.spec.text)
        return self.latent(index), text_emb, float(clip["fps"])

    def latent(self, index: int) -> Tensor:
        """Return x0 (C, T, H, W) fp32.

        Raises:
            UserError: the file is missing or damaged, or is not the one that the manifest lists.
        """
        clip = self.clips[index]
        path = self.root / clip["latent"]
        self._require_listed(path, clip.get("sha256"), "latent")
        return latent_files.read_latent(path)

    def _require_listed(self, path: Path, sha256: str | None, kind: str) -> None:
        # Manifests of earlier versions have no hashes.
        if sha256 and path.exists() and hashes.sha256_file(path) != sha256:
            what = (
                f"is not the {kind} that the manifest lists: prep has run since, or it is damaged"
            )
            raise dataset_error(path, what, "run `cosmos prep RECIPE`, then this command again")

    def batch(self, step: int, samples: range, settings: BatchSettings) -> Batch:
        """Return the micro batch of these samples of an optimizer step."""
        x0, sigma, noise, text_emb, fps, names, given = [], [], [], [], [], [], []
        for sample in samples:
            index = clip_of(step * settings.global_batch + sample, len(self), settings.seed)
            latent, embedding, rate = self.read(index)
            key, shape = (settings.seed, step, sample), tuple(latent.shape)
            sampled = edm.sample_noise(key, shape, settings.text_dropout)
            if self.spec.takes_frames:
                given.append(cond_frames.sample_given(key, shape))
            x0.append(latent)
            sigma.append(sampled.sigma * self.spec.sigma_scale)
            noise.append(sampled.noise)
            text_emb.append(embedding * float(sampled.keep_text))
            fps.append(rate)
            names.append(self.clips[index]["latent"])
        return Batch(
            torch.stack(x0),
            torch.tensor(sigma),
            torch.stack(noise),
            torch.stack(text_emb),
            torch.tensor(fps),
            tuple(names),
            cond_frames.stack(given) if given else None,
        )


@dataclass(frozen=True)
class BatchSettings:
    """The settings that determine the content of a batch, in addition to the clips."""

    seed: int
    global_batch: int
    text_dropout: float


def batches(
    clips: Clips, share: Share, settings: BatchSettings, steps: range
) -> Iterator[tuple[int, list[Batch]]]:
    """Yield each step with its micro batches. The next step is read while this one computes."""

    def load(step: int) -> list[Batch]:
        return [clips.batch(step, samples, settings) for samples in share.micro_batches()]

    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = pool.submit(load, steps.start) if steps else None
        for step in steps:
            assert ahead is not None
            current = ahead.result()
            if step + 1 < steps.stop:
                ahead = pool.submit(load, step + 1)
            yield step, current
