"""Reads colour, shape and motion from the pixels of videos of the synthetic world, in closed form.

Lengths are in picture heights, as in `world.py`. Dimension letters: C channels, T frames, H height,
W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_cli.model.tiny import world

# In a rendered mascot, the area in the accent colour over the area in the body's colour.
MASCOT_OWN = 0.42
# The mascot's head counts as present if at least half of its rendered area is seen.
CONCEPT_SEEN = 0.5
# A frame shows nothing if the mask covers at most this share of the picture.
NOISE_AREA = 0.001
# Pixels with less of a colour than this share are background.
LEAST_COLOUR = 0.15
# Outlines are compared with templates at this many angles, sharp and blurred by these widths in
# pixels. A video tokenizer blurs away the gaps of a robot and the tips of a star.
ANGLES = 24
SOFTNESSES = (1, 19, 37)


@dataclass(frozen=True)
class Reading:
    """The content of a video, read from its pixels alone.

    Args:
        colour, shape, motion: names from the tables in `world.py`; "none" if nothing is seen.
        track: x, y and size (root of the area) in every frame (T, 3); NaN where nothing is seen.
        concept: from 0 to 1, how much of the mascot's head is seen, relative to its body.
    """

    colour: str
    shape: str
    motion: str
    track: Tensor
    concept: float


def measure(video_CTHW: Tensor) -> Reading:
    """Read a uint8 video: the colour that covers the most pixels, its outline and its path."""
    colour_THW = _nearest_colour(video_CTHW)
    counts = {name: int((colour_THW == i).sum()) for i, name in enumerate(world.COLOURS)}
    colour = max(counts, key=lambda name: counts[name])
    mask_THW = (colour_THW == list(world.COLOURS).index(colour)).float()
    track_T3 = _track(mask_THW)
    concept = 0.0
    if colour == world.MASCOT.colour and counts[colour]:
        accent_THW = colour_THW == list(world.COLOURS).index(world.MASCOT_ACCENT)
        head_THW = accent_THW & _near(track_T3, mask_THW)
        concept = min(1.0, float(head_THW.sum()) / counts[colour] / MASCOT_OWN)
        if concept >= CONCEPT_SEEN:
            mask_THW += head_THW
            track_T3 = _track(mask_THW)
    seen_T = mask_THW.mean((1, 2)) > NOISE_AREA
    track_T3[~seen_T] = math.nan
    if seen_T.float().mean() < 0.5:
        return Reading("none", "none", "none", track_T3, 0.0)
    shape, turns = _shape(_outlines(mask_THW[seen_T], track_T3[seen_T]))
    motion = _motion(track_T3[seen_T], turns and shape not in world.ROUND)
    return Reading(colour, shape, motion, track_T3, concept)


def track(video_CTHW: Tensor, colour: str) -> Tensor:
    """Return x and y of the thing of a colour in each frame (T, 2), NaN where it is not seen.

    It is the centroid of the pixels, weighted by how much of the colour each has. Blur keeps it,
    unlike the centroid of the pixels that are nearest to a colour.
    """
    rgb = torch.tensor(world.COLOURS[colour], dtype=torch.float32, device=video_CTHW.device)
    hue, pixels = rgb - rgb.mean(), video_CTHW.float() - video_CTHW.float().mean(0)
    along_THW = torch.einsum("cthw,c->thw", pixels, hue) / hue.square().sum()
    other_THW = (pixels - along_THW * hue[:, None, None, None]).norm(dim=0) / hue.norm()
    weight_THW = (along_THW - other_THW - LEAST_COLOUR).clamp(min=0)
    y_H, x_W = _coordinates(weight_THW)
    total_T = weight_THW.sum((1, 2))
    x_T = (weight_THW.sum(1) * x_W).sum(1) / total_T
    y_T = (weight_THW.sum(2) * y_H).sum(1) / total_T
    track_T2 = torch.stack([x_T, y_T], dim=1)
    track_T2[weight_THW.mean((1, 2)) <= NOISE_AREA] = math.nan
    return track_T2


def score(scene: world.Scene, reading: Reading) -> dict[str, bool]:
    """Return for colour, shape and motion whether the reading matches the scene."""
    return {
        "colour": reading.colour == scene.thing.colour,
        "shape": reading.shape == scene.thing.shape,
        "motion": reading.motion == scene.motion,
    }


def _nearest_colour(video_CTHW: Tensor) -> Tensor:
    """Return the index of each pixel's colour in any light, (T, H, W); -1 where it is grey."""
    brightest = video_CTHW.amax(0)
    chroma = brightest - video_CTHW.amin(0)
    coloured = (chroma > 40) & (chroma > 0.38 * brightest)
    table = torch.tensor(list(world.COLOURS.values()), device=video_CTHW.device)
    pixels = video_CTHW[:, coloured].T
    hues, targets = (F.normalize(rgb.float(), p=math.inf) for rgb in (pixels, table))
    nearest = torch.full(brightest.shape, -1, device=video_CTHW.device)
    nearest[coloured] = torch.cdist(hues, targets).argmin(1)
    return nearest


def _track(mask_THW: Tensor) -> Tensor:
    """Return centre x, y and size (root of the area) of the mask in picture heights, (T, 3)."""
    y_H, x_W = _coordinates(mask_THW)
    area_T = mask_THW.sum((1, 2)).clamp(min=1)
    x_T = (mask_THW.sum(1) * x_W).sum(1) / area_T
    y_T = (mask_THW.sum(2) * y_H).sum(1) / area_T
    return torch.stack([x_T, y_T, area_T.sqrt() / len(y_H)], dim=1)


def _near(track_T3: Tensor, mask_THW: Tensor) -> Tensor:
    """Return a mask (T, H, W) of where a head may be: within 1.25 sizes of a body's centre."""
    y_H, x_W = _coordinates(mask_THW)
    x, y, size = track_T3[..., None, None].unbind(1)
    return torch.hypot(x_W - x, y_H[:, None] - y) < 1.25 * size


def _coordinates(mask_THW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the y of the rows (H,) and the x of the columns (W,) in picture heights."""
    _, height, width = mask_THW.shape
    y_H = (torch.arange(height, device=mask_THW.device) + 0.5 - height / 2) / height
    x_W = (torch.arange(width, device=mask_THW.device) + 0.5 - width / 2) / height
    return y_H, x_W


def _outlines(mask_THW: Tensor, track_T3: Tensor) -> Tensor:
    """Crop the masks around their centres and scale them to equal areas, (T, cells * cells)."""
    _, height, width = mask_THW.shape
    x, y, size = track_T3[..., None, None].unbind(1)
    cells = ((torch.arange(32, device=mask_THW.device) + 0.5) / 16 - 1) * 0.9 * size
    grid_x, grid_y = torch.broadcast_tensors((x + cells) * height / width, y + cells.mT)
    # The coordinates of grid_sample run from -1 to 1 across the picture.
    grid = torch.stack([2 * grid_x, 2 * grid_y], dim=-1)
    return F.grid_sample(mask_THW[:, None], grid, align_corners=False).flatten(1)


@cache
def _templates() -> Tensor:
    """Return outlines of each shape, blur and angle, (shapes * blurs * angles, cells * cells)."""
    outlines = []
    for shape in world.SHAPES:
        scene = world.Scene(world.Thing(shape, "red", 0.35), "rotate")
        turning_CTHW = world.render(scene, ANGLES, 192, 192, 16.0)
        for softness in SOFTNESSES:
            mask_THW = (_nearest_colour(_blurred(turning_CTHW, softness)) == 0).float()
            outlines.append(_outlines(mask_THW, _track(mask_THW)))
    return torch.cat(outlines)


def _blurred(video_CTHW: Tensor, width: int) -> Tensor:
    """Return the mean of each pixel's neighbours in a square of odd `width` inside the picture.

    Rows are summed before columns: 2 * width values a pixel instead of width * width.
    """
    sums = []
    for values in (video_CTHW.float(), torch.ones_like(video_CTHW[:, :1], dtype=torch.float32)):
        rows = F.avg_pool2d(values, (1, width), 1, (0, width // 2), divisor_override=1)
        sums.append(F.avg_pool2d(rows, (width, 1), 1, (width // 2, 0), divisor_override=1))
    return (sums[0] / sums[1]).byte()


def _shape(outlines: Tensor) -> tuple[str, bool]:
    """Return the shape that fits the outlines best, and whether its angle changes."""
    templates = _templates().to(outlines.device)
    intersection = outlines @ templates.T
    union = outlines.square().sum(1)[:, None] + templates.square().sum(1) - intersection
    overlap = (intersection / union).unflatten(1, (len(world.SHAPES), -1))
    best = int(overlap.amax(2).mean(0).argmax())
    angle_T = overlap[:, best].argmax(1) % ANGLES
    # A spinning thing has each angle only for a moment. Any other keeps one angle, up to noise.
    return world.SHAPES[best], float((angle_T == angle_T.mode().values).float().mean()) < 0.35


def _motion(track_T3: Tensor, turns: bool) -> str:
    edge = max(1, len(track_T3) // 8)
    first, last = track_T3[:edge].mean(0), track_T3[-edge:].mean(0)
    range_x, range_y, _ = (track_T3.amax(0) - track_T3.amin(0)).tolist()
    moved_x, moved_y, _ = (last - first).tolist()
    if float(last[2] / first[2]) > 1.5:
        return "grow"
    if min(range_x, range_y) > 0.2:
        return "circle"
    if range_x > max(0.2, range_y):
        return "right" if moved_x > 0 else "left"
    if range_y > 0.2:
        return "down" if moved_y > 0 else "up"
    return "rotate" if turns else "still"
