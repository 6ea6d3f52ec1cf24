"""Score videos that continue given frames: compare each new frame with the true one.

Dimension letters: C channels, T new frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cosmos_cli import console
from cosmos_cli.evaluate import comparison
from cosmos_cli.evaluate.evaluation import SHOWN_WIDTH, PreparedClips, means
from cosmos_cli.evaluate.samples import Sample, Trial, decode, read_prompts, shrunk
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.generate.text_models import Conditioning
from cosmos_cli.generate.video_models import load_denoiser, sample_latents
from cosmos_cli.model import rgb
from cosmos_cli.model.device import default_dtype
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.tiny import scorer, world
from cosmos_cli.model.tiny.world import Scene
from cosmos_cli.model.tokenizer import Tokenizer, load_tokenizer
from cosmos_cli.prep.holdout import spread
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.spec import GIVEN_FRAMES

# What each score means, and which direction is better.
MEANINGS = {
    "PSNR": ("mean over the new frames of 10 log10(255^2 / mean squared error), in dB", "higher"),
    "SSIM": (
        "mean over the new frames of the structural similarity of the luminance, 1 if equal",
        "higher",
    ),
    "position error": (
        "mean over the new frames of the distance in pixels between where the thing is and where "
        "it should be; a thing that is not seen is one picture height away", "lower",
    ),
}  # fmt: skip
# The scenes of the synthetic world that are continued. The demo dataset teaches bounces.
SCENES = {"free motion": world.free_scene, "bounces": world.bounce_scene}
HELD_OUT = "held-out clips"
# What the models are compared with.
REPEATED, ROUND_TRIP = "last frame repeated", "tokenizer round trip"
# The page shows this many videos of each kind, of those that continue the most frames.
SHOWN = 12


@dataclass(frozen=True)
class Clip:
    """A clip to continue: uint8 pixels (3, all frames, H, W) and latent, CTHW in fp32.

    The pixels of a clip of a dataset are those that the tokenizer reconstructs, so its errors are
    not counted as the model's.
    """

    pixels: Tensor
    latent: Tensor
    caption: str
    scene: Scene | None = None


def directions(r: Recipe, count: int, held_out: bool) -> dict[str, str]:
    """Return the better direction of each score: "higher", "lower" or ""."""
    kinds = [*(SCENES if r.spec.embedded else ()), *([HELD_OUT] if held_out else ())]
    return {
        score_name(score, kind, given): better
        for given in GIVEN_FRAMES
        for kind in kinds
        for score, (_, better) in MEANINGS.items()
        if count and (kind in SCENES or score != "position error")
    }


def score_name(score: str, kind: str, given: int) -> str:
    """Return the name of a score of one kind of clips, for `given` given frames."""
    return f"{score}, {kind}, {given} given"


def evaluate(
    r: Recipe, models: Mapping[str, Weights], count: int, device: str
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Return the figures of some models, and videos to show of each and of the truth, by name.

    At most `count` clips of each kind are continued. If prep has run, held-out clips of its dataset
    are one kind.

    Raises:
        UserError: a file is missing or damaged.
    """
    dtype = default_dtype(device)
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, dtype)
    groups = clips_to_continue(r, tokenizer, count)
    texts = {kind: _texts(r, clips, device) for kind, clips in groups.items()}
    figures: dict[str, Any] = {"model": r.model, "prompts": count, "models": {}}
    values: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    shown: dict[str, list[Sample]] = {}

    def record(name: str, kind: str, given: int, videos: Iterable[Tensor]) -> None:
        scores, first = measure_clips(groups[kind], videos, given)
        for score, found in scores.items():
            key = score_name(score, kind, given)
            values.setdefault(name, {})[key] = found.nanmean(1).tolist()
            curves.setdefault(key, {})[name] = _curve(score, found)
        if given == GIVEN_FRAMES[-1] and name != REPEATED:
            shown.setdefault(name, []).extend(first)

    for kind, clips in groups.items():
        for given in GIVEN_FRAMES:
            record(REPEATED, kind, given, (repeat_last(clip, given) for clip in clips))
            record(ROUND_TRIP, kind, given, round_trips(tokenizer, clips))
    for name, weights in models.items():
        console.say(f"measuring {name}: {weights.path}")
        net = load_denoiser(r, weights.path, device, weights.loras)
        for kind, clips in groups.items():
            for given in GIVEN_FRAMES:
                videos = continue_clips(r, net, tokenizer, clips, texts[kind], given)
                record(name, kind, given, videos)
        own = means(values.get(name, {}))
        figures["models"][name] = {"weights": weights.identity, "continuation": own}
        # Free its memory before the next one is loaded.
        del net
    figures |= {"repeated": means(values.get(REPEATED, {})), "horizon": curves}
    compared = {name: values[name] for name in models if name in values}
    better = directions(r, count, HELD_OUT in groups)
    figures["comparisons"] = comparison.compare(compared, better) if compared else []
    return figures, shown


def _texts(r: Recipe, clips: Sequence[Clip], device: str) -> list[Conditioning]:
    return read_prompts(r, [Trial(clip.caption, 0) for clip in clips], device)


def _curve(score: str, found: Tensor) -> list[float]:
    """Return one value per new frame: the median of distances, of which few are very large."""
    line = found.nanmedian(0).values if score == "position error" else found.nanmean(0)
    return [round(value, 4) for value in line.tolist()]


@torch.inference_mode()
def clips_to_continue(r: Recipe, tokenizer: Tokenizer, count: int) -> dict[str, list[Clip]]:
    """Return at most `count` clips of each kind: of the synthetic world and of the dataset."""
    if not count:
        return {}
    groups = {}
    if r.spec.embedded:
        for kind, scene_of in SCENES.items():
            scenes = [scene_of(seed, "heldout") for seed in range(count)]
            groups[kind] = [world_clip(r, tokenizer, scene, i) for i, scene in enumerate(scenes)]
    dataset = PreparedClips.of(r)
    if dataset and len(dataset.heldout):
        chosen = spread(len(dataset.heldout), count)
        groups[HELD_OUT] = [dataset_clip(dataset, tokenizer, i) for i in chosen]
    return groups


def world_clip(r: Recipe, tokenizer: Tokenizer, scene: Scene, seed: int) -> Clip:
    """Return the clip of a scene of the synthetic world."""
    pixels = world.render(scene, r.num_frames, r.height, r.width, r.fps)
    x = rgb.to_model(pixels)[None].to(next(tokenizer.parameters()))
    latent = tokenizer.encode(x)[0].float().cpu()
    return Clip(pixels, latent, world.caption(scene, seed), scene)


def dataset_clip(dataset: PreparedClips, tokenizer: Tokenizer, index: int) -> Clip:
    """Return a held-out clip of a dataset."""
    latent = dataset.heldout.latent(index)
    caption = dataset.caption_of[dataset.heldout.clips[index]["video"]]
    return Clip(decode(tokenizer, latent).cpu(), latent, caption)


@torch.inference_mode()
def continue_clips(
    r: Recipe,
    net: DiT,
    tokenizer: Tokenizer,
    clips: Sequence[Clip],
    texts: Sequence[Conditioning],
    given: int,
) -> Iterator[Tensor]:
    """Yield a video, uint8, from the first `given` frames of each clip."""
    on_cpu = next(net.parameters()).device.type == "cpu"
    batch = (16 if on_cpu else 64) if r.spec.embedded else 1
    # The tokenizer is causal: these are the latents of the given frames alone.
    told = r.spec.tokenizer.latent_frames(given)
    for first in range(0, len(clips), batch):
        part = clips[first : first + batch]
        own = zip(texts[first : first + batch], part, strict=True)
        conditioned = [replace(text, frames=clip.latent[:, :told]) for text, clip in own]
        label = f"{given} given, videos {first + 1}-{first + len(part)} of {len(clips)}"
        seeds = [r.sampling_seed + first + i for i in range(len(part))]
        x0 = sample_latents(r, net, conditioned, seeds, label)
        yield from (decode(tokenizer, latent).cpu() for latent in x0)


def round_trips(tokenizer: Tokenizer, clips: Iterable[Clip]) -> Iterator[Tensor]:
    """Yield the clips after encoding and decoding: no model can be expected to do better."""
    return (decode(tokenizer, clip.latent).cpu() for clip in clips)


def repeat_last(clip: Clip, given: int) -> Tensor:
    """Return the trivial prediction: the given frames, then the last of them again and again."""
    last = clip.pixels[:, given - 1 : given]
    repeats = clip.pixels.shape[1] - given
    return torch.cat([clip.pixels[:, :given], last.expand(-1, repeats, -1, -1)], dim=1)


def measure_clips(
    clips: Sequence[Clip], videos: Iterable[Tensor], given: int
) -> tuple[dict[str, Tensor], list[Sample]]:
    """Return each score of each clip and new frame, (clips, T), and the first videos to show."""
    found: dict[str, list[Tensor]] = {}
    shown: list[Sample] = []
    for i, (clip, video) in enumerate(zip(clips, videos, strict=True)):
        truth, new = clip.pixels[:, given:], video[:, given:]
        own = {"PSNR": rgb.frame_psnr(truth, new), "SSIM": rgb.frame_ssim(truth, new)}
        if clip.scene:
            own["position error"] = position_error(truth, new, clip.scene.thing.colour)
        for score, line in own.items():
            found.setdefault(score, []).append(line)
        if i < SHOWN:
            scores = {score: float(line.nanmean()) for score, line in own.items()}
            sample = Sample(Trial(clip.caption, i), video, clip.latent, scores)
            shown.append(shrunk(sample, SHOWN_WIDTH))
    return {score: torch.stack(lines) for score, lines in found.items()}, shown


def position_error(truth_CTHW: Tensor, made_CTHW: Tensor, colour: str) -> Tensor:
    """Return the distance in pixels between the tracked positions in each frame, (T).

    A thing that is not seen is one picture height away. Where the truth shows none, it is NaN.
    """
    height = truth_CTHW.shape[2]
    truth_T2, made_T2 = scorer.track(truth_CTHW, colour), scorer.track(made_CTHW, colour)
    distance_T = (truth_T2 - made_T2).norm(dim=1).nan_to_num(1.0).clamp(max=1.0) * height
    distance_T[truth_T2.isnan().any(1)] = float("nan")
    return distance_T
