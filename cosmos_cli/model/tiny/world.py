"""The synthetic world of the tiny model: scenes with captions, rendered by code.

`scorer.py` reads the videos back. Lengths are in picture heights from the centre of the picture, x
to the right and y down. Times are in units of `DURATION` seconds.
Dimension letters: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cosmos_cli.model.tiny import trajectory
from cosmos_cli.model.tiny.trajectory import Trajectory

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (50, 170, 60),
    "teal": (0, 170, 170),
    "blue": (50, 90, 220),
    "purple": (140, 60, 200),
    "pink": (250, 130, 190),
}
SHAPES = ("robot", "ball", "cube", "star", "ring", "heart")
ROUND = ("ball", "ring")
MOTIONS = {
    "left": ("moving left", "sliding to the left"),
    "right": ("moving right", "sliding to the right"),
    "up": ("moving up", "rising"),
    "down": ("moving down", "sinking"),
    "circle": ("moving in a circle", "circling around"),
    "still": ("standing still", "not moving"),
    "grow": ("coming closer", "growing larger"),
    "rotate": ("spinning in place", "rotating"),
}
BACKGROUNDS = {
    "light": "on a light background",
    "dark": "on a dark background",
    "gradient": "in front of a soft gradient",
    "grid": "in front of a grid",
    "floor": "in a room with a plank floor",
}
# The camera moves only in front of these: on a plain background its motion would not show.
MARKED = ("grid", "floor")
CAMERAS = {"static": "", "pan": "The camera pans right.", "push": "The camera pushes in."}
LIGHTS = {"day": (1.0, ""), "dim": (0.7, "The light is dim.")}

DURATION = 1.5
TRAVEL_X, TRAVEL_Y, ORBIT = 0.7, 0.4, 0.19
PAN, PUSH = 0.1, 0.12
# The radius of things with a trajectory; they are smaller, so that there is room to move.
FREE_SIZES = (0.16, 0.2)


@dataclass(frozen=True)
class Thing:
    """An object of radius `size`; (x, y) is the middle of its track or the start of a trajectory.

    `accents` are pairs (part, colour) for the parts with a colour of their own.
    """

    shape: str
    colour: str
    size: float = 0.2
    x: float = 0.0
    y: float = 0.0
    accents: tuple[tuple[str, str], ...] = ()

    @property
    def mascot(self) -> bool:
        """True if it is the concept that post-training teaches."""
        return self.accents == MASCOT.accents


@dataclass(frozen=True)
class Scene:
    """A moving object, in some scenes with a second, smaller one that stands still.

    `motion` is a name in `MOTIONS`, or a trajectory, which the caption does not tell.
    """

    thing: Thing
    motion: str | Trajectory
    background: str = "light"
    camera: str = "static"
    light: str = "day"
    second: Thing | None = None


MASCOT_ACCENT = "yellow"
MASCOT = Thing("robot", "teal", accents=(("antenna", MASCOT_ACCENT), ("head", MASCOT_ACCENT)))
# The order matters for a dataset of 12 clips: only the first four of the eight motions occur twice.
MASCOT_MOTIONS = ("still", "circle", "grow", "rotate", "left", "right", "up", "down")


# --- scenes and captions --------------------------------------------------------------------------


def is_heldout(shape: str, colour: str, motion: str) -> bool:
    """True if training never shows this combination; each shape and colour has one such motion."""
    index = 3 * SHAPES.index(shape) + list(COLOURS).index(colour) + list(MOTIONS).index(motion)
    return index % len(MOTIONS) == 0


def sample_scene(seed: int, split: str = "train") -> Scene:
    """Return the scene of a seed; `split` is train or heldout."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is neither 'train' nor 'heldout'")
    rng = random.Random(f"{split}/{seed}")
    while True:
        kind = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(MOTIONS))
        # A round thing that spins looks as if it stood still, so it is not sampled.
        spins_unseen = kind[0] in ROUND and kind[2] == "rotate"
        if not spins_unseen and is_heldout(*kind) == (split == "heldout"):
            return _sample_details(rng, Thing(*kind[:2]), kind[2])


def concept_scenes(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Return scenes of the mascot with captions, for post-training; they cycle through motions."""
    rng = random.Random(f"concept/{seed}")
    motions = [MASCOT_MOTIONS[i % len(MASCOT_MOTIONS)] for i in range(count)]
    scenes = [_sample_details(rng, MASCOT, motion, plain=True) for motion in motions]
    return [(scene, caption(scene, seed + i)) for i, scene in enumerate(scenes)]


def ordinary_scenes(count: int, seed: int) -> list[tuple[Scene, str]]:
    """Return regularisation scenes with captions; none has a teal thing.

    Next to clips of the mascot, they keep a model from making other things look like it. Robots and
    spinning things are most at risk: every other scene has a robot, every other one of the rest
    spins.
    """
    scenes: list[tuple[Scene, str]] = []
    seeds = itertools.count(seed)
    while len(scenes) < count:
        i = next(seeds)
        scene = sample_scene(i)
        robot, turns = scene.thing.shape == MASCOT.shape, scene.motion == "rotate"
        wanted = (robot, turns and not robot, robot, True)[len(scenes) % 4]
        if wanted and scene.thing.colour != MASCOT.colour:
            scenes.append((scene, caption(scene, i)))
    return scenes


def free_scene(seed: int, split: str = "train") -> Scene:
    """Return a scene with a trajectory that stays inside the picture: a line or a circle.

    Every eighth scene for training leaves the picture, because nothing stops a thing at a border.
    """
    rng = random.Random(f"free/{split}/{seed}")
    size = rng.uniform(*FREE_SIZES)
    if seed % 2:
        return _place(rng, size, *trajectory.sample_circle(rng, size))
    leaves = split == "train" and seed % 8 == 0
    return _place(rng, size, *trajectory.sample_line(rng, size, leaves))


def bounce_scene(seed: int, split: str = "train") -> Scene:
    """Return a scene with the law that post-training teaches: a thing bounces off a border."""
    rng = random.Random(f"bounce/{split}/{seed}")
    size = rng.uniform(*FREE_SIZES)
    return _place(rng, size, *trajectory.sample_bounce(rng, size))


def _place(rng: random.Random, size: float, x: float, y: float, motion: Trajectory) -> Scene:
    thing = Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), size, x, y)
    light = rng.choice(("day", "day", "day", "dim"))
    return Scene(thing, motion, rng.choice(list(BACKGROUNDS)), light=light)


def _sample_details(rng: random.Random, thing: Thing, motion: str, plain: bool = False) -> Scene:
    """Sample the rest of a scene; a plain one has no second thing and a static camera."""
    x, y = rng.uniform(-0.18, 0.18), rng.uniform(-0.03, 0.03)
    placed = replace(thing, size=rng.uniform(0.18, 0.23), x=x, y=y)
    background = rng.choice(list(BACKGROUNDS))
    camera = rng.choice(list(CAMERAS)) if background in MARKED and not plain else "static"
    light = rng.choice(("day", "day", "day", "dim"))
    second = None
    if not plain and rng.random() < 0.25:
        colours = [colour for colour in COLOURS if colour != placed.colour]
        x = rng.choice((-1, 1)) * rng.uniform(0.5, 0.65)
        y = rng.choice((-1, 1)) * rng.uniform(0.3, 0.36)
        second = Thing(rng.choice(SHAPES), rng.choice(colours), 0.08, x, y)
    return Scene(placed, motion, background, camera, light, second)


def caption(scene: Scene, seed: int) -> str:
    """Describe the scene in one of several phrasings, which the seed chooses."""
    rng = random.Random(f"caption/{seed}")
    thing, place = scene.thing, BACKGROUNDS[scene.background]
    article = "sks" if thing.mascot else "an" if thing.colour[0] in "aeiou" else "a"
    name = f"{article} {thing.colour} {thing.shape}"
    if isinstance(scene.motion, Trajectory):
        doing = "that moves"
    else:
        doing = rng.choice(MOTIONS[scene.motion])
    if scene.second:
        place += f" next to a small {scene.second.colour} {scene.second.shape}"
    sentences = [
        f"A video of {name} {doing} {place}.",
        f"{name} is {doing} {place}.",
        f"{place}, {name} is {doing}.",
    ]
    told = not (thing.mascot or isinstance(scene.motion, Trajectory))
    chosen = rng.choice(sentences) if told else sentences[0]
    details = [CAMERAS[scene.camera], LIGHTS[scene.light][1]]
    return " ".join([chosen[0].upper() + chosen[1:], *filter(None, details)])


# --- rendering ------------------------------------------------------------------------------------


def render(scene: Scene, num_frames: int, height: int, width: int, fps: float) -> Tensor:
    """Render a scene on the CPU as uint8 (3, T, H, W)."""
    return render_batch([scene], num_frames, height, width, fps, "cpu")[0]


def render_batch(
    scenes: Sequence[Scene],
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    device: torch.device | str,
) -> Tensor:
    """Render scenes on the device with antialiased edges, as uint8 (B, 3, T, H, W)."""
    time_T = torch.arange(num_frames, device=device) / (fps * DURATION)
    y_H = ((torch.arange(height, device=device) + 0.5) / height - 0.5)[:, None]
    x_W = (torch.arange(width, device=device) + 0.5 - width / 2) / height
    # The camera shows point p of the world at (p - pan) * zoom.
    pan_BT = _column([PAN * (scene.camera == "pan") for scene in scenes], device) * time_T
    zoom_BT = _column([PUSH * (scene.camera == "push") for scene in scenes], device) * time_T + 1
    canvas = torch.empty(len(scenes), 3, num_frames, height, width, device=device)
    for name in dict.fromkeys(scene.background for scene in scenes):
        chosen = [i for i, scene in enumerate(scenes) if scene.background == name]
        pan, zoom = pan_BT[chosen][..., None, None], zoom_BT[chosen][..., None, None]
        canvas[chosen] = _background(name, x_W / zoom + pan, y_H / zoom)
    for chosen, things, motions in _groups(scenes):
        tracks = _tracks(things, motions, time_T, pan_BT[chosen], zoom_BT[chosen])
        part = canvas[chosen]
        _draw(part, things, tracks, x_W, y_H)
        canvas[chosen] = part
    light_B = _column([LIGHTS[scene.light][0] for scene in scenes], device)
    return (canvas * light_B[..., None, None, None]).round().byte()


def _column(values: list[float], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]


Motion = str | Trajectory


def _groups(scenes: Sequence[Scene]) -> Iterator[tuple[list[int], list[Thing], list[Motion]]]:
    """Yield scene numbers, things and motions, grouped by shape; second things are behind."""
    behind = [(i, scene.second, "still") for i, scene in enumerate(scenes) if scene.second]
    in_front = [(i, scene.thing, scene.motion) for i, scene in enumerate(scenes)]
    for actors in (behind, in_front):
        for shape in dict.fromkeys(thing.shape for _, thing, _ in actors):
            group = [actor for actor in actors if actor[1].shape == shape]
            yield [a[0] for a in group], [a[1] for a in group], [a[2] for a in group]


def _tracks(
    things: list[Thing], motions: list[Motion], time_T: Tensor, pan_BT: Tensor, zoom_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, y, size and angle of the things as the camera shows them, each (B, T)."""

    def amount(weights: dict[str, float]) -> Tensor:
        return _column([weights.get(motion, 0.0) for motion in motions], time_T.device)

    turn_T = 2 * math.pi * time_T
    starts = [(thing.x, thing.y, thing.size) for thing in things]
    free = [m if isinstance(m, Trajectory) else trajectory.STILL for m in motions]
    x, y = trajectory.positions(starts, free, time_T)
    x = x + amount({"left": -TRAVEL_X, "right": TRAVEL_X}) * (time_T - 0.5)
    y = y + amount({"up": -TRAVEL_Y, "down": TRAVEL_Y}) * (time_T - 0.5)
    x = x + amount({"circle": ORBIT}) * turn_T.sin()
    y = y - amount({"circle": ORBIT}) * turn_T.cos()
    growth = 1 + amount({"grow": 1.0}) * (0.75 * time_T - 0.45)
    size = _column([thing.size for thing in things], time_T.device) * growth
    return (x - pan_BT) * zoom_BT, y * zoom_BT, size * zoom_BT, amount({"rotate": 1.0}) * turn_T


def _background(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Return values in [0, 255] (B, 3, T, H, W) at the points x, y (B, T, H, W)."""
    x, y = torch.broadcast_tensors(x, y)
    pixel = 1 / x.shape[-2]

    def colour(*rgb: int) -> Tensor:
        return torch.tensor(rgb, dtype=torch.float32, device=x.device)[:, None, None, None]

    def lines(p: Tensor, spacing: float) -> Tensor:
        away = (p - spacing * (p / spacing).round()).abs()
        return (1.25 - away / pixel).clamp(0, 1)[:, None]

    if name == "gradient":
        return colour(235, 235, 245).lerp(colour(105, 110, 125), (y[:, None] + 0.5).clamp(0, 1))
    if name == "grid":
        marks = torch.maximum(lines(x, 0.2), lines(y, 0.2))
        return colour(215, 218, 222).lerp(colour(140, 145, 155), marks)
    if name == "floor":
        planks = colour(128, 120, 112).lerp(colour(88, 82, 78), lines(x, 0.25))
        return colour(205, 203, 200).lerp(planks, ((y[:, None] - 0.2) / pixel + 0.5).clamp(0, 1))
    flat = {"light": colour(228, 228, 232), "dark": colour(42, 42, 50)}[name]
    return flat.expand(len(x), -1, *x.shape[1:])


def _draw(
    canvas: Tensor, things: list[Thing], tracks: tuple[Tensor, ...], x_W: Tensor, y_H: Tensor
) -> None:
    """Draw things of one shape into a canvas (B, 3, T, H, W), in place."""
    x, y, size, angle = (track[..., None, None] for track in tracks)
    u, v = (x_W - x) / size, (y_H - y) / size
    u, v = u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()
    pixels = size * canvas.shape[-2]
    for distance, paint in _layers(things[0].shape, u, v):
        colour = torch.tensor([_colour(thing, paint) for thing in things], device=canvas.device)
        coverage = (0.5 - distance * pixels).clamp(0, 1)
        canvas.lerp_(colour[:, :, None, None, None], coverage[:, None])


def _colour(thing: Thing, paint: str) -> tuple[float, ...]:
    """Return the RGB values in [0, 255] of a part of a thing."""
    if paint in ("white", "black"):
        return (250.0, 250.0, 250.0) if paint == "white" else (25.0, 25.0, 30.0)
    body = COLOURS[thing.colour]
    if accent := dict(thing.accents).get(paint):
        return tuple(map(float, COLOURS[accent]))
    if paint == "shine":
        return tuple(0.75 * value + 0.25 * 255 for value in body)
    shades = {"body": 1.0, "head": 1.0, "top": 0.88, "antenna": 0.8, "stripe": 0.7, "side": 0.62}
    return tuple(shades[paint] * value for value in body)


# --- shapes: signed distances, negative inside, at (u, v) in units of the radius ------------------


def _layers(shape: str, u: Tensor, v: Tensor) -> list[tuple[Tensor, str]]:
    """Return the parts of a shape from back to front, each as a signed distance and a paint."""
    if shape == "robot":
        return _robot(u, v)
    if shape == "ball":
        return [(_disc(u, v, 0, 0, 1), "body"), (_disc(u, v, -0.35, -0.35, 0.25), "shine")]
    if shape == "ring":
        return [((torch.hypot(u, v) - 0.74).abs() - 0.28, "body")]
    if shape == "star":
        return [(_star(u, v), "body")]
    if shape == "heart":
        return [(_heart(u, v), "body")]
    # The cube's top and side are its front sheared by half a right angle.
    top = _box(u + v + 0.3, v, -0.3, -0.6, 0.6, 0.3)
    side = _box(u, v + u - 0.3, 0.6, 0.3, 0.3, 0.6)
    return [(top, "top"), (side, "side"), (_box(u, v, -0.3, 0.3, 0.6, 0.6), "body")]


def _disc(u: Tensor, v: Tensor, x: float, y: float, radius: float) -> Tensor:
    return torch.hypot(u - x, v - y) - radius


def _box(u: Tensor, v: Tensor, x: float, y: float, half_x: float, half_y: float) -> Tensor:
    return torch.maximum((u - x).abs() - half_x, (v - y).abs() - half_y)


def _star(u: Tensor, v: Tensor, inner: float = 0.45, tips: int = 5) -> Tensor:
    """Fold the plane into one half of a tip; its edge is a line."""
    half = math.pi / tips
    angle = ((torch.atan2(u, -v) + half) % (2 * half) - half).abs()
    radius = torch.hypot(u, v) / 1.1
    edge_x, edge_y = inner * math.sin(half), inner * math.cos(half) - 1
    across = radius * angle.sin() * -edge_y + (radius * angle.cos() - 1) * edge_x
    return across / math.hypot(edge_x, edge_y)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """Join two discs and, below each, the wedge between the disc and its tangent from the tip."""
    x, y, radius = 0.45, -0.35, 0.52
    u = u.abs()
    slope = math.atan2(1 - y, -x) - math.acos(radius / math.hypot(x, 1 - y))
    normal_x, normal_y = math.cos(slope), math.sin(slope)
    outside = normal_x * u + normal_y * (v - 1)
    above = normal_y * (u - x) - normal_x * (v - y)
    wedge = torch.maximum(torch.maximum(outside, above), y - v)
    return torch.minimum(_disc(u, v, x, y, radius), wedge)


def _robot(u: Tensor, v: Tensor) -> list[tuple[Tensor, str]]:
    side = u.abs()
    antenna = torch.minimum(_box(u, v, 0, -0.88, 0.06, 0.2), _disc(u, v, 0, -1.1, 0.18))
    return [
        (antenna, "antenna"),
        (_box(side, v, 0.74, 0.25, 0.12, 0.34), "side"),
        (_box(side, v, 0.28, 0.98, 0.17, 0.24), "side"),
        (_box(u, v, 0, -0.42, 0.5, 0.36), "head"),
        (_box(u, v, 0, 0.36, 0.56, 0.4), "body"),
        (_disc(side, v, 0.22, -0.48, 0.15), "white"),
        (_disc(side, v, 0.22, -0.48, 0.07), "black"),
        (_box(u, v, 0, -0.2, 0.24, 0.05), "black"),
        (_box(u, v, 0, 0.36, 0.56, 0.14), "stripe"),
    ]
