"""Split a dataset into training and held-out videos. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosmos_cli import hashes


def choose_held_out(content: Mapping[str, str], share: float) -> set[str]:
    """Return the names of the held-out videos: about `share` of all videos.

    With a `share` above 0, at least one video is held out, and at least one is left for training.
    Videos are taken in the order of the hashes of their names, so a dataset that grows keeps most
    of its held-out videos. Videos of the same `content` are held out
    together: otherwise a run would be measured on clips that it was trained on.
    """
    copies: dict[str, list[str]] = {}
    for name in sorted(content, key=hashes.sha256_text):
        copies.setdefault(content[name], []).append(name)
    wanted = max(round(share * len(content)), 1) if share else 0
    chosen: set[str] = set()
    for names in copies.values():
        if len(chosen) < wanted and len(chosen) + len(names) < len(content):
            chosen.update(names)
    return chosen


def split_clips(manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the training clips of a dataset and the clips of its held-out videos."""
    held_out = {video["file"] for video in manifest["videos"] if video.get("split") == "heldout"}
    clips = manifest["clips"]
    return (
        [clip for clip in clips if clip["video"] not in held_out],
        [clip for clip in clips if clip["video"] in held_out],
    )


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of `count` indices, evenly spaced."""
    most = min(most, count)
    return [i * count // most for i in range(most)]


def measured_key(manifest: dict[str, Any], most: int) -> str:
    """Return a hash of the held-out clips that a training measures, at most `most`."""
    _, clips = split_clips(manifest)
    chosen = (clips[i] for i in spread(len(clips), most))
    # Datasets of early versions have no hashes.
    return hashes.sha256_text(*(f"{c['latent']} {c.get('sha256')} {c['text']}" for c in chosen))
