"""How near made videos are to training clips: the sign of what was learned by heart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_cli.model.data import Clips
from cosmos_cli.model.heldout import spread

# Clips whose own nearest neighbour says what distance is usual.
REFERENCES = 16
# Of a larger dataset so many are looked at, which takes one process a minute or two.
MOST_CLIPS = 1000


def distances(
    latents: Sequence[Tensor], clips: Clips, part: int = 0, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """The distance from each latent to the clip nearest to it, and that from some clips to others.

    Distances are root mean squares between latents. One much below those between clips is a copy.

    Args:
        latents: made videos, (C, T, H, W), of the size of the clips.
        clips: those trained on; of many, `MOST_CLIPS` that are evenly spread.
        part: which of the clips this process looks at, of `parts` that are as many; the distance
            over all of them is the least of these.
        parts: 1 for all clips.
    """
    references = spread(len(clips), REFERENCES)
    wanted = torch.stack([*latents, *map(clips.latent, references)]).flatten(1)
    least = torch.full((len(wanted),), torch.inf)
    for index in spread(len(clips), MOST_CLIPS)[part::parts]:
        apart = (wanted - clips.latent(index).flatten()).square().mean(1).sqrt()
        if index in references:
            apart[len(latents) + references.index(index)] = torch.inf
        least = torch.minimum(least, apart)
    return least[: len(latents)], least[len(latents) :]
