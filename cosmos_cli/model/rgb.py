"""Resize and convert frames that are in memory: uint8 or [-1, 1]."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

RESIZE_MODES = ("stretch", "crop", "pad")
# ITU-R BT.709.
LUMINANCE = (0.2126, 0.7152, 0.0722)
# The PSNR of equal frames is infinite; it counts as this many dB.
MOST_PSNR = 99.0


def resize_frames(
    frames: Tensor, height: int, width: int, mode: str, pixel_aspect: float = 1.0
) -> Tensor:
    """Resize uint8 frames to (..., ..., height, width); the first two dimensions may be CT or TC.

    stretch: ignore the aspect ratio. crop: scale to cover and keep the centre. pad: scale to fit
    and add black bars. `pixel_aspect` is the width of a pixel over its height.

    Source: stretch is cosmos-predict1 `training/datasets/dataset_video.py`, bilinear with
    antialiasing. The reference truncates to uint8 and loses half a level; we round.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize {mode!r} is not one of {RESIZE_MODES}")
    old_height, old_width = frames.shape[-2], frames.shape[-1] * pixel_aspect
    if mode == "stretch":
        return _interpolate(frames, height, width)
    if mode == "crop":
        scale = max(height / old_height, width / old_width)
        scaled = _interpolate(
            frames, max(height, round(old_height * scale)), max(width, round(old_width * scale))
        )
        top, left = (scaled.shape[-2] - height) // 2, (scaled.shape[-1] - width) // 2
        return scaled[..., top : top + height, left : left + width]
    scale = min(height / old_height, width / old_width)
    new_height = min(height, max(1, round(old_height * scale)))
    new_width = min(width, max(1, round(old_width * scale)))
    top, left = (height - new_height) // 2, (width - new_width) // 2
    margins = (left, width - new_width - left, top, height - new_height - top)
    return F.pad(_interpolate(frames, new_height, new_width), margins)


def to_model(video: Tensor) -> Tensor:
    """Convert uint8 of any shape to float32 in [-1, 1]. Source: cosmos-predict1, u8 / 127.5 - 1."""
    return video.float() / 127.5 - 1


def to_uint8(video: Tensor) -> Tensor:
    """Convert [-1, 1] of any shape to uint8; the exact inverse of `to_model`.

    The reference truncates and loses half a level on average; we round.
    """
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the PSNR of two uint8 tensors in dB, `MOST_PSNR` if they are equal."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else MOST_PSNR


def frame_psnr(a_CTHW: Tensor, b_CTHW: Tensor) -> Tensor:
    """Return the PSNR of each frame of two uint8 videos in dB, (T), at most `MOST_PSNR`."""
    error_T = (a_CTHW.float() - b_CTHW.float()).square().mean((0, 2, 3)) / 255**2
    return (-10 * error_T.log10()).clamp(max=MOST_PSNR)


def ssim(a_CTHW: Tensor, b_CTHW: Tensor) -> float:
    """Return the mean of `frame_ssim` over the frames."""
    return frame_ssim(a_CTHW, b_CTHW).mean().item()


def frame_ssim(a_CTHW: Tensor, b_CTHW: Tensor) -> Tensor:
    """Return the SSIM of the luminance of each frame of two uint8 videos, (T), 1 if equal.

    Source: Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural
    Similarity", equation 13, with a Gaussian window of 11x11 pixels and standard deviation 1.5.
    """
    bell = torch.exp(-(torch.arange(-5.0, 6) ** 2) / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    frames = []
    for pair in zip(a_CTHW.unbind(1), b_CTHW.unbind(1), strict=True):
        a, b = (torch.einsum("chw,c->hw", x.float(), torch.tensor(LUMINANCE)) for x in pair)
        stack = torch.stack((a, b, a * a, b * b, a * b))[:, None]
        mean_a, mean_b, aa, bb, ab = F.conv2d(stack, window)[:, 0]
        var_a, var_b, cov = aa - mean_a**2, bb - mean_b**2, ab - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        frames.append((luminance * (2 * cov + c2) / (var_a + var_b + c2)).mean())
    return torch.stack(frames)


def contact_sheet(
    video_CTHW: Tensor, columns: int = 4, rows: int = 2, width: int = 320
) -> Image.Image:
    """Return a grid of evenly spaced frames, first and last included, each `width` pixels wide."""
    _, frames, height, old_width = video_CTHW.shape
    chosen = torch.linspace(0, frames - 1, columns * rows).round().long()
    cell_height = max(1, round(height * width / old_width))
    cells = resize_frames(video_CTHW[:, chosen].cpu(), cell_height, width, "stretch")
    grid = cells.unflatten(1, (rows, columns)).permute(1, 3, 2, 4, 0)
    return Image.fromarray(grid.reshape(rows * cell_height, columns * width, 3).numpy())


def _interpolate(frames: Tensor, height: int, width: int) -> Tensor:
    if frames.shape[-2:] == (height, width):
        return frames
    if frames.is_cuda:
        return interpolate_exactly(frames, height, width)
    # uint8 is twenty times as fast as floats and off by about one level at most.
    return F.interpolate(
        frames, (height, width), mode="bilinear", antialias=True, align_corners=False
    )


def interpolate_exactly(frames: Tensor, height: int, width: int) -> Tensor:
    """Interpolate uint8 frames on any device, bit for bit like PyTorch's uint8 kernel on a CPU.

    PyTorch has no such kernel for GPUs. Columns are resized before rows, each rounded to uint8. The
    sums are computed in float64, where they are exact.

    Source: PyTorch, `aten/src/ATen/native/cpu/UpSampleKernel.cpp`.
    """
    for dim, size in ((-1, width), (-2, height)):
        if frames.shape[dim] != size:
            weights, one = _integer_weights(frames.shape[dim], size)
            weights = weights.to(frames.device)
            # Frame by frame, because float64 takes eight times the memory of uint8.
            sums = (frame.transpose(dim, -1).double() @ weights for frame in frames)
            rounded = [(s / one + 0.5).floor().clamp(0, 255).to(torch.uint8) for s in sums]
            frames = torch.stack(rounded).transpose(dim, -1)
    return frames


@lru_cache(maxsize=8)
def _integer_weights(old: int, new: int) -> tuple[Tensor, int]:
    """Return integer weights (old, new) of the antialiased bilinear filter, and the value of 1.0.

    The largest weight has 15 bits.
    """
    scale = old / new
    radius = max(scale, 1.0)
    centres = scale * (torch.arange(new, dtype=torch.float64) + 0.5)
    pixels = torch.arange(old, dtype=torch.float64)[:, None] + 0.5
    weights = (1 - (pixels - centres).abs() / radius).clamp(min=0)
    weights /= weights.sum(0)
    largest, bits = weights.max().item(), 0
    while bits < 22 and int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    return (weights * 2**bits + 0.5).floor(), 2**bits
