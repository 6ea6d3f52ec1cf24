"""First contact with a model's weights: measured against themselves, on clips drawn by code.

Nothing here knows how good a model ought to be. The tokenizer must keep most of a picture, the
denoiser beat the best linear estimate and itself on shuffled frames. And it must not get better
when parts of it are exchanged: where one exchange helps, that is how they should have been read.

The text is empty, as in a part of the training; the text encoder alone takes minutes to load.
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
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from cosmos_cli import console, layout
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.keys import Recipe
from cosmos_cli.model import edm, generate, prep, sampler, video, world
from cosmos_cli.model.dit import DiT, Prompt, Rope, patch_grid, rope_table
from cosmos_cli.model.world import Scene, Thing

FRAMES = 25
SCENES = (
    Scene(Thing("robot", "teal"), "right", "grid"),
    Scene(Thing("heart", "red"), "circle", "floor"),
    Scene(Thing("cube", "blue"), "grow", "gradient"),
)
SHUFFLED = (2, 0, 3, 1)
SIGMAS = (0.1, 0.5, 2.0)
# The exchanges are tried on the first clip at this level, where it counts most what stands where.
EXCHANGE_SIGMA = 0.5
# Undoing a mistake takes more than a fifth of the loss away; no exchange helps right weights.
EXCHANGE_GAIN = 0.2
# Share of a clip's variance that a round trip may lose; weights read wrongly lose more than all.
MAX_LOST = 0.5
# A normalised latent has a root mean square of about 1, that of a drawn clip not exactly.
LATENT_RMS = (0.2, 4.0)
EXPLANATION = """\
Is my loss normal? Compare edm_sigma_below_0.5, edm_sigma_below_2 and edm_sigma_from_2 of
metrics.jsonl with the first column: the same for clips as plain as these drawn ones, higher for
real footage, and below 1, which is what a network has that learned nothing."""


@dataclass(frozen=True)
class Row:
    """EDM losses at one noise level: the model's, the linear estimate's, on shuffled frames."""

    sigma: float
    model: float
    linear: float
    shuffled: float


@torch.no_grad()
def check(r: Recipe, device: str) -> dict[str, Any]:
    """The figures of a recipe's tokenizer and denoiser.

    Raises:
        UserError: the weights are missing, damaged, not trained, or not read as they should be.
    """
    size = r.spec.height, r.spec.width, r.spec.fps
    latents, figures = check_tokenizer(
        r, [world.render(scene, FRAMES, *size) for scene in SCENES], device
    )
    files = layout.model_files(r.spec, r.checkpoints_dir, r.base)
    denoiser = Denoiser(
        generate.load_denoiser(r, files.dit, device, generate.number_format(device)), r
    )
    rows = [
        Row(
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
    if problem := verdict(rows, exchanged_losses(denoiser, latents[:1])):
        raise UserError(
            f"the denoiser {problem}", code=ExitCode.ASSET, where=str(files.dit),
            fix="fetch it again; if it is the very file of the hub, report this",
        )  # fmt: skip
    return {**figures, "edm": [asdict(row) for row in rows]}


# --- tokenizer ------------------------------------------------------------------------------------


def check_tokenizer(
    r: Recipe, clips: list[Tensor], device: str
) -> tuple[list[Tensor], dict[str, Any]]:
    """The latents of uint8 clips, BCTHW in fp32, and how well they come back.

    Raises:
        UserError: much of them is lost, or the latents have another scale.
    """
    tokenizer = prep.load_tokenizer(r, device, generate.number_format(device))
    weight = next(tokenizer.parameters())
    latents, errors, variances = [], [], []
    for clip in clips:
        x = video.to_model(clip)[None].to(weight)
        latents.append(tokenizer.encode(x))
        errors.append((tokenizer.decode(latents[-1]) - x).float().square().mean())
        variances.append(x.float().var(dim=(0, 2, 3, 4)).mean())
    error, variance = (torch.stack(values).mean().item() for values in (errors, variances))
    psnr = -10 * math.log10(error / 4)
    rms = torch.cat(latents).float().square().mean().sqrt().item() / r.spec.sigma_data
    console.say(f"tokenizer: {psnr:.1f} dB after a round trip, latents of size {rms:.2f}")
    problem = ""
    if not error < MAX_LOST * variance:
        problem = (
            f"loses the picture: a round trip is off by {error / variance:.0%} of its variance"
        )
    elif not LATENT_RMS[0] < rms < LATENT_RMS[1]:
        problem = f"makes latents of size {rms:.2f} where 1 is right: look at mean and std"
    if problem:
        raise UserError(
            f"the tokenizer {problem}", code=ExitCode.ASSET,
            where=str(layout.model_files(r.spec, r.checkpoints_dir).tokenizer),
            fix="fetch it again; if it is the very file of the hub, report this",
        )  # fmt: skip
    return [x0.float() for x0 in latents], {"psnr": psnr, "lost": error / variance, "rms": rms}


# --- denoiser -------------------------------------------------------------------------------------


def linear_loss(latents: list[Tensor], sigma: float, sigma_data: float) -> float:
    """The EDM loss of the best linear estimate for each channel, mean + var / (var + sigma^2) xt.

    Its error is var sigma^2 / (var + sigma^2), the Wiener filter's.
    """
    var_C = torch.cat(latents).var(dim=(0, 2, 3, 4))
    error = (var_C * sigma**2 / (var_C + sigma**2)).mean()
    return (edm.loss_weight(torch.tensor(sigma), sigma_data) * error).item()


class Denoiser:
    """A network and what else its loss takes: an empty text, the frame rate, fixed noise."""

    def __init__(self, net: DiT, r: Recipe) -> None:
        self.net = net
        weight = next(net.parameters())
        self.text_emb_BMD = weight.new_zeros(1, r.spec.text.tokens, r.spec.text.channels)
        self.fps_B = torch.tensor([r.spec.fps], device=weight.device)
        self.sigma_data = r.spec.sigma_data

    def loss(self, latents: list[Tensor], sigma: float, axes: tuple[int, ...] = (0, 1, 2)) -> float:
        """The mean EDM loss of latents; rotary channels of axis i turn with the axis axes[i]."""
        sigma_B = torch.full_like(self.fps_B, sigma)
        losses = []
        for seed, x0 in enumerate(latents):
            grid = patch_grid(self.net.spec, x0)
            pos_LD, _ = self.net.locate(grid, self.fps_B)
            prompt = Prompt(pos_LD, self.rope(grid, axes), self.net.read(self.text_emb_BMD))
            noise = sampler.start_noise(seed, tuple(x0.shape)).to(x0)
            denoised = edm.denoise(
                partial(self.net, prompt=prompt), x0 + sigma * noise, sigma_B,
                self.text_emb_BMD, self.fps_B, self.sigma_data,
            )  # fmt: skip
            error = (denoised - x0).square().mean()
            losses.append(edm.loss_weight(sigma_B, self.sigma_data) * error)
        return torch.cat(losses).mean().item()

    def rope(self, grid: tuple[int, int, int], axes: tuple[int, ...]) -> Rope:
        """The table of a grid turned by `axes`, its tokens back in the order (t h w)."""
        turned = tuple(grid[axis] for axis in axes)
        back = [1 + axes.index(axis) for axis in range(3)]
        cos, sin = (
            table.unflatten(1, turned).permute(0, *back, 4).flatten(1, 3)
            for table in rope_table(self.net.spec, turned, self.fps_B)
        )
        return cos, sin


def exchanged_losses(denoiser: Denoiser, latents: list[Tensor]) -> dict[str, float]:
    """The loss with each exchange; the first entry, "", is without."""
    losses = {"": denoiser.loss(latents, EXCHANGE_SIGMA)}
    changes = list(rearrangements(denoiser.net))
    with console.progress("exchanges", len(changes) + 5, "tries") as bar:
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
    """The ways in which weights could be mistaken for others, each with what to put where."""
    yield "pos_embedder.h and w", _exchange(net.pos_embedder.h, net.pos_embedder.w)
    blocks = [dict(block.named_parameters()) for block in net.blocks]
    for a, b in combinations(blocks[0], 2):
        # Without a text the cross-attention adds nothing.
        silent = a.startswith("cross_attn.") and b.startswith("cross_attn.")
        if blocks[0][a].shape == blocks[0][b].shape and not silent:
            pairs = [_exchange(block[a], block[b]) for block in blocks]
            yield f"{a} and {b} of every block", [part for pair in pairs for part in pair]
    sizes = {"t": net.spec.patch_t, "h": net.spec.patch_hw, "w": net.spec.patch_hw}
    inwards, outwards = net.x_embedder.weight, net.final.linear.weight
    for order in ("C t w h", "h w t C", "w h t C"):
        read = rearrange(inwards, f"D ({order}) -> D (C t h w)", **sizes)
        yield f"x_embedder in the order {order}", [(inwards, read)]
    for order in ("w h t C", "C t h w", "C t w h"):
        read = rearrange(outwards, f"({order}) D -> (h w t C) D", **sizes)
        yield f"final.linear in the order {order}", [(outwards, read)]


def _exchange(a: nn.Parameter, b: nn.Parameter) -> Change:
    return [(a, b.data), (b, a.data)]


@contextmanager
def replaced(change: Change) -> Iterator[None]:
    """Other values in some parameters, for a while."""
    before = [(parameter, parameter.data) for parameter, _ in change]
    for parameter, value in change:
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in before:
            parameter.data = value


def verdict(rows: list[Row], exchanged: dict[str, float]) -> str:
    """What is wrong with a denoiser, in words; empty when nothing is."""
    best = min(exchanged, key=lambda name: exchanged[name])
    linear = next(row.linear for row in rows if row.sigma == EXCHANGE_SIGMA)
    if exchanged[best] < min((1 - EXCHANGE_GAIN) * exchanged[""], linear):
        gain = 1 - exchanged[best] / exchanged[""]
        return f"reads something the wrong way: its loss falls by {gain:.0%} with {best}"
    worse = [row for row in rows if not row.model < row.linear]
    if len(worse) == len(rows):
        return "is not trained: worse than the linear estimate at every noise level"
    for row in rows:
        if not row.model < row.linear:
            return (
                f"is worse than the linear estimate at sigma {row.sigma:g}: "
                f"{row.model:.3g}, not below {row.linear:.3g}"
            )
        if row.model > row.shuffled:
            return (
                f"is better on shuffled frames at sigma {row.sigma:g}: "
                f"{row.shuffled:.3g}, in order {row.model:.3g}"
            )
    return ""
