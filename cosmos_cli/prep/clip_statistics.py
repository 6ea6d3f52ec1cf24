"""Clip statistics: motion, hard cuts, and a fingerprint to find near-duplicates.

They are measured on small grey frames and only lead to warnings: they never reject a clip.

Dimension letters: C channels (RGB), T frames, H height, W width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Height and width of the small frames in pixels.
SIDE = 32
# A change between frames is a cut if it exceeds 16 grey levels and 6 times the median change.
CUT_LEVELS, CUT_TIMES = 16.0, 6.0
# A fingerprint has 192 bits. Clips are near-duplicates if at most 7 of them differ.
BITS, ALIKE_BITS = 192, 7
# Near-duplicates have nearly the same colours too: in none of 4 x 4 cells of the middle frame do
# red, green or blue differ by more than 16 levels. Re-encoding changes them by less than 10.
COLOUR_CELLS, ALIKE_LEVELS = 4, 16
# A clip is compared with at most this many earlier clips per piece of its fingerprint.
MOST_COMPARED = 20


class ClipStatistics(NamedTuple):
    """The statistics of a clip.

    `motion` is the mean change from frame to frame in grey levels (0 to 255). `cut` is the number
    of the frame after a hard cut. Near-duplicates have nearly the same `fingerprint` and `colours`
    (0 to 255), which earlier versions did not measure.
    """

    motion: float
    cut: int | None
    fingerprint: int
    colours: Sequence[int] = ()


def measure_clip(video_CTHW: Tensor) -> ClipStatistics:
    """Measure the statistics of uint8 frames."""
    grey = torch.cat([part.float().mean(0) for part in video_CTHW.split(8, dim=1)])
    small = F.adaptive_avg_pool2d(grey[:, None], SIDE)[:, 0]
    changes = small.diff(dim=0).abs().mean((1, 2))
    middle = video_CTHW[:, (video_CTHW.shape[1] - 1) // 2].float()
    colours = F.adaptive_avg_pool2d(middle, COLOUR_CELLS).round().int().flatten().tolist()
    if not len(changes):
        return ClipStatistics(0.0, None, _fingerprint(grey), colours)
    largest = int(changes.argmax())
    limit = max(CUT_LEVELS, CUT_TIMES * changes.median().item())
    cut = largest + 1 if changes[largest].item() > limit else None
    return ClipStatistics(changes.mean().item(), cut, _fingerprint(grey), colours)


def _fingerprint(grey_THW: Tensor) -> int:
    """Return a difference hash of the first, middle and last frame as an integer.

    Each bit says whether a cell's right neighbour is brighter. The difference must exceed one grey
    level, so that noise in flat areas does not count.
    """
    last = len(grey_THW) - 1
    cells = F.adaptive_avg_pool2d(grey_THW[[0, last // 2, last]][:, None], (8, 9))
    bits = (cells.diff(dim=-1) > 1).flatten().tolist()
    return int("".join("01"[bit] for bit in bits), 2)


def near_duplicates(clips: Mapping[str, ClipStatistics]) -> list[tuple[str, str]]:
    """Return pairs (earlier name, name) of near-duplicates, in linear time.

    Fingerprints that differ in at most 7 bits are equal in at least one of 8 pieces, so only clips
    that share a piece are compared.
    """
    width = BITS // (ALIKE_BITS + 1)
    by_piece: dict[tuple[int, int], list[str]] = defaultdict(list)
    pairs = []
    for name, clip in clips.items():
        bits = clip.fingerprint
        pieces = [(i, bits >> (i * width) & (1 << width) - 1) for i in range(ALIKE_BITS + 1)]
        earlier = dict.fromkeys(other for piece in pieces for other in by_piece[piece])
        alike = [other for other in earlier if _are_alike(clips[other], clip)]
        pairs += [(alike[0], name)] if alike else []
        for piece in pieces:
            if len(by_piece[piece]) < MOST_COMPARED:
                by_piece[piece].append(name)
    return pairs


def _are_alike(one: ClipStatistics, other: ClipStatistics) -> bool:
    if (one.fingerprint ^ other.fingerprint).bit_count() > ALIKE_BITS:
        return False
    # `zip` compares nothing if either was measured by an earlier version.
    pairs = zip(one.colours, other.colours, strict=False)
    return all(abs(a - b) <= ALIKE_LEVELS for a, b in pairs)
