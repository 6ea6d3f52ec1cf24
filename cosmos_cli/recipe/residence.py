"""Decide which weights and activations a GPU holds and which it streams from CPU memory. No torch.

Bytes are decimal. `room` and `free` are bytes of GPU memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosmos_cli.spec import DiTSpec

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# Block buffers on the GPU, as many as in model/streaming.py, which this may not import.
BUFFERS = 2
# Activations on the GPU that are on their way to or from CPU memory. Measured: 6.9 and 7.4.
IN_TRANSIT = 7


@dataclass(frozen=True)
class Residence:
    """Says how many blocks take their weights, and how many keep activations, in CPU memory."""

    streamed: int = 0
    stored: int = 0

    def streamed_blocks(self, blocks: int) -> list[int]:
        """Return the indices of the streamed blocks, spread evenly over the network."""
        return [place * blocks // self.streamed for place in range(self.streamed)]


def pinned_bytes(size: float) -> int:
    """Return the pinned memory that PyTorch takes for a tensor: the next power of two."""
    return 1 << max(int(size) - 1, 0).bit_length()


def streamed(dit: DiTSpec, element_size: int, room: float) -> int:
    """Return how many blocks to stream so that the weights of all blocks need at most `room`.

    Only an even number lets the two buffers alternate over the end of a pass. If not even the
    buffers fit, it is all blocks.
    """
    size = dit.block_parameters * element_size
    if room >= dit.blocks * size:
        return 0
    held = max(int(room / size) - BUFFERS, 0)
    count = dit.blocks - held
    return min(count + count % 2, dit.blocks)


def block_weights(dit: DiTSpec, element_size: int, count: int) -> float:
    """Return the bytes of GPU memory of all blocks' weights if `count` blocks are streamed."""
    buffers = BUFFERS if count else 0
    return float((dit.blocks - count + buffers) * dit.block_parameters * element_size)


def of_training(r: Recipe, activation: float, room: float) -> Residence:
    """Return what a LoRA training streams, given the room for block weights and activations.

    `activation` is the bytes of one activation (tokens x width), `room` the bytes of GPU memory for
    the weights of blocks and for what they store.
    """
    dit = r.spec.dit
    stores = activation * (1 if r.activation_checkpointing == "all" else 2)
    buffers = BUFFERS * dit.block_parameters * r.element_size
    stored = 0
    if room - buffers < dit.blocks * stores:
        held = max(int((room - buffers - IN_TRANSIT * activation) / stores), 0)
        stored = dit.blocks - held
    left = room - (dit.blocks - stored) * stores - (IN_TRANSIT * activation if stored else 0)
    return Residence(streamed(dit, r.element_size, left), stored)
