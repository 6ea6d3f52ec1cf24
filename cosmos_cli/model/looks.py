"""What a clip looks like in a few numbers: motion, hard cuts, a fingerprint for near-duplicates.

Everything is measured on small grey frames, for warnings alone: nothing is rejected for its looks.

Dimension letters: C channels (RGB), T frames, H height, W width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Side of the small frames in pixels.
SIDE = 32
# A cut changes the picture by more grey levels than this, and by so many times the usual change.
CUT_LEVELS, CUT_TIMES = 16.0, 6.0
# A fingerprint has so many bits; clips are alike when no more of them differ than this.
BITS, ALIKE_BITS = 192, 7
# Of many that are alike, each is compared with no more than this.
MOST_COMPARED = 20


class Look(NamedTuple):
    """Measures of a clip.

    `motion` is the mean change from frame to frame in grey levels of 0 to 255, `cut` the number of
    the frame that starts another scene, `fingerprint` what near-duplicates share.
    """

    motion: float
    cut: int | None
    fingerprint: int


def measure(video_CTHW: Tensor) -> Look:
    """The look of uint8 frames."""
    grey = torch.cat([part.float().mean(0) for part in video_CTHW.split(8, dim=1)])
    small = F.adaptive_avg_pool2d(grey[:, None], SIDE)[:, 0]
    changes = small.diff(dim=0).abs().mean((1, 2))
    if not len(changes):
        return Look(0.0, None, _fingerprint(grey))
    largest = int(changes.argmax())
    limit = max(CUT_LEVELS, CUT_TIMES * changes.median().item())
    cut = largest + 1 if changes[largest].item() > limit else None
    return Look(changes.mean().item(), cut, _fingerprint(grey))


def _fingerprint(grey_THW: Tensor) -> int:
    """Where the picture becomes brighter to the right, in first, middle and last frame.

    A step must be larger than a grey level, so that noise in what is flat does not count.
    """
    last = len(grey_THW) - 1
    cells = F.adaptive_avg_pool2d(grey_THW[[0, last // 2, last]][:, None], (8, 9))
    bits = (cells.diff(dim=-1) > 1).flatten().tolist()
    return int("".join("01"[bit] for bit in bits), 2)


def near_duplicates(fingerprints: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs of names, a later one with the earlier one that it is like, in linear time.

    Fingerprints that differ in at most 7 bits agree in at least one of 8 pieces.
    """
    width = BITS // (ALIKE_BITS + 1)
    met: dict[tuple[int, int], list[str]] = defaultdict(list)
    pairs = []
    for name, bits in fingerprints.items():
        places = [(i, bits >> (i * width) & (1 << width) - 1) for i in range(ALIKE_BITS + 1)]
        earlier = dict.fromkeys(other for place in places for other in met[place])
        like = [o for o in earlier if (fingerprints[o] ^ bits).bit_count() <= ALIKE_BITS]
        pairs += [(like[0], name)] if like else []
        for place in places:
            if len(met[place]) < MOST_COMPARED:
                met[place].append(name)
    return pairs
