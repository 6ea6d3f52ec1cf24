"""Measure models by their videos and by their EDM error on held-out clips.

In the synthetic world of the tiny model, colour, shape and motion are read from the pixels of
generated videos. On a prepared dataset it measures the EDM error of held-out clips, and the
distance from generated videos to the nearest training clip. features.py adds scores in the features
of pretrained models, if these are there.

Dimension letters: C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_cli import console
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.evaluate import comparison, features, samples, statistics
from cosmos_cli.evaluate.samples import Sample, Store, Trial
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.generate.video_models import load_denoiser
from cosmos_cli.model import edm, rgb, video_scores
from cosmos_cli.model.device import default_dtype
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.tiny import scorer, world
from cosmos_cli.model.tiny.scorer import Reading
from cosmos_cli.model.tokenizer import Tokenizer, load_tokenizer
from cosmos_cli.prep import holdout
from cosmos_cli.prep.holdout import spread
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import nearest
from cosmos_cli.train.data import Clips
from cosmos_cli.train.heldout import HeldOut

CHANCE = {
    "colour": 1 / len(world.COLOURS),
    "shape": 1 / len(world.SHAPES),
    "motion": 1 / len(world.MOTIONS),
    "concept": 0.0,
    "consistency": 0.0,
}
# What the first part of a figure's name means, and which direction is better.
MEANINGS = {
    "colour": ("share of videos that show the colour in the prompt", "higher"),
    "shape": ("share of videos that show the shape in the prompt", "higher"),
    "motion": ("share of videos with the motion in the prompt", "higher"),
    "concept": (
        "share of videos that show the mascot's yellow head when the prompt asks for the mascot",
        "higher",
    ),
    "consistency": ("share of frames after which the thing has moved by a small step", "higher"),
    "reconstruction": (
        "PSNR of clips that the tokenizer encoded and decoded; it is not trained", "higher",
    ),
    **video_scores.MEANINGS,
    **features.MEANINGS,
    "EDM error": (
        "error of the denoised clip with noise of standard deviation sigma, about 1 for an "
        "untrained network", "lower",
    ),
    "nearest training clip": (
        "smallest distance from a video to a training clip; far below the typical distance between "
        "clips means memorised", "",
    ),
}  # fmt: skip
# In picture heights per frame. The fastest thing of the synthetic world moves by 0.05.
LARGEST_MOVE = 0.1
RECONSTRUCTED = 16
# The page shows this many videos of a model: of the synthetic world, in a mosaic for each kind of
# prompt, and real ones with their scores, which are small copies.
SHOWN_OF_WORLD, SHOWN, SHOWN_WIDTH = 24, 12, 384


@dataclass(frozen=True)
class PreparedClips:
    """A prepared dataset: its training clips, held-out clips and the caption of each video."""

    train: Clips
    heldout: Clips
    caption_of: dict[str, str]

    @property
    def captions(self) -> tuple[str, ...]:
        """The captions, each once."""
        return tuple(dict.fromkeys(self.caption_of.values()))

    @property
    def measured(self) -> Clips:
        """The clips for the EDM error: the held-out ones if there are any."""
        return self.heldout if len(self.heldout) else self.train

    @classmethod
    def of(cls, r: Recipe) -> PreparedClips | None:
        """Return the dataset of a recipe, or None if prep has not run."""
        dataset = r.dataset
        if not dataset.manifest.exists():
            return None
        manifest = dataset.read_manifest()
        splits = holdout.split_clips(manifest)
        train, heldout = (Clips(dataset.root, rows, r.spec) for rows in splits)
        used = [video for video in manifest["videos"] if video["verdict"] == "used"]
        return cls(train, heldout, {video["file"]: video["caption"] for video in used})


def open_store(r: Recipe, prompts: int, device: str, folder: Path) -> Store:
    """Return the store of the videos of an evaluation.

    Each model makes `prompts` videos: from prompts of the synthetic world, with half as many more
    of its new concept, or from the captions of the dataset.
    """
    dataset = PreparedClips.of(r)
    wanted = samples.trials(r, dataset.captions if dataset else (), prompts)
    return Store(folder, r, wanted, device)


def announce(r: Recipe, models: dict[str, Weights], store: Store) -> dict[str, Any]:
    """Say what an evaluation will cost and which scores it cannot measure; return the figures."""
    missing, seconds = store.cost(list(models.values()))
    if total := len(store.wanted) * len(models):
        time_left = "" if seconds is None else f", about {console.duration(seconds)}"
        console.say(
            f"{len(store.wanted)} videos of each model: {total - missing} of {total} are in "
            f"{store.folder}, {missing} must be made{time_left if missing else ''}"
        )
    else:
        console.say("no videos are made; `--prompts 24` adds the scores of videos")
    planned = plan_features(r, PreparedClips.of(r), len(store.wanted))
    for score, reason in planned.reasons.items():
        if score not in planned.missing:
            console.say(f"not measured: {score}: {reason}")
    if planned.missing:
        names = ", ".join(planned.missing)
        console.say(f"not measured, since a model is missing: {names}; {features.FIX}")
    return {
        "videos": total, "videos_to_make": missing, "seconds": seconds,
        "not_measured": planned.reasons,
    }  # fmt: skip


def evaluate(
    r: Recipe, models: dict[str, Weights], store: Store, prompts: int
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Return the figures of some models and the videos to show of each, by name.

    The store is that of `open_store`. The recipe's dataset is used if prep has run.

    Raises:
        UserError: a file is missing or damaged.
    """
    dataset = PreparedClips.of(r)
    held_out = bool(dataset and len(dataset.heldout))
    figures: dict[str, Any] = {"model": r.model, "prompts": prompts, "models": {}}
    if dataset:
        figures["clips"] = "held-out" if held_out else "training"
    if r.spec.embedded:
        figures["psnr"] = reconstruction(r, RECONSTRUCTED, store.device)
    planned = plan_features(r, dataset, len(store.wanted))
    figures["not_measured"] = planned.reasons
    # A damaged model is found before the first video is made.
    scorers = features.load_models(planned)
    errors = run_models(r, models, store, dataset)
    for name, weights in models.items():
        figures["models"][name] = {"weights": weights.identity}
        if dataset:
            figures["models"][name]["edm"] = means(errors[name])
    with torch.inference_mode():
        measured, vectors = measure_models(r, models, store, dataset, scorers)
    values: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    better = directions(r, dataset, len(store.wanted))
    for name in models:
        # On clips that it was trained on, every model is better than the base.
        if held_out:
            values[name]["EDM error"] = list(map(fmean, zip(*errors[name].values(), strict=True)))
        values[name] |= by_score(measured[name], better)
        figures["models"][name] |= _summary(values[name], vectors, name)
        if dataset and store.wanted and (found := nearest_clips(measured[name], dataset.train)):
            figures["models"][name]["nearest_clip"], figures["clips_apart"] = found
    figures["comparisons"] = comparison.compare(values, better, vectors)
    return figures, measured


def plan_features(r: Recipe, dataset: PreparedClips | None, videos: int) -> features.Plan:
    """Return which feature scores can be measured on this number of videos."""
    clips = (len(dataset.train), len(dataset.heldout)) if dataset else (0, 0)
    return features.plan_scores(r, videos, *clips)


def directions(r: Recipe, dataset: PreparedClips | None, videos: int) -> dict[str, str]:
    """Return the better direction of each score that is compared: "higher", "lower" or ""."""
    names = ["EDM error"] if dataset and len(dataset.heldout) else []
    if videos:
        names += [*(CHANCE if r.spec.embedded else ()), *video_scores.names(r.num_frames)]
        names += plan_features(r, dataset, videos).folders
    return {name: MEANINGS[name][1] for name in names}


def run_models(
    r: Recipe, models: dict[str, Weights], store: Store, dataset: PreparedClips | None
) -> dict[str, dict[str, list[float]]]:
    """Sample the videos that are not there; return the EDM errors of each model, if any.

    Raises:
        UserError: a file is missing or damaged, or a prompt is blocked.
    """
    device, errors = store.device, {}
    left, _ = store.cost(list(models.values()))
    store.require_room(left)
    # The text encoder does not fit next to a denoiser, so it is loaded once, before them.
    text_embs = samples.read_prompts(r, store.wanted, device) if left else []
    for name, weights in models.items():
        if not dataset and not store.cost([weights])[0]:
            continue
        console.say(f"measuring {name}: {weights.path}")
        net = load_denoiser(r, weights.path, device, weights.loras)
        if dataset:
            errors[name] = clip_errors(r, net, dataset.measured)
        left = samples.sample_trials(store, net, weights, text_embs, left)
        # Free its memory before the next one is loaded.
        del net
    return errors


def measure_models(
    r: Recipe, models: dict[str, Weights], store: Store, dataset: PreparedClips | None,
    scorers: features.Models,
) -> tuple[dict[str, list[Sample]], comparison.Features | None]:  # fmt: skip
    """Return each model's videos with their scores, and the features of the videos.

    Only the videos that the page shows keep their pixels.
    """
    if not store.wanted:
        return {name: [] for name in models}, None
    device = store.device
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, default_dtype(device))
    training = decoded(tokenizer, dataset.train, features.TRAINING_CLIPS) if dataset else iter(())
    scorers.learn(training, [trial.prompt for trial in store.wanted], device)
    measured: dict[str, list[Sample]] = {name: [] for name in models}
    vectors: dict[str, list[Any]] = {name: [] for name in models}
    shown = shown_trials(r, store.wanted)
    total = len(models) * len(store.wanted)
    with console.progress("scores", total, "videos") as bar:
        for name, weights in models.items():
            for sample in samples.read_samples(store, tokenizer, weights):
                if scorers.distance:
                    vectors[name].append(scorers.distance.embed(sample.pixels))
                found = replace(sample, scores=score_sample(sample, scorers))
                small = samples.shrunk(found, SHOWN_WIDTH) if sample.trial in shown else None
                measured[name].append(small or replace(found, pixels=None))
                bar.advance(name)
    if not scorers.distance:
        return measured, None
    clips = decoded(tokenizer, dataset.heldout, features.HELD_OUT_CLIPS)
    held_out = np.stack([scorers.distance.embed(pixels) for pixels in clips])
    stacked = {name: np.stack(own) for name, own in vectors.items()}
    return measured, comparison.Features(features.DISTANCE, stacked, held_out)


def score_sample(sample: Sample, scorers: features.Models) -> dict[str, float]:
    """Return all scores of one video."""
    own, on_cpu = scorers.frames.items(), replace(sample, pixels=sample.pixels.cpu())
    return {
        **(world_scores(on_cpu) if sample.trial.scene else {}),
        **video_scores.measure_video(on_cpu.pixels),
        **{name: model.score(sample.pixels, sample.trial.prompt) for name, model in own},
    }


def by_score(measured: Sequence[Sample], names: Iterable[str]) -> dict[str, list[float]]:
    """Return the values of each score over the videos that it applies to."""
    found = {name: [s.scores[name] for s in measured if name in s.scores] for name in names}
    return {name: values for name, values in found.items() if values}


def _summary(
    values: dict[str, list[float]], vectors: comparison.Features | None, name: str
) -> dict[str, Any]:
    """Return the mean scores of a model's videos, and their distance to the held-out clips."""
    found = {}
    groups = {"scores": CHANCE, "video_scores": video_scores.SCORES, "features": features.KEYS}
    for group, names in groups.items():
        if own := means({score: values[score] for score in names if score in values}):
            found[group] = own
    if vectors:
        distance, p = statistics.kernel_distance(vectors.videos[name], vectors.held_out)
        found["held_out_distance"] = {"distance": distance, "p": p}
    return found


def shown_trials(r: Recipe, wanted: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose videos the page shows."""
    if not r.spec.embedded:
        return list(wanted[:SHOWN])
    kinds = [[trial for trial in wanted if trial.of_mascot == kind] for kind in (True, False)]
    return [trial for own in kinds for trial in own[:SHOWN_OF_WORLD]]


# --- the synthetic world --------------------------------------------------------------------------


def world_scores(sample: Sample) -> dict[str, float]:
    """Return the scores of the synthetic world that apply to a video.

    `colour`, `shape` and `motion` are 1 if a video shows what its prompt asks for, else 0, for the
    prompts without the mascot. `concept` is 1 if the video of a mascot's prompt shows its head.
    `consistency` applies to all videos.
    """
    reading = scorer.measure(sample.pixels)
    found = {"consistency": consistency(reading)}
    if sample.trial.of_mascot:
        return found | {"concept": float(reading.concept >= scorer.CONCEPT_SEEN)}
    right = scorer.score(sample.trial.scene, reading)
    return found | {name: float(correct) for name, correct in right.items()}


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the mean of each score."""
    return {name: fmean(own) for name, own in values.items()}


def consistency(reading: Reading) -> float:
    """Return the share of successive frame pairs with the thing in both, a small step apart."""
    steps = reading.track[:, :2].diff(dim=0).norm(dim=1)
    # A step from or to a frame that shows nothing is NaN, so it does not count as small.
    return float((steps < LARGEST_MOVE).float().mean()) if len(steps) else 1.0


@torch.inference_mode()
def reconstruction(r: Recipe, count: int, device: str) -> float:
    """Return the tokenizer's mean reconstruction PSNR in dB on held-out synthetic clips."""
    dtype = default_dtype(device)
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, dtype)
    psnrs = []
    for seed in range(count):
        scene = world.sample_scene(seed, "heldout")
        clip = rgb.to_model(world.render(scene, r.num_frames, r.height, r.width, r.fps))
        x = clip[None].to(device, dtype)
        decoded = tokenizer.decode(tokenizer.encode(x)).clamp(-1, 1)
        psnrs.append(float(-10 * torch.log10((decoded - x).float().square().mean() / 4)))
    return fmean(psnrs)


# --- prepared datasets ----------------------------------------------------------------------------


def decoded(tokenizer: Tokenizer, clips: Clips, most: int) -> Iterator[Tensor]:
    """Yield evenly spaced clips as the tokenizer decodes them, uint8 (3, T, H, W).

    Generated videos are decoded too, so what the tokenizer loses makes no difference.
    """
    chosen = spread(len(clips), most)
    with console.progress("decode", len(chosen), "clips") as bar:
        for index in chosen:
            yield samples.decode(tokenizer, clips.latent(index))
            bar.advance()


@torch.inference_mode()
def clip_errors(r: Recipe, net: DiT, clips: Clips) -> dict[str, list[float]]:
    """Return the EDM error of each clip at each of `edm.FIXED_SIGMAS`, with fixed noise.

    The keys are like sigma_0.32. The model's spec scales the noise levels.

    Raises:
        UserError: an error is not finite.
    """
    device = next(net.parameters()).device
    loss = edm.EDMLoss(net, r.spec).to(device)
    measured = HeldOut(clips, r.validate_clips)
    errors: dict[float, list[float]] = {sigma: [] for sigma in measured.sigmas}
    with console.progress("clips", len(measured.samples), "samples") as bar:
        for i, (_, level, _) in enumerate(measured.samples):
            _, edm_B = loss(*measured.batch(i).to(device))
            if not edm_B.isfinite().all():
                raise UserError(
                    "the EDM error is not finite", code=ExitCode.TRAINING,
                    where=measured.batch(i).samples[0],
                    fix="train again with a lower learning_rate",
                )  # fmt: skip
            errors[measured.sigmas[level]] += edm_B.tolist()
            bar.advance()
    return {f"sigma_{sigma:.2g}": values for sigma, values in errors.items()}


def nearest_clips(made: Sequence[Sample], clips: Clips) -> tuple[float, float] | None:
    """Return the smallest distance from a video to a training clip, and the median between clips.

    Return None if there are fewer than two clips, or if the videos have another size.
    """
    if len(clips) < 2 or clips.latent(0).shape != made[0].latent.shape:
        return None
    from_videos, from_clips = nearest.distances([sample.latent for sample in made], clips)
    return float(from_videos.min()), float(from_clips.median())
