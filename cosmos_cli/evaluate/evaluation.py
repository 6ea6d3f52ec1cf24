"""Evaluates models without a second model as the judge.

In the synthetic world of the tiny model, colour, shape and motion are read from the pixels of
generated videos. On a prepared dataset it measures the EDM error of held-out clips, and the
distance from generated videos to the nearest training clip.

Dimension letters: C channels, T frames, H height, W width.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from cosmos_cli import console, files, html, paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.evaluate import comparison
from cosmos_cli.generate.jobs import Job, Weights
from cosmos_cli.generate.phases import Pipeline
from cosmos_cli.generate.text_models import Conditioning
from cosmos_cli.generate.video_models import load_denoiser, sample_latents
from cosmos_cli.model import edm, rgb, video, video_scores
from cosmos_cli.model.device import number_format
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.tiny import scorer, world
from cosmos_cli.model.tiny.scorer import Reading
from cosmos_cli.model.tiny.world import Scene
from cosmos_cli.model.tokenizer import load_tokenizer
from cosmos_cli.prep import holdout
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import nearest, page
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
    "concept": ("share of videos that show the new concept when asked to", "higher"),
    "consistency": ("share of frames after which the thing has moved by a small step", "higher"),
    "reconstruction": (
        "PSNR of clips that the tokenizer encoded and decoded; it is not trained", "higher",
    ),
    **video_scores.MEANINGS,
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
# This seed differs from that of the dataset that teaches the mascot, so its scenes do too.
CONCEPT_SEED = 1000
RECONSTRUCTED = 16
MOSAIC_COLUMNS, MOSAIC_ROWS = 4, 6


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
    """A generated video: pixels uint8 (3, T, H, W) and latent (C, T, H, W)."""

    trial: Trial
    pixels: Tensor
    latent: Tensor


@dataclass(frozen=True)
class PreparedClips:
    """A prepared dataset: its training clips, held-out clips and captions."""

    train: Clips
    heldout: Clips
    captions: tuple[str, ...]

    @classmethod
    def of(cls, r: Recipe) -> PreparedClips | None:
        """Return the dataset of a recipe, or None if prep has not run."""
        dataset = paths.Dataset.at(r.dataset_dir, r.videos_dir)
        if not dataset.manifest.exists():
            return None
        manifest = dataset.read_manifest()
        train, heldout = (
            Clips(dataset.root, rows, r.spec) for rows in holdout.split_clips(manifest)
        )
        used = (video["caption"] for video in manifest["videos"] if video["verdict"] == "used")
        return cls(train, heldout, tuple(dict.fromkeys(used)))


def evaluate(
    r: Recipe, models: dict[str, Weights], prompts: int, device: str
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Return the figures of some models and the videos that each generated, by name.

    Args:
        r: the recipe; its dataset is used if prep has run.
        models: the weights to measure, by name.
        prompts: the number of videos per model, from prompts of the synthetic world or from the
            captions of the dataset.
        device: cpu or cuda.

    Raises:
        UserError: a file is missing or damaged.
    """
    dataset = PreparedClips.of(r)
    held_out = bool(dataset and len(dataset.heldout))
    figures: dict[str, Any] = {"model": r.model, "prompts": prompts, "models": {}}
    if dataset:
        clips = dataset.heldout if held_out else dataset.train
        figures["clips"] = "held-out" if held_out else "training"
    if r.spec.embedded:
        wanted = world_trials(prompts)
        figures["psnr"] = reconstruction(r, RECONSTRUCTED, device)
    else:
        captions = dataset.captions if dataset else ()
        # More videos than captions are the same captions with other seeds.
        count = prompts if captions else 0
        wanted = [Trial(captions[seed % len(captions)], seed) for seed in range(count)]
    samples: dict[str, list[Sample]] = {}
    values: dict[str, dict[str, list[float]]] = {}
    # The text encoder does not fit next to a denoiser, so it is loaded once, before them.
    text_embs = read_prompts(r, wanted, device)
    for name, weights in models.items():
        console.say(f"measuring {name}: {weights.path}")
        measured: dict[str, Any] = {"weights": weights.identity}
        own = values[name] = {}
        net = load_denoiser(r, weights.path, device, number_format(device), weights.loras)
        if dataset:
            errors = clip_errors(r, net, clips)
            measured["edm"] = means(errors)
            # On clips that it was trained on, every model is better than the base.
            if held_out:
                own["EDM error"] = list(map(fmean, zip(*errors.values(), strict=True)))
        if wanted:
            samples[name] = made = sample_trials(r, net, wanted, text_embs)
            if r.spec.embedded:
                own |= (read := world_scores(made))
                measured["scores"] = means(read)
            own |= (pixels := video_scores.measure(sample.pixels for sample in made))
            measured["video_scores"] = means(pixels)
            if dataset and (distances := nearest_clips(made, dataset.train)):
                measured["nearest_clip"], figures["clips_apart"] = distances
        figures["models"][name] = measured
        # Free its memory before the next one is loaded.
        del net
    figures["comparisons"] = comparison.compare(values, directions(r, prompts, held_out))
    return figures, samples


def directions(r: Recipe, prompts: int, held_out: bool) -> dict[str, str]:
    """Return the better direction of each score that is compared: "higher", "lower" or ""."""
    names = ["EDM error"] if held_out else []
    if prompts:
        names += [*(CHANCE if r.spec.embedded else ()), *video_scores.names(r.num_frames)]
    return {name: MEANINGS[name][1] for name in names}


# --- the synthetic world --------------------------------------------------------------------------


def world_trials(count: int) -> list[Trial]:
    """Return prompts for held-out combinations, and half as many for the mascot."""
    heldout = [world.sample_scene(seed, "heldout") for seed in range(count)]
    mascots = world.concept_scenes(-(-count // 2), CONCEPT_SEED)
    return [
        *(Trial(world.caption(scene, seed), seed, scene) for seed, scene in enumerate(heldout)),
        *(Trial(words, CONCEPT_SEED + i, scene) for i, (scene, words) in enumerate(mascots)),
    ]


def read_prompts(r: Recipe, wanted: Sequence[Trial], device: str) -> list[Conditioning]:
    """Return the conditioning of each trial's prompt.

    Raises:
        UserError: a prompt is blocked, or a model of the text is missing or damaged.
    """
    if not wanted:
        return []
    # The text does not depend on the weights.
    jobs = [Job(t.prompt, r, Weights(Path(), ""), Path(str(i))) for i, t in enumerate(wanted)]
    prepared, failed = Pipeline(r, device, in_turn=True).prepare(jobs)
    if failed:
        raise next(failed[job] for job in jobs if job in failed)
    return [prepared[job] for job in jobs]


@torch.inference_mode()
def sample_trials(
    r: Recipe, net: DiT, wanted: Sequence[Trial], text_embs: Sequence[Conditioning]
) -> list[Sample]:
    """Generate a video of each trial with one model."""
    weight = next(net.parameters())
    device, dtype = weight.device.type, weight.dtype
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, dtype)
    samples: list[Sample] = []
    batch = (16 if device == "cpu" else 64) if r.spec.embedded else 1
    for first in range(0, len(wanted), batch):
        trials = wanted[first : first + batch]
        texts = text_embs[first : first + batch]
        label = f"videos {first + 1}-{first + len(trials)} of {len(wanted)}"
        x0 = sample_latents(r, net, texts, [trial.seed for trial in trials], label)
        for trial, latent in zip(trials, x0, strict=True):
            pixels = rgb.to_uint8(tokenizer.decode(latent[None].to(dtype))[0]).cpu()
            samples.append(Sample(trial, pixels, latent.cpu()))
    return samples


def scores(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the means of `world_scores`."""
    return means(world_scores(samples))


def world_scores(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Return each score of the synthetic world's videos that it applies to.

    `colour`, `shape` and `motion` are 1 if a video shows what its prompt asks for, else 0, for the
    prompts without the mascot. `concept` is 1 if the video of a mascot's prompt shows its head.
    `consistency` applies to all videos.
    """
    values: dict[str, list[float]] = {name: [] for name in CHANCE}
    for sample in samples:
        reading = scorer.measure(sample.pixels)
        values["consistency"].append(consistency(reading))
        if sample.trial.of_mascot:
            values["concept"].append(float(reading.concept >= scorer.CONCEPT_SEEN))
        elif sample.trial.scene:
            for name, correct in scorer.score(sample.trial.scene, reading).items():
                values[name].append(float(correct))
    return values


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
    dtype = number_format(device)
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


@torch.inference_mode()
def clip_errors(r: Recipe, net: DiT, clips: Clips) -> dict[str, list[float]]:
    """Return the EDM error of each clip at each of `edm.FIXED_SIGMAS`, with fixed noise.

    The keys are like sigma_0.32. The model's spec scales the noise levels. Of a Video2World model,
    it is the error with one latent frame given.

    Raises:
        UserError: an error is not finite.
    """
    device = next(net.parameters()).device
    loss = edm.EDMLoss(net, r.spec).to(device)
    measured = HeldOut(clips, r.validate_clips, counts=(1,))
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


def nearest_clips(samples: Sequence[Sample], clips: Clips) -> tuple[float, float] | None:
    """Return the smallest distance from a video to a training clip, and the median between clips.

    Return None if there are fewer than two clips, or if the videos have another size.
    """
    if len(clips) < 2 or clips.latent(0).shape != samples[0].latent.shape:
        return None
    from_videos, from_clips = nearest.distances([sample.latent for sample in samples], clips)
    return float(from_videos.min()), float(from_clips.median())


# --- report ---------------------------------------------------------------------------------------


def figure_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the figures as table rows: a name, the value of chance, and each model's value."""
    models = figures["models"].values()
    table: list[tuple[str, ...]] = []
    if all("scores" in model for model in models):
        table += [
            (name, f"{chance:.0%}", *(f"{model['scores'][name]:.1%}" for model in models))
            for name, chance in CHANCE.items()
        ]
    if all("video_scores" in model for model in models):
        names = next(iter(models))["video_scores"]
        table += [(name, "", *(f"{m['video_scores'][name]:.4g}" for m in models)) for name in names]
    if "psnr" in figures:
        table.append(("reconstruction", "", *[f"{figures['psnr']:.1f} dB"] * len(models)))
    if all("edm" in model for model in models):
        table += [
            (
                f"EDM error, sigma {sigma:.2g}",
                "",
                *(f"{m['edm'][f'sigma_{sigma:.2g}']:.4f}" for m in models),
            )
            for sigma in edm.FIXED_SIGMAS
        ]
    if all("nearest_clip" in model for model in models):
        apart = f"{figures['clips_apart']:.3f} between clips"
        table.append(
            ("nearest training clip", apart, *(f"{model['nearest_clip']:.3f}" for model in models))
        )
    return table


def keep_larger(page: Path, figures: dict[str, Any]) -> None:
    """Rename an earlier evaluation at `page` if it has more videos or other models than this one.

    Raises:
        UserError: a file cannot be renamed.
    """
    if not page.exists():
        return
    record = page.with_suffix(".json")
    earlier = _record(record)
    has_fewer = earlier["prompts"] <= figures["prompts"]
    if has_fewer and earlier["models"].keys() <= figures["models"].keys():
        return
    count = "earlier" if earlier["prompts"] == math.inf else earlier["prompts"]
    names = (f"{page.stem}_{count}{'-' * n}" for n in itertools.count())
    stem = next(name for name in names if not page.with_name(f"{name}{page.suffix}").exists())
    with files.disk_errors(page):
        for path in (page, record, *map(page.with_name, earlier["files"])):
            if path.is_file():
                path.rename(path.with_name(stem + path.name[len(page.stem) :]))
    console.say(f"the earlier evaluation is kept as {page.with_name(stem + page.suffix)}")


def _record(path: Path) -> dict[str, Any]:
    """Return what an evaluation recorded. Without a record it may have been larger than any."""
    record = None
    with contextlib.suppress(files.BadFile):
        record = files.read_json(path)
    if isinstance(record, dict) and {"prompts", "models", "files"} <= record.keys():
        return record
    return {"prompts": math.inf, "models": {}, "files": []}


def _figures(figures: dict[str, Any]) -> str:
    """Return the table of the figures and what each of them means."""
    notes = []
    if "clips" in figures:
        notes.append(f"The EDM error is measured on the {figures['clips']} clips of the dataset.")
    if figures["prompts"]:
        notes.append("Every model generated videos of the same prompts with the same seeds.")
    if "psnr" in figures:
        notes.append(
            "The tiny model draws a synthetic world, so the content of its videos can be read from "
            "their pixels. The new concept is what the demo dataset teaches: a teal robot with a "
            "yellow head."
        )
    rows = figure_rows(figures)
    names = [row[0].partition(",")[0] for row in rows]
    better = [(*row, MEANINGS[name][1]) for row, name in zip(rows, names, strict=True)]
    meanings = [(name, MEANINGS[name][0]) for name in dict.fromkeys(names)]
    table = html.table(better, ("", "by chance", *figures["models"], "better"))
    return html.text(" ".join(notes)) + table + html.table(meanings, ("figure", "meaning"))


def write_page(
    path: Path, r: Recipe, figures: dict[str, Any], samples: dict[str, list[Sample]]
) -> list[Path]:
    """Write one self-contained page and, next to it, its videos; return all paths."""
    sections = [
        (heading, html.text(comparison.NOTE) + html.table(*table))
        for heading, table in comparison.tables(figures["comparisons"])
    ]
    sections.append(("Figures", _figures(figures)))
    written = [path]
    for heading, mascot in (("The new concept", True), ("Other prompts", False)):
        shown = {
            name: [s for s in made if s.trial.of_mascot == mascot][: MOSAIC_COLUMNS * MOSAIC_ROWS]
            for name, made in samples.items()
        }
        if not any(shown.values()):
            continue
        parts = []
        for name, made in shown.items():
            mosaic = path.with_name(f"{path.stem}_{name}_{'concept' if mascot else 'others'}.mp4")
            write_mosaic(mosaic, made, r)
            written.append(mosaic)
            parts.append(html.media(mosaic, name))
        prompts = ((s.trial.prompt,) for s in next(iter(shown.values())))
        listed = html.table(prompts, ("prompts of these videos, row by row",))
        sections.append((heading, html.row(*parts) + listed))
    run = paths.Run(r.run_dir)
    if run.metrics.exists():
        sections += page.sections(run, path.parent)
    hashes = ((name, model["weights"]) for name, model in figures["models"].items())
    sections.append(("Weights", html.table(hashes, ("", "sha256"))))
    files.write_text(path, html.page(f"Evaluation of {r.model}", sections))
    record = path.with_suffix(".json")
    files.write_json(record, {**figures, "files": [mosaic.name for mosaic in written[1:]]})
    return [*written, record]


def write_mosaic(path: Path, samples: Iterable[Sample], r: Recipe) -> None:
    """Write the videos as a grid in one mp4."""
    pixels = [sample.pixels for sample in samples]
    pixels += [torch.zeros_like(pixels[0])] * (-len(pixels) % MOSAIC_COLUMNS)
    strips = [
        torch.cat(pixels[first : first + MOSAIC_COLUMNS], dim=3)
        for first in range(0, len(pixels), MOSAIC_COLUMNS)
    ]
    with files.atomic_file(path) as temporary:
        video.write_mp4(temporary, torch.cat(strips, dim=2), r.fps, r.video_crf)
