"""Scores of a video's pixels that need no model.

y is the luminance in [0, 1], of T frames. Dimension letters: C channels, T frames, H height,
W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_cli.model.rgb import LUMINANCE


def luminance(video_CTHW: Tensor) -> Tensor:
    """Return the luminance in [0, 1] of a uint8 video, THW."""
    weight = torch.tensor(LUMINANCE, device=video_CTHW.device)
    return torch.einsum("cthw,c->thw", video_CTHW.float() / 255, weight)


def saturation(video_CTHW: Tensor) -> float:
    """Return how colourful a uint8 video is: the mean of max - min over RGB, from 0 to 1."""
    return float((video_CTHW.amax(0).float() - video_CTHW.amin(0).float()).mean() / 255)


def frame_consistency(y_THW: Tensor) -> float:
    """Return the mean correlation of successive frames: mean_t corr(y[t], y[t+1])."""
    centred = y_THW.flatten(1) - y_THW.mean((1, 2))[:, None]
    # The correlation of a frame without contrast is 0.
    unit = F.normalize(centred, dim=1)
    return float((unit[1:] * unit[:-1]).sum(1).mean())


def flicker(y_THW: Tensor) -> float:
    """Return how much brightness alternates: mean |y[t-1] - 2 y[t] + y[t+1]| / 4.

    It is the amplitude of a brightness that rises and falls with every frame, and 0 for a fade.
    """
    return float(y_THW.diff(n=2, dim=0).abs().mean() / 4)


def motion_amount(y_THW: Tensor) -> float:
    """Return the mean speed of edges in pixels per frame: sum |dy/dt| / sum |grad y|."""
    change = y_THW.diff(dim=0).abs().mean()
    edges = _gradient(y_THW).mean()
    return float(change / edges) if edges else 0.0


def sharpness(y_THW: Tensor) -> float:
    """Return how abrupt edges are, in 1 / pixel: sum |laplacian y| / sum |grad y|.

    Unlike the variance of the Laplacian, it does not depend on the contrast or number of edges.
    """
    kernel = y_THW.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    laplacian = F.conv2d(y_THW[:, None], kernel[None, None]).abs().mean()
    edges = _gradient(y_THW).mean()
    return float(laplacian / edges) if edges else 0.0


def _gradient(y_THW: Tensor) -> Tensor:
    """Return the length of the gradient, (T, H - 1, W - 1)."""
    return torch.hypot(y_THW.diff(dim=1)[:, :, :-1], y_THW.diff(dim=2)[:, :-1])


SCORES: dict[str, Callable[[Tensor], float]] = {
    "frame consistency": frame_consistency,
    "flicker": flicker,
    "motion amount": motion_amount,
    "sharpness": sharpness,
}
# What each score means, and which direction is better.
MEANINGS = {
    "frame consistency": (
        "mean correlation of successive frames' luminance; a still video has 1, so read it with "
        "the motion amount", "higher",
    ),
    "flicker": (
        "mean |y[t-1] - 2 y[t] + y[t+1]| / 4 of the luminance y from 0 to 1; 0 for a fade", "lower",
    ),
    "motion amount": (
        "speed of edges in pixels per frame: sum of |dy/dt| over sum of |grad y|", "",
    ),
    "sharpness": (
        "abruptness of edges in 1 / pixel: sum of |laplacian y| over sum of |grad y|; noise raises "
        "it too", "higher",
    ),
}  # fmt: skip


def names(frames: int) -> list[str]:
    """Return the scores of a video with this number of frames; a picture has only sharpness."""
    return list(SCORES) if frames > 2 else ["sharpness"]


def measure_video(video_CTHW: Tensor) -> dict[str, float]:
    """Return each score of a uint8 video (3, T, H, W)."""
    y_THW = luminance(video_CTHW)
    return {name: SCORES[name](y_THW) for name in names(len(y_THW))}
