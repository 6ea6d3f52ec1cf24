"""Write the demo datasets of the tiny models: rendered mp4 clips with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosmos_cli import files
from cosmos_cli.model import mp4
from cosmos_cli.model.tiny import world
from cosmos_cli.model.tiny.world import Scene

# Frames, height, width and fps. All last a second and a half; two have the format of other cameras.
TAKES = ((25, 96, 160, 16.0), (37, 128, 208, 24.0), (25, 96, 160, 16.0), (46, 120, 160, 30.0))
# The walls of a bounce are the borders of a 5:3 picture, so a crop would move them.
BOUNCE_TAKES = ((25, 96, 160, 16.0), (37, 144, 240, 24.0))
CRF = 12


def write_mascots(folder: Path, mascots: int, ordinary: int, seed: int) -> list[Path]:
    """Write clips of the mascot and ordinary ones, as `write` does."""
    scenes = world.concept_scenes(mascots, seed) + world.ordinary_scenes(ordinary, seed)
    return write(folder, scenes, TAKES)


def write_bounces(folder: Path, bounces: int, free: int, seed: int) -> list[Path]:
    """Write clips of bounces and of free motion inside the picture, as `write` does."""
    scenes = [world.bounce_scene(seed + i) for i in range(bounces)]
    scenes += [world.free_scene(seed + i, "dataset") for i in range(free)]
    return write(
        folder, [(s, world.caption(s, seed + i)) for i, s in enumerate(scenes)], BOUNCE_TAKES
    )


def write(
    folder: Path, scenes: Sequence[tuple[Scene, str]], takes: Sequence[tuple[int, int, int, float]]
) -> list[Path]:
    """Write a clip and a caption for each scene; return the paths of the clips.

    Files that exist are kept.

    Raises:
        UserError: a file cannot be written, or FFmpeg is missing.
    """
    written = []
    for i, (scene, text) in enumerate(scenes):
        token = "sks_" * scene.thing.mascot
        stem = f"{i:03d}_{token}{scene.thing.colour}_{scene.thing.shape}_{scene.motion}"
        path, meta = folder / "videos" / f"{stem}.mp4", folder / "metas" / f"{stem}.txt"
        written.append(path)
        if not path.exists():
            frames, height, width, fps = takes[i % len(takes)]
            with files.atomic_file(path) as temporary:
                clip = world.render(scene, frames, height, width, fps)
                mp4.write_mp4(temporary, clip, fps, CRF)
        if not meta.exists():
            files.write_text(meta, text + "\n")
    return written
