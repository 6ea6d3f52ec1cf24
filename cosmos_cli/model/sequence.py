"""Sequence parallel: processes that share one clip, each with an equal run of its tokens.

All of the network works on a token by itself but self-attention, which needs all tokens and works
on a head by itself. Around it an all-to-all turns a slice of the tokens with all heads into all
tokens of a slice of the heads, and back.
Source: Jacobs et al. 2023, "DeepSpeed Ulysses: System Optimizations for Enabling Training of
Extreme Long Sequence Transformer Models", section 3.1.

Gradients: each process computes the loss of the whole clip, and what passes backward through an
exchange is the gradient of the sum of these equal losses. So the mean of the parameters' gradients
over all processes is the gradient of the mean loss over clips, as without sequence parallel, for
weights that see a slice of the tokens and for those that see all of them.

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
    """Entry i of the first dimension goes to process i; entry i of the result came from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dist.all_to_all_single(result, x.contiguous(), group=group)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # A gradient goes back the way its value came.
        return _Exchange.apply(gradient, ctx.group), None


@torch.compiler.disable
def _exchange(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Differentiable; compiled blocks call it as it is."""
    return _Exchange.apply(x, group)


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share a clip, and which of them this is; by default this one alone."""

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This process's slice along the dimension of the tokens."""
        return x.chunk(self.size, dim)[self.index]

    def gather(self, x_BlC: Tensor) -> Tensor:
        """The slices of all processes, BLC."""
        if self.size == 1:
            return x_BlC
        slices = _exchange(x_BlC.expand(self.size, *x_BlC.shape), self.group)
        return rearrange(slices, "S B l C -> B (S l) C")

    def to_heads(self, x_BlNK: Tensor) -> Tensor:
        """All tokens of this process's heads, BLnK."""
        if self.size == 1:
            return x_BlNK
        parts = rearrange(x_BlNK, "B l (S n) K -> S B l n K", S=self.size)
        return rearrange(_exchange(parts, self.group), "S B l n K -> B (S l) n K")

    def to_tokens(self, x_BLnK: Tensor) -> Tensor:
        """All heads of this process's tokens, BlNK."""
        if self.size == 1:
            return x_BLnK
        parts = rearrange(x_BLnK, "B (S l) n K -> S B l n K", S=self.size)
        return rearrange(_exchange(parts, self.group), "S B l n K -> B l (S n) K")


def neighbours(size: int) -> SequenceGroup:
    """This rank's among groups of `size` ranks that follow one another; every rank must call it."""
    if size == 1:
        return SequenceGroup()
    first = dist.get_rank() // size * size
    starts = range(0, dist.get_world_size(), size)
    groups = {start: dist.new_group(range(start, start + size)) for start in starts}
    return SequenceGroup(size, dist.get_rank() - first, groups[first])
