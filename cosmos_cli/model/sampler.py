"""Sample latents: noise schedules, solvers and classifier-free guidance.

A denoiser maps (xt BCTHW fp32, sigma float) to an estimate of x0. The solver state stays in fp32.
Source: Karras et al. 2022, equations 3 and 5; the second-order multistep exponential solver of
Zhang et al. 2023, "Improved Order Analysis and Design of Exponential Integrator for Diffusion
Models Sampling"; constants of nvidia-cosmos/cosmos-predict1 at 4ed35fa.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from cosmos_cli.spec import FAST_EXTRAPOLATION, FAST_GUIDED_ABOVE, FAST_LOG_SIGMAS, ModelSpec

RHO = 7.0
# The reference's RES sampler ends at this sigma and ignores the model's sigma_min.
RES_SIGMA_MIN = 0.002

Denoiser = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int], None]


class SamplingKeys(Protocol):
    """Name the keys of a recipe that `sample` reads."""

    spec: ModelSpec
    sampler: str
    num_steps: int
    speed: str
    guidance: float


def karras_sigmas(count: int, sigma_min: float, sigma_max: float) -> list[float]:
    """Return `count` noise levels from sigma_max down to sigma_min, both included.

    Source: Karras et al. 2022, equation 5, rho = 7.
    """
    if count == 1:
        return [sigma_max]
    low, high = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    levels = [(high + i / (count - 1) * (low - high)) ** RHO for i in range(count)]
    return [sigma_max, *levels[1:-1], sigma_min]


def euler_sigmas(num_steps: int, sigma_min: float, sigma_max: float) -> list[float]:
    """Return the noise levels for `euler`: num_steps levels, then 0."""
    return [*karras_sigmas(num_steps, sigma_min, sigma_max), 0.0]


def res_sigmas(num_steps: int, sigma_max: float) -> list[float]:
    """Return the num_steps + 1 noise levels for `res`."""
    return karras_sigmas(num_steps + 1, RES_SIGMA_MIN, sigma_max)


def guide(passes: Callable[..., Sequence[Tensor]], guidance: float) -> Callable[..., Tensor]:
    """Return a function that guides `passes`: cond + guidance * (cond - uncond).

    `passes` returns the results of the conditional and the unconditional pass, or of the first
    alone, which is then the result. They may be network outputs or estimates of x0, because
    preconditioning is linear.
    """

    def guided(*inputs: Tensor) -> Tensor:
        cond, *uncond = (result.float() for result in passes(*inputs))
        return cond + guidance * (cond - uncond[0]) if uncond else cond

    return guided


def is_guided(settings: SamplingKeys, c_noise_B: Tensor) -> bool:
    """True if a step at c_noise = log(sigma) / 4 needs the unconditional pass.

    Guidance adds little at low noise levels. `speed: fast` leaves it out there.
    Source: Kynkäänniemi et al. 2024, Applying Guidance in a Limited Interval.
    """
    if settings.speed == "fast" and 4 * c_noise_B[0].item() <= FAST_GUIDED_ABOVE:
        return False
    return settings.guidance > 0


def euler(denoiser: Denoiser, noise: Tensor, sigmas: list[float], on_step: OnStep) -> Tensor:
    """Solve for x0 with first-order steps down `sigmas`, starting from unit `noise`.

    The start is noise * sqrt(sigma_max^2 + 1), as in the reference. The denoiser is called
    len(sigmas) - 1 times.
    Source: Karras et al. 2022, equation 3 with dt = dsigma.
    """
    x = noise.float() * math.sqrt(sigmas[0] ** 2 + 1)
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        slope = (x - denoiser(x, sigma)) / sigma
        x = x + slope * (following - sigma)
        on_step(i)
    return x


def res(
    denoiser: Denoiser,
    noise: Tensor,
    sigmas: list[float],
    on_step: OnStep,
    extrapolation: float = 1.0,
) -> Tensor:
    """Solve for x0 with the second-order multistep solver "2ab", starting from unit `noise`.

    The denoiser is called once per level, len(sigmas) times. Its output at sigmas[-1] is the
    result. Between two levels, the estimate of x0 is extrapolated from the last two, linearly in
    log sigma. With `extrapolation` 0 the last one is kept, as by Euler's method.
    """
    x = noise.float() * sigmas[0]
    previous: tuple[float, Tensor] | None = None
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoiser(x, sigma)
        x = _res_step(x, denoised, sigma, following, previous, extrapolation)
        previous = (sigma, denoised)
        on_step(i)
    result = denoiser(x, sigmas[-1])
    on_step(len(sigmas) - 1)
    return result


def _res_step(
    x: Tensor,
    denoised: Tensor,
    sigma: float,
    following: float,
    previous: tuple[float, Tensor] | None,
    extrapolation: float,
) -> Tensor:
    h = math.log(sigma / following)
    decay = math.exp(-h)
    if previous is None:
        return (1 - decay) * denoised + decay * x
    phi1 = -math.expm1(-h) / h
    phi2 = (1 - phi1) / h
    b2 = extrapolation * phi2 / (math.log(sigma / previous[0]) / h)
    return decay * x + h * ((phi1 - b2) * denoised + b2 * previous[1])


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    settings: SamplingKeys,
    on_step: OnStep,
) -> Tensor:
    """Sample x0 (BCTHW, fp32) from unit `noise`; `denoise` maps (xt, sigma_B) to its estimate.

    Raises:
        ValueError: there is no such solver.
    """
    solver, steps, spec = settings.sampler, settings.num_steps, settings.spec

    def denoiser(xt: Tensor, sigma: float) -> Tensor:
        return denoise(xt, torch.full((len(xt),), sigma, device=xt.device))

    if settings.speed == "fast":
        sigmas = [math.exp(level) for level in FAST_LOG_SIGMAS]
        return res(denoiser, noise, sigmas, on_step, FAST_EXTRAPOLATION)
    if solver == "euler":
        sigmas = euler_sigmas(steps, spec.sigma_min, spec.sigma_max)
        return euler(denoiser, noise, sigmas, on_step)
    if solver == "res":
        return res(denoiser, noise, res_sigmas(steps, spec.sigma_max), on_step)
    raise ValueError(f"solver {solver!r} is neither euler nor res")


def start_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return unit noise (fp32, CPU) that depends only on the seed, not on device or batch."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
