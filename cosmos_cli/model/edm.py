"""EDM diffusion: noise levels, preconditioning, weight and loss with a learned log-variance.

Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models",
table 1 and section 5; the log-variance head of Karras et al. 2023 (EDM2), section 2.3; constants
of nvidia-cosmos/cosmos-predict1 at 4ed35fa, `diffusion/training/models/model_image.py`.

Letters: B batch, C channels, T frames, H height, W width (latent cells), M text tokens, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from cosmos_cli.spec import ModelSpec

if TYPE_CHECKING:
    from cosmos_cli.model.cond_frames import CondFrames

P_MEAN = 0.0
P_STD = 1.0
# Losses are reported in three bands of sigma between these edges: fine detail, structure, layout.
SIGMA_BANDS = (0.0, 0.5, 2.0, math.inf)
# The medians of the four quarters of the training distribution of sigma: 0.32, 0.73, 1.37, 3.16.
# The mean error over these levels estimates the mean over the distribution.
FIXED_SIGMAS = tuple(
    math.exp(NormalDist(P_MEAN, P_STD).inv_cdf(share)) for share in (0.125, 0.375, 0.625, 0.875)
)


class NoiseSample(NamedTuple):
    """The random values of one training sample."""

    sigma: float
    keep_text: bool
    noise: Tensor


def sample_noise(
    key: tuple[int, int, int], shape: tuple[int, ...], text_dropout: float
) -> NoiseSample:
    """Sample the noise level, the text dropout and the noise (fp32, CPU) of one training sample.

    They depend only on `key` = (seed, optimizer step, index of the sample in the step), so neither
    the number of processes nor an interruption changes them.
    """
    generator = keyed_generator(key)
    ln_sigma = P_MEAN + P_STD * torch.randn((), generator=generator).item()
    keep_text = torch.rand((), generator=generator).item() >= text_dropout
    return NoiseSample(math.exp(ln_sigma), keep_text, torch.randn(shape, generator=generator))


def keyed_generator(key: object) -> torch.Generator:
    """Return a CPU generator that is seeded by the repr of `key` only."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def precondition(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return c_skip, c_out, c_in and c_noise for each noise level.

    Source: Karras et al. 2022, table 1, column "Ours (EDM)".
    """
    total = sigma**2 + sigma_data**2
    c_skip = sigma_data**2 / total
    c_out = sigma * sigma_data / total.sqrt()
    c_in = 1 / total.sqrt()
    c_noise = sigma.log() / 4
    return c_skip, c_out, c_in, c_noise


def loss_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return 1 / c_out^2, which makes the loss of an untrained network 1 at every noise level.

    Source: Karras et al. 2022, table 1, lambda(sigma).
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def denoise(
    net: Callable[..., Tensor],
    xt: Tensor,
    sigma_B: Tensor,
    text_emb: Tensor,
    fps_B: Tensor,
    sigma_data: float,
) -> Tensor:
    """Estimate x0 (BCTHW, fp32) from the noised latent `xt`.

    The network runs in the dtype of `text_emb`, the arithmetic around it in fp32.
    """
    c_skip, c_out, c_in, c_noise = (
        c.view(-1, 1, 1, 1, 1) for c in precondition(sigma_B.float(), sigma_data)
    )
    net_out = net((c_in * xt).to(text_emb.dtype), c_noise.flatten(), text_emb, fps_B)
    return c_skip * xt + c_out * net_out.float()


class LogVariance(nn.Module):
    """A learned scalar v(sigma): the log of the expected loss at a noise level.

    It is a linear layer with one output on random Fourier features of c_noise. Only training uses
    it.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(features))
        self.register_buffer("phases", torch.empty(features))
        self.weight = nn.Parameter(torch.empty(1, features))
        self.reset()

    def reset(self) -> None:
        """Sample the same frequencies and phases in every process; set v to 0, a loss of 1."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.weight.zero_()
            # The device is explicit because a `torch.device` context would override the default.
            for buffer, random in ((self.freqs, torch.randn), (self.phases, torch.rand)):
                values = random(buffer.shape, generator=generator, device="cpu")
                buffer.copy_(2 * math.pi * values)

    def forward(self, c_noise_B: Tensor) -> Tensor:
        """Return the log-variance of each noise level, (B) in fp32."""
        angle = c_noise_B[:, None].float() * self.freqs.float() + self.phases.float()
        return (angle.cos() * math.sqrt(2)) @ self.weight.float()[0]


class EDMLoss(nn.Module):
    """The network and its log-variance head as one module whose forward pass is the loss."""

    def __init__(self, net: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.net = net
        self.logvar = LogVariance(spec.dit.logvar_features)
        self.sigma_data = spec.sigma_data

    def forward(
        self,
        x0: Tensor,
        sigma_B: Tensor,
        noise: Tensor,
        text_emb: Tensor,
        fps_B: Tensor,
        frames: CondFrames | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss to minimize (scalar) and the weighted EDM error of each sample (B).

        The loss is weight * |x0 - denoised|^2 * exp(-v) + v. It settles at 1 + log(error), which
        may be negative, so watch the error instead. Given `frames` count in the loss, where their
        error is 0, and not in the EDM error.
        """
        xt = x0 + sigma_B.view(-1, 1, 1, 1, 1) * noise
        text_emb = text_emb.to(next(self.net.parameters()).dtype)
        net = frames.shown_to(self.net, self.sigma_data) if frames else self.net
        denoised = denoise(net, xt, sigma_B, text_emb, fps_B, self.sigma_data)
        if frames:
            denoised = frames.restore(denoised)
        error_B = (x0 - denoised).square().mean(dim=(1, 2, 3, 4))
        edm_B = loss_weight(sigma_B, self.sigma_data) * error_B
        v_B = self.logvar(sigma_B.log() / 4)
        loss = (edm_B * torch.exp(-v_B) + v_B).mean()
        edm_B = edm_B.detach()
        return loss, edm_B / frames.generated_share if frames else edm_B
