"""Video2World: the frames that a clip or a video is given, and how the denoiser is told of them.

The first latent frames of a sample are given. On these frames the network's input is the given
latent with little noise instead of xt, and an additional input channel is 1. The estimate of x0 is
replaced by the given latent.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, `diffusion/training/models/extend_model.py`;
diffusers 0.42, `CosmosVideoToWorldPipeline`, for sampling.

Letters: B batch, C channels, T frames, H height, W width (latent cells).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cosmos_cli.model import edm
from cosmos_cli.spec import DiTSpec

# The numbers of given latent frames in training, all equally likely.
COUNTS = (0, 1, 2)
# ln of the noise level that training adds to the given frames is normal.
AUG_MEAN, AUG_STD = -3.0, 2.0
# The median, for errors on held-out clips.
AUG_MEDIAN = math.exp(AUG_MEAN)
# The noise level of the given frames in sampling.
SAMPLING_SIGMA = 0.001

Network = Callable[..., Tensor]


@dataclass(frozen=True)
class CondFrames:
    """The given latent frames of a batch.

    Args:
        x0: latents BCTHW, of which only the given frames are read.
        mask: bool B1T11, true on the given frames; the additional input channel.
        fixed: bool B1T11, true on the frames that replace xt and the estimate in this step.
        sigma_B: the noise level that the network sees the given frames with.
        noise: the noise of the given frames, BCTHW.
    """

    x0: Tensor
    mask: Tensor
    fixed: Tensor
    sigma_B: Tensor
    noise: Tensor

    @classmethod
    def of(cls, x0: Tensor, count_B: Tensor, sigma_B: Tensor, noise: Tensor) -> CondFrames:
        """Return the first `count_B` latent frames of each sample as its given frames."""
        frame_T = torch.arange(x0.shape[2], device=x0.device)
        mask = (frame_T < count_B[:, None])[:, None, :, None, None]
        return cls(x0, mask, mask, sigma_B, noise)

    def at(self, sigma_B: Tensor) -> CondFrames:
        """Return the same for a sampling step at noise level `sigma_B`.

        Once the video has as little noise as the given frames, they are denoised with the rest.
        """
        above_B = sigma_B > self.sigma_B
        return replace(self, fixed=self.mask & above_B.view(-1, 1, 1, 1, 1))

    def shown_to(self, net: Network, sigma_data: float) -> Network:
        """Return `net` as a network for c_in * xt, which adds the given frames and their mask."""
        sigma = self.sigma_B.float().view(-1, 1, 1, 1, 1)
        _, _, c_in, _ = edm.precondition(sigma, sigma_data)
        given = c_in * (self.x0 + sigma * self.noise)

        def told(x: Tensor, *rest: Tensor) -> Tensor:
            x = torch.where(self.fixed, given.to(x.dtype), x)
            told_B1THW = self.mask.to(x.dtype).expand(-1, -1, -1, *x.shape[-2:])
            return net(torch.cat((x, told_B1THW), dim=1), *rest)

        return told

    def restore(self, denoised: Tensor) -> Tensor:
        """Return the estimate of x0 with the true latents of the given frames."""
        return torch.where(self.fixed, self.x0, denoised)

    @property
    def generated_share(self) -> Tensor:
        """The share of each sample's latent frames that are not given, (B)."""
        return 1 - self.fixed.float().mean(dim=(1, 2, 3, 4))


def sample_given(key: tuple[int, int, int], shape: tuple[int, ...]) -> tuple[int, float, Tensor]:
    """Sample the number of given latent frames, their noise level and noise (CPU) of one sample.

    They depend only on `key`, as in `edm.sample_noise`, whose values they leave as they are.
    """
    generator = edm.keyed_generator((*key, "given frames"))
    count = COUNTS[int(torch.randint(len(COUNTS), (), generator=generator))]
    ln_sigma = AUG_MEAN + AUG_STD * torch.randn((), generator=generator).item()
    return count, math.exp(ln_sigma), torch.randn(shape, generator=generator)


def stack(samples: list[tuple[int, float, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the values that `sample_given` sampled for a batch as tensors."""
    counts, sigmas, noises = zip(*samples, strict=True)
    return torch.tensor(counts), torch.tensor(sigmas), torch.stack(noises)


def for_sampling(x0_BCTHW: Tensor, frames: int, seeds: list[int]) -> CondFrames:
    """Return the given frames of videos of `frames` latent frames, one for each of `seeds`.

    `x0_BCTHW` holds the given frames alone. A video has the same noise at every step and pass, so
    the passes of guidance can share the first self-attention.
    """
    batch, channels, given, *size = x0_BCTHW.shape
    x0 = x0_BCTHW.new_zeros(batch, channels, frames, *size)
    x0[:, :, :given] = x0_BCTHW
    noises = [
        torch.randn(x0.shape[1:], generator=edm.keyed_generator((seed, "given frames")))
        for seed in seeds
    ]
    count_B = torch.full((batch,), given, device=x0.device)
    sigma_B = torch.full((batch,), SAMPLING_SIGMA, device=x0.device)
    return CondFrames.of(x0, count_B, sigma_B, torch.stack(noises).to(x0.device))


def add_mask_columns(state: dict[str, Tensor], spec: DiTSpec) -> str:
    """Give the weights of a Text2World model, in `state`, zero columns for the mask.

    A patch is (C dt dh dw), so they go between the columns of the latent and of the padding mask.
    Return a remark for people, or "" if the weights or the model need no such columns.
    """
    cells = spec.patch_t * spec.patch_hw**2
    missing = spec.cond_channels * cells
    weight_DC = state.get("net.x_embedder.weight")
    if not missing or weight_DC is None or weight_DC.shape[-1] != spec.patch_inputs - missing:
        return ""
    latent, padding = weight_DC.split((spec.patch_channels, cells), dim=1)
    zeros = weight_DC.new_zeros(len(weight_DC), missing)
    state["net.x_embedder.weight"] = torch.cat((latent, zeros, padding), dim=1)
    return (
        "the weights are of a Text2World model: the columns that tell the network which frames "
        "are given start at zero"
    )
