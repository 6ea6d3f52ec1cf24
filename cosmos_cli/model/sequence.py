"""Sequence parallelism: the processes of a group share one clip, each with a slice of its tokens.

Every layer treats each token by itself, except self-attention, which needs all tokens but treats
each head by itself. Around self-attention an all-to-all turns a slice of the tokens with all heads
into all tokens of a slice of the heads, and back.
Source: Jacobs et al. 2023, "DeepSpeed Ulysses: System Optimizations for Enabling Training of
Extreme Long Sequence Transformer Models", section 3.1.

Gradients: each process computes the loss of the whole clip. What flows backward through an exchange
is the gradient of the sum of these equal losses. So the mean of the parameter gradients over all
processes is the gradient of the mean loss over clips, as without sequence parallelism. This holds
for weights that see a slice of the tokens and for weights that see all of them.

Dimension letters: S processes, L tokens, l = L / S of them, N heads, n = N / S of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """Sends entry i of the first dimension to process i; entry i of the result comes from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dist.all_to_all_single(result, x.contiguous(), group=group)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # An all-to-all of equal slices is its own inverse.
        return _Exchange.apply(gradient, ctx.group), None


# torch.compiler.disable would import torch's compiler here, which takes a second of CPU time.
@torch._disable_dynamo
def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-to-all with a gradient; torch.compile leaves it uncompiled."""
    return _Exchange.apply(x, group)


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share a clip, and this one's index; by default a group of one."""

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's slice of the tokens, which lie along `dim`."""
        return x.chunk(self.size, dim)[self.index]

    def gather(self, x_BlC: Tensor) -> Tensor:
        """Return the tokens of all processes, BLC."""
        if self.size == 1:
            return x_BlC
        slices = _exchange(x_BlC.expand(self.size, *x_BlC.shape), self.group)
        return rearrange(slices, "S B l C -> B (S l) C")

    def to_heads(self, x_BlNK: Tensor) -> Tensor:
        """Return all tokens of this process's heads, BLnK."""
        if self.size == 1:
            return x_BlNK
        parts = rearrange(x_BlNK, "B l (S n) K -> S B l n K", S=self.size)
        return rearrange(_exchange(parts, self.group), "S B l n K -> B (S l) n K")

    def to_tokens(self, x_BLnK: Tensor) -> Tensor:
        """Return all heads of this process's tokens, BlNK."""
        if self.size == 1:
            return x_BLnK
        parts = rearrange(x_BLnK, "B (S l) n K -> S B l n K", S=self.size)
        return rearrange(_exchange(parts, self.group), "S B l n K -> B l (S n) K")


def sequence_group(size: int) -> SequenceGroup:
    """Return this rank's group of `size` consecutive ranks; every rank must call this."""
    if size == 1:
        return SequenceGroup()
    first = dist.get_rank() // size * size
    starts = range(0, dist.get_world_size(), size)
    groups = {start: dist.new_group(range(start, start + size)) for start in starts}
    return SequenceGroup(size, dist.get_rank() - first, groups[first])
