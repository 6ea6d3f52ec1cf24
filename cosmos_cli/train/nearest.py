"""The distance from generated videos to the nearest training clip, which reveals memorisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_cli.prep.holdout import spread
from cosmos_cli.train.data import Clips

# The usual distance is measured on this many clips, from each to its nearest neighbour.
REFERENCES = 16
# From a larger dataset only this many clips are compared. That takes one process a minute or two.
MOST_CLIPS = 1000


def distances(
    latents: Sequence[Tensor], clips: Clips, part: int = 0, parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the distance from each latent to its nearest clip, and from some clips to theirs.

    A distance is the root mean square difference of two latents. A generated video whose distance
    is far below those between clips is a copy.

    Args:
        latents: the generated videos, (C, T, H, W), of the size of the clips.
        clips: the training clips; at most `MOST_CLIPS` of them, evenly spaced, are compared.
        part: the part of the clips, of `parts`, that this process compares. The minimum over the
            parts is the distance to all clips.
        parts: 1 to compare all clips in this process.
    """
    references = spread(len(clips), REFERENCES)
    queries = torch.stack([*latents, *map(clips.latent, references)]).flatten(1)
    nearest = torch.full((len(queries),), torch.inf)
    for index in spread(len(clips), MOST_CLIPS)[part::parts]:
        distance = (queries - clips.latent(index).flatten()).square().mean(1).sqrt()
        if index in references:
            # A clip is not its own neighbour.
            distance[len(latents) + references.index(index)] = torch.inf
        nearest = torch.minimum(nearest, distance)
    return nearest[: len(latents)], nearest[len(latents) :]
