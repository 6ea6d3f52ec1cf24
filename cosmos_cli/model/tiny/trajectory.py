"""Motion that a caption does not tell: lines, circles and bounces with random numbers.

A model cannot know it from the text. It must read it from the frames that it is given.
Lengths and times are in the units of `world.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# The borders of a picture of 5:3, the format of the tiny model.
BORDER_X, BORDER_Y = 5 / 6, 1 / 2
LARGEST_SPEED = (0.45, 0.3)
SMALLEST_SPEED = 0.1
RADII = (0.1, 0.18)
# Bounces are sampled so that the first one is in this part of the clip: a model that is given 9 of
# 25 frames sees only the straight motion before.
FIRST_BOUNCE = (0.4, 0.7)
# A slower thing would hardly leave the border again.
SMALLEST_BOUNCE_SPEED = 0.2


@dataclass(frozen=True)
class Trajectory:
    """The motion of a thing from (x, y), its position at time 0 or the centre of its circle.

    Args:
        velocity: in x and y.
        radius, phase, turns: the circle, its angle at time 0 in turns, and turns per unit of time,
            negative for anticlockwise.
        walls: whether the thing bounces off the borders. Otherwise it leaves the picture.
    """

    velocity: tuple[float, float] = (0.0, 0.0)
    radius: float = 0.0
    phase: float = 0.0
    turns: float = 0.0
    walls: bool = False

    def __str__(self) -> str:
        return "bounce" if self.walls else "circle" if self.radius else "line"


STILL = Trajectory()


def positions(
    starts: Sequence[tuple[float, float, float]], motions: Sequence[Trajectory], time_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x and y, each (B, T), of things that start at (x, y) with radius `size`."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=time_T.device)[:, None]

    angle = column([m.turns for m in motions]) * time_T + column([m.phase for m in motions])
    radius = column([m.radius for m in motions])
    walls = column([m.walls for m in motions]) > 0
    size = column([start[2] for start in starts])
    result = []
    for axis, border, wave in ((0, BORDER_X, torch.cos), (1, BORDER_Y, torch.sin)):
        travel = column([m.velocity[axis] for m in motions]) * time_T
        p = column([start[axis] for start in starts]) + travel + radius * wave(math.tau * angle)
        result.append(torch.where(walls, reflect(p, border - size), p))
    return result[0], result[1]


def reflect(p: Tensor, limit: Tensor) -> Tensor:
    """Fold a position that grows without end into [-limit, limit], as mirrors would."""
    return limit - ((p + limit) % (4 * limit) - 2 * limit).abs()


def sample_line(rng: random.Random, size: float, leaves: bool) -> tuple[float, float, Trajectory]:
    """Return a start inside the picture and a line that stays inside, or one that leaves."""
    while True:
        x, y, velocity = _start(rng, size)
        room = _room((x, y), velocity, size)
        if leaves == (room < 1):
            return x, y, Trajectory(velocity)


def sample_circle(rng: random.Random, size: float) -> tuple[float, float, Trajectory]:
    """Return the centre of a circle inside the picture, and the motion: one turn, clockwise."""
    radius = rng.uniform(*RADII)
    x, y = (rng.uniform(-1, 1) * (b - size - radius) for b in (BORDER_X, BORDER_Y))
    return x, y, Trajectory(radius=radius, phase=rng.random(), turns=1.0)


def sample_bounce(rng: random.Random, size: float) -> tuple[float, float, Trajectory]:
    """Return a start and a motion to the left or right whose first bounce is in `FIRST_BOUNCE`.

    12 clips of bounces in all directions are too few: 100 steps of all weights lowered the tiny
    model's error by only an eighth.
    """
    low, high = FIRST_BOUNCE
    while True:
        x, y, (speed, _) = _start(rng, size)
        velocity = (speed, 0.0)
        if abs(speed) >= SMALLEST_BOUNCE_SPEED and low < _room((x, y), velocity, size) < high:
            return x, y, Trajectory(velocity, walls=True)


def _start(rng: random.Random, size: float) -> tuple[float, float, tuple[float, float]]:
    x, y = (rng.uniform(-1, 1) * (border - size) for border in (BORDER_X, BORDER_Y))
    while True:
        velocity = (rng.uniform(-1, 1) * LARGEST_SPEED[0], rng.uniform(-1, 1) * LARGEST_SPEED[1])
        if math.hypot(*velocity) >= SMALLEST_SPEED:
            return x, y, velocity


def _room(start: tuple[float, float], velocity: tuple[float, float], size: float) -> float:
    """Return the time at which a thing that starts inside touches a border."""
    borders = (BORDER_X - size, BORDER_Y - size)
    return min(
        (math.copysign(border, v) - p) / v if v else math.inf
        for p, v, border in zip(start, velocity, borders, strict=True)
    )
