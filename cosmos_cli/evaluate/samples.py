"""Generate the videos of an evaluation, and keep their latents so that none is made twice.

Dimension letters: B videos of a batch, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from cosmos_cli import console, files, hashes
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate.jobs import Job, Weights
from cosmos_cli.generate.phases import Pipeline
from cosmos_cli.generate.text_models import Conditioning
from cosmos_cli.generate.video_models import sample_latents
from cosmos_cli.model import rgb, weights
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.tiny import world
from cosmos_cli.model.tiny.world import Scene
from cosmos_cli.model.tokenizer import Tokenizer
from cosmos_cli.prep import latent_files
from cosmos_cli.recipe import plan
from cosmos_cli.recipe.gpu_models import find_gpu
from cosmos_cli.recipe.keys import Recipe

# This seed differs from that of the dataset that teaches the mascot, so its scenes do too.
CONCEPT_SEED = 1000


@dataclass(frozen=True)
class Trial:
    """A prompt and a seed; in the synthetic world also the scene that the prompt describes."""

    prompt: str
    seed: int
    scene: Scene | None = None

    @property
    def of_mascot(self) -> bool:
        """True if the prompt asks for the concept that post-training teaches."""
        return self.scene is not None and self.scene.thing.mascot


@dataclass(frozen=True)
class Sample:
    """A generated video: pixels uint8 (3, T, H, W), latent (C, T, H, W), and its scores by name.

    The pixels of a video that is not shown are None once it has scores.
    """

    trial: Trial
    pixels: Tensor | None
    latent: Tensor
    scores: dict[str, float] = field(default_factory=dict)


def world_trials(count: int) -> list[Trial]:
    """Return prompts for held-out combinations, and half as many for the mascot."""
    heldout = [world.sample_scene(seed, "heldout") for seed in range(count)]
    mascots = world.concept_scenes(-(-count // 2), CONCEPT_SEED)
    return [
        *(Trial(world.caption(scene, seed), seed, scene) for seed, scene in enumerate(heldout)),
        *(Trial(words, CONCEPT_SEED + i, scene) for i, (scene, words) in enumerate(mascots)),
    ]


def trials(r: Recipe, captions: Sequence[str], count: int) -> list[Trial]:
    """Return the prompts of an evaluation, `count` of captions or of the synthetic world.

    More videos than captions are the same captions with other seeds.
    """
    if r.spec.embedded:
        return world_trials(count)
    count = count if captions else 0
    return [Trial(captions[seed % len(captions)], seed) for seed in range(count)]


def read_prompts(r: Recipe, wanted: Sequence[Trial], device: str) -> list[Conditioning]:
    """Return the conditioning of each trial's prompt.

    Raises:
        UserError: a prompt is blocked, or a model of the text is missing or damaged.
    """
    # The text does not depend on the weights.
    jobs = [Job(t.prompt, r, Weights(Path(), ""), Path(str(i))) for i, t in enumerate(wanted)]
    prepared, failed = Pipeline(r, device, in_turn=True).prepare(jobs)
    if failed:
        raise next(failed[job] for job in jobs if job in failed)
    return [prepared[job] for job in jobs]


@dataclass(frozen=True)
class Batch:
    """Videos of one model that are sampled together, and the file of their latents.

    The last bits of a latent depend on its batch, so a batch is kept or made as a whole.
    """

    path: Path
    trials: tuple[Trial, ...]
    first: int

    @cached_property
    def seconds(self) -> float | None:
        """The seconds that sampling it took, None if it must be sampled."""
        return latent_files.read_about(self.path).get("seconds")

    def read(self) -> Tensor:
        """Return the latents x0 (B, C, T, H, W) in fp32.

        Raises:
            UserError: the file is missing or damaged.
        """
        with weights.reading(self.path):
            return weights.read_safetensors(self.path)["x0"]


class Store:
    """The latents of an evaluation in one folder, named by all that decides them.

    They are kept for later evaluations of the same videos. `wanted` are the prompts and seeds, the
    same for all models.
    """

    def __init__(self, folder: Path, r: Recipe, wanted: Sequence[Trial], device: str) -> None:
        self.folder, self.r, self.wanted, self.device = folder, r, wanted, device
        self.size = (16 if device == "cpu" else 64) if r.spec.embedded else 1

    def batches(self, weights_: Weights) -> list[Batch]:
        """Return the batches of one model, made or not."""
        found = []
        for first in range(0, len(self.wanted), self.size):
            own = tuple(self.wanted[first : first + self.size])
            keys = (self._key(trial, weights_) for trial in own)
            name = hashes.sha256_text(self.device, *keys)[:32]
            found.append(Batch(self.folder / f"{name}.safetensors", own, first))
        return found

    def _key(self, trial: Trial, weights_: Weights) -> str:
        r = self.r.model_copy(update={"sampling_seed": trial.seed})
        return Job(trial.prompt, r, weights_, Path()).key

    def cost(self, models: Sequence[Weights]) -> tuple[int, float | None]:
        """Return the number of videos that must be made, and the seconds that they take.

        The seconds are those of the videos that are there or, without any, planned for a known
        GPU, else None.
        """
        batches = [batch for model in models for batch in self.batches(model)]
        missing = sum(len(batch.trials) for batch in batches if batch.seconds is None)
        made = [b.seconds / len(b.trials) for b in batches if b.seconds is not None]
        gpu = find_gpu(torch.cuda.get_device_name()) if self.device != "cpu" else None
        if made:
            return missing, missing * fmean(made)
        return missing, missing * plan.video_seconds(self.r, gpu) if gpu else None

    def require_room(self, count: int) -> None:
        """Check that the folder has room for the latents of `count` videos; delete leftovers.

        Raises:
            UserError: the disk has too little room.
        """
        with files.disk_errors(self.folder):
            files.remove_stale(self.folder)
        # Those of prep are in bf16, these in fp32.
        needed = 2 * count * latent_files.latent_bytes(self.r)
        fix = "free some space, or use fewer --prompts"
        files.require_free(self.folder, needed, f"{count} latents", fix)

    def make(self, net: DiT, batch: Batch, text_embs: Sequence[Conditioning]) -> float:
        """Sample a batch, write its latents, and return the seconds that sampling took.

        Raises:
            UserError: a video is not finite, or the file cannot be written.
        """
        began, last = time.monotonic(), batch.first + len(batch.trials)
        label = f"videos {batch.first + 1}-{last} of {len(self.wanted)}"
        seeds = [trial.seed for trial in batch.trials]
        x0 = sample_latents(self.r, net, text_embs[batch.first : last], seeds, label).cpu()
        seconds = time.monotonic() - began
        if not x0.isfinite().all():
            raise UserError(
                "a generated latent is not finite (NaN or infinity)", code=ExitCode.TRAINING,
                where=label, fix="train again with a lower learning_rate",
            )  # fmt: skip
        with files.disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        about = {"about": json.dumps({"seconds": round(seconds, 2)})}
        weights.write_safetensors(batch.path, {"x0": x0}, about)
        return seconds


@torch.inference_mode()
def sample_trials(
    store: Store, net: DiT, weights_: Weights, text_embs: Sequence[Conditioning], left: int
) -> int:
    """Sample the videos of one model that are not there; return how many are left of `left`."""
    for batch in store.batches(weights_):
        if batch.seconds is None:
            seconds = store.make(net, batch, text_embs) / len(batch.trials)
            left -= len(batch.trials)
            if left:
                console.say(f"{left} videos left: about {console.duration(seconds * left)}")
    return left


@torch.inference_mode()
def decode(tokenizer: Tokenizer, latent: Tensor) -> Tensor:
    """Return the pixels (3, T, H, W) of a latent (C, T, H, W), uint8 on the tokenizer's device."""
    weight = next(tokenizer.parameters())
    return rgb.to_uint8(tokenizer.decode(latent[None].to(weight))[0])


def read_samples(store: Store, tokenizer: Tokenizer, weights_: Weights) -> Iterator[Sample]:
    """Yield each video of one model, without scores."""
    for batch in store.batches(weights_):
        for trial, latent in zip(batch.trials, batch.read(), strict=True):
            yield Sample(trial, decode(tokenizer, latent), latent)


def shrunk(sample: Sample, width: int) -> Sample:
    """Return the sample with its pixels on the CPU, at most `width` wide."""
    _, _, height, old = sample.pixels.shape
    pixels = sample.pixels.cpu()
    if old > width:
        # An mp4 needs even sizes.
        pixels = rgb.resize_frames(pixels, round(height * width / old / 2) * 2, width, "stretch")
    return replace(sample, pixels=pixels)
