"""Sanity checks of a model's weights on synthetic clips, without any reference value.

The tokenizer must preserve most of a picture. The denoiser must beat the best linear estimate, and
do better on a clip than on its shuffled frames. And it must not get better after an exchange of
weights: if one helps, the weights are read in the wrong way and the exchange shows how.

The text is empty, as in a part of the training: loading the text encoder alone takes minutes.
Dimension letters: B batch of one clip, C channels, T frames, H height, W width, t h w patches,
D width of the network, L tokens, K half the width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cosmos_cli import console
from cosmos_cli.errors import UserError, asset_error
from cosmos_cli.generate.video_models import load_denoiser
from cosmos_cli.model import edm, rgb, sampler
from cosmos_cli.model.cond_frames import CondFrames, Network
from cosmos_cli.model.device import default_dtype
from cosmos_cli.model.dit import DiT, Prompt, Rope, patch_grid, rope_table
from cosmos_cli.model.tiny import world
from cosmos_cli.model.tiny.world import Scene, Thing
from cosmos_cli.model.tokenizer import load_tokenizer
from cosmos_cli.recipe.keys import Recipe

FRAMES = 25
SCENES = (
    Scene(Thing("robot", "teal"), "right", "grid"),
    Scene(Thing("heart", "red"), "circle", "floor"),
    Scene(Thing("cube", "blue"), "grow", "gradient"),
)
SHUFFLED = (2, 0, 3, 1)
SIGMAS = (0.1, 0.5, 2.0)
# The exchanges are tried on the first clip at this noise level, where positions matter most.
EXCHANGE_SIGMA = 0.5
# An exchange that undoes a mistake lowers the loss by more than this share. With correct weights no
# exchange lowers it.
EXCHANGE_GAIN = 0.2
# The reconstruction error may be at most this share of a clip's variance. With misread weights it
# exceeds the variance.
MAX_LOST = 0.5
# A normalised latent has a root mean square of about 1; that of a synthetic clip may differ.
LATENT_RMS = (0.2, 4.0)
EXPLANATION = """\
Is my loss normal? Compare edm_sigma_below_0.5, edm_sigma_below_2 and edm_sigma_from_2 in
metrics.jsonl with the column "EDM loss". For clips as plain as these synthetic ones they are about
the same. For real footage they are higher, but below 1, the loss of an untrained network."""


@dataclass(frozen=True)
class Losses:
    """EDM losses at one noise level: of the model, of the linear estimate, on shuffled frames."""

    sigma: float
    model: float
    linear: float
    shuffled: float


@torch.no_grad()
def check_model(r: Recipe, device: str) -> dict[str, Any]:
    """Check a recipe's tokenizer and denoiser; return the figures.

    Raises:
        UserError: the weights are missing, damaged, untrained or misread.
    """
    size = r.spec.height, r.spec.width, r.spec.fps
    videos = [world.render(scene, FRAMES, *size) for scene in SCENES]
    latents, figures = check_tokenizer(r, videos, device)
    files = r.model_files
    denoiser = Denoiser(load_denoiser(r, files.dit, device), r)
    rows = [
        Losses(
            sigma,
            denoiser.loss(latents, sigma),
            linear_loss(latents, sigma, r.spec.sigma_data),
            denoiser.loss([x0[:, :, SHUFFLED] for x0 in latents], sigma),
        )
        for sigma in SIGMAS
    ]
    cells = [tuple(f"{value:.4g}" for value in asdict(row).values()) for row in rows]
    header = ("sigma", "EDM loss", "linear estimate", "shuffled frames")
    console.say(f"{console.table(cells, header)}\n{EXPLANATION}")
    if problem := fault_of(rows, exchanged_losses(denoiser, latents[:1])):
        raise _misread(f"the denoiser {problem}", files.dit)
    return {**figures, "edm": [asdict(row) for row in rows]}


def _misread(what: str, path: Path) -> UserError:
    fix = (
        "choose another `base` if you made this file; the hub's own files were verified before, so "
        "report a failure of those as a bug"
    )
    return asset_error(path, what, fix)


# --- tokenizer ------------------------------------------------------------------------------------


def check_tokenizer(
    r: Recipe, clips: list[Tensor], device: str
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the latents of uint8 clips, BCTHW in fp32, and the quality of their reconstruction.

    Raises:
        UserError: the reconstruction loses the picture, or the latents have the wrong scale.
    """
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, default_dtype(device))
    weight = next(tokenizer.parameters())
    latents, errors, variances = [], [], []
    for clip in clips:
        x = rgb.to_model(clip)[None].to(weight)
        latents.append(tokenizer.encode(x))
        errors.append((tokenizer.decode(latents[-1]) - x).float().square().mean())
        variances.append(x.float().var(dim=(0, 2, 3, 4)).mean())
    error, variance = (torch.stack(values).mean().item() for values in (errors, variances))
    psnr = -10 * math.log10(error / 4)
    rms = torch.cat(latents).float().square().mean().sqrt().item() / r.spec.sigma_data
    console.say(f"tokenizer: reconstruction {psnr:.1f} dB, RMS of the latents {rms:.2f}")
    problem = ""
    if not error < MAX_LOST * variance:
        problem = (
            "loses the picture: the mean squared error of a reconstruction is "
            f"{error / variance:.0%} of the clip's variance"
        )
    elif not LATENT_RMS[0] < rms < LATENT_RMS[1]:
        problem = f"makes latents with RMS {rms:.2f}, not about 1: check its mean and std"
    if problem:
        raise _misread(f"the tokenizer {problem}", r.model_files.tokenizer)
    return [x0.float() for x0 in latents], {"psnr": psnr, "lost": error / variance, "rms": rms}


# --- denoiser -------------------------------------------------------------------------------------


def linear_loss(latents: list[Tensor], sigma: float, sigma_data: float) -> float:
    """Return the EDM loss of the Wiener filter, the best linear estimate of each channel.

    The estimate is mean + var / (var + sigma^2) (xt - mean). Its error is
    var sigma^2 / (var + sigma^2).
    """
    var_C = torch.cat(latents).var(dim=(0, 2, 3, 4))
    error = (var_C * sigma**2 / (var_C + sigma**2)).mean()
    return (edm.loss_weight(torch.tensor(sigma), sigma_data) * error).item()


class Denoiser:
    """Computes the loss of a network for an empty text, the model's frame rate and fixed noise."""

    def __init__(self, net: DiT, r: Recipe) -> None:
        self.net = net
        weight = next(net.parameters())
        self.text_emb_BMD = weight.new_zeros(1, r.spec.text.tokens, r.spec.text.channels)
        self.fps_B = torch.tensor([r.spec.fps], device=weight.device)
        self.sigma_data = r.spec.sigma_data

    def loss(self, latents: list[Tensor], sigma: float, axes: tuple[int, ...] = (0, 1, 2)) -> float:
        """Return the mean EDM loss, with the rotary channels of axis i at positions on axes[i]."""
        sigma_B = torch.full_like(self.fps_B, sigma)
        losses = []
        for seed, x0 in enumerate(latents):
            grid = patch_grid(self.net.spec, x0)
            pos_LD, _ = self.net.locate(grid, self.fps_B)
            prompt = Prompt(pos_LD, self.rope(grid, axes), self.net.read(self.text_emb_BMD))
            noise = sampler.start_noise(seed, tuple(x0.shape)).to(x0)
            net: Network = partial(self.net, prompt=prompt)
            if self.net.spec.cond_channels:
                none_B = torch.zeros_like(sigma_B)
                net = CondFrames.of(x0, none_B, sigma_B, noise).shown_to(net, self.sigma_data)
            denoised = edm.denoise(
                net, x0 + sigma * noise, sigma_B, self.text_emb_BMD, self.fps_B, self.sigma_data
            )
            error = (denoised - x0).square().mean()
            losses.append(edm.loss_weight(sigma_B, self.sigma_data) * error)
        return torch.cat(losses).mean().item()

    def rope(self, grid: tuple[int, int, int], axes: tuple[int, ...]) -> Rope:
        """Return the rotary table of a grid with permuted axes, for tokens in the order (t h w)."""
        permuted = tuple(grid[axis] for axis in axes)
        inverse = [1 + axes.index(axis) for axis in range(3)]
        cos, sin = (
            table.unflatten(1, permuted).permute(0, *inverse, 4).flatten(1, 3)
            for table in rope_table(self.net.spec, permuted, self.fps_B)
        )
        return cos, sin


def exchanged_losses(denoiser: Denoiser, latents: list[Tensor]) -> dict[str, float]:
    """Return the loss after each exchange of weights; the entry "" is without an exchange."""
    losses = {"": denoiser.loss(latents, EXCHANGE_SIGMA)}
    changes = list(rearrangements(denoiser.net))
    with console.progress("exchanging weights", len(changes) + 5, "exchanges") as bar:
        for axes in permutations(range(3)):
            if axes != (0, 1, 2):
                name = f"the rotary axes t h w as {' '.join('thw'[axis] for axis in axes)}"
                losses[name] = denoiser.loss(latents, EXCHANGE_SIGMA, axes)
                bar.advance()
        for name, change in changes:
            with replaced(change):
                losses[name] = denoiser.loss(latents, EXCHANGE_SIGMA)
            bar.advance()
    return losses


Change = list[tuple[nn.Parameter, Tensor]]


def rearrangements(net: DiT) -> Iterator[tuple[str, Change]]:
    """Yield the ways in which weights could be misread, each with the change that would fix it."""
    yield "pos_embedder.h and w exchanged", _exchange(net.pos_embedder.h, net.pos_embedder.w)
    blocks = [dict(block.named_parameters()) for block in net.blocks]
    for a, b in combinations(blocks[0], 2):
        # With an empty text, cross-attention adds nothing and its weights have no effect.
        no_effect = a.startswith("cross_attn.") and b.startswith("cross_attn.")
        if blocks[0][a].shape == blocks[0][b].shape and not no_effect:
            pairs = [_exchange(block[a], block[b]) for block in blocks]
            change = [part for pair in pairs for part in pair]
            yield f"{a} and {b} of every block exchanged", change
    sizes = {"t": net.spec.patch_t, "h": net.spec.patch_hw, "w": net.spec.patch_hw}
    first, last = net.x_embedder.weight, net.final.linear.weight
    for order in ("C t w h", "h w t C", "w h t C"):
        reordered = rearrange(first, f"D ({order}) -> D (C t h w)", **sizes)
        yield f"x_embedder in the order {order}", [(first, reordered)]
    for order in ("w h t C", "C t h w", "C t w h"):
        reordered = rearrange(last, f"({order}) D -> (h w t C) D", **sizes)
        yield f"final.linear in the order {order}", [(last, reordered)]


def _exchange(a: nn.Parameter, b: nn.Parameter) -> Change:
    return [(a, b.data), (b, a.data)]


@contextmanager
def replaced(change: Change) -> Iterator[None]:
    """Replace the values of some parameters inside the context."""
    before = [(parameter, parameter.data) for parameter, _ in change]
    for parameter, value in change:
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def fault_of(rows: list[Losses], exchanged: dict[str, float]) -> str:
    """Return the problem of a denoiser as the predicate of a sentence; "" if there is none."""
    best = min(exchanged, key=lambda name: exchanged[name])
    linear = next(row.linear for row in rows if row.sigma == EXCHANGE_SIGMA)
    if exchanged[best] < min((1 - EXCHANGE_GAIN) * exchanged[""], linear):
        gain = 1 - exchanged[best] / exchanged[""]
        return f"has misread weights: its loss falls by {gain:.0%} with {best}"
    worse = [row for row in rows if not row.model < row.linear]
    if len(worse) == len(rows):
        return "is not trained: it is worse than a linear estimate at every noise level"
    for row in rows:
        if not row.model < row.linear:
            return (
                f"is worse than the linear estimate at sigma {row.sigma:g}: "
                f"its loss is {row.model:.3g}, that of the estimate {row.linear:.3g}"
            )
        if row.model > row.shuffled:
            return (
                f"is better on shuffled frames at sigma {row.sigma:g}: "
                f"its loss is {row.shuffled:.3g}, in the right order {row.model:.3g}"
            )
    return ""
