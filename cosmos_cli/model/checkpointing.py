"""Selective activation checkpointing: choose the outputs to store for the backward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# The operators that scaled_dot_product_attention dispatches to, one per backend. Their first two
# arguments are q and k, BNLK.
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def is_self_attention(operator: Any, args: tuple[Any, ...]) -> bool:
    """True if the operator is self-attention, where keys and queries are equally many.

    It takes 2/3 of a forward pass.
    """
    return operator in _ATTENTION and args[0].shape[2] == args[1].shape[2]


def is_costly(operator: Any, args: tuple[Any, ...]) -> bool:
    """True if the operator is a linear layer or self-attention."""
    return operator is torch.ops.aten.mm.default or is_self_attention(operator, args)


def is_costly_for_its_size(operator: Any, args: tuple[Any, ...]) -> bool:
    """True if the operator is self-attention or a linear with more inputs than outputs.

    One such linear is the second of the MLP.
    """
    shrinks = operator is torch.ops.aten.mm.default and args[1].shape[0] > args[1].shape[1]
    return shrinks or is_self_attention(operator, args)


def keep(
    chosen: Callable[[Any, tuple[Any, ...]], bool], queue: Queue | None = None
) -> tuple[SelectiveCheckpoint, SelectiveCheckpoint]:
    """Return the contexts in which `checkpoint` stores the outputs of the chosen operators.

    The backward pass recomputes everything else. The outputs wait in `queue`, by default on the
    GPU.
    """
    stored = deque() if queue is None else queue
    return (
        SelectiveCheckpoint(chosen, stored, recomputing=False),
        SelectiveCheckpoint(chosen, stored, recomputing=True),
    )


class Queue(Protocol):
    """Keeps outputs until the backward pass; they leave in the order in which they came."""

    def append(self, result: Any, /) -> None: ...

    def popleft(self) -> Any: ...


class SelectiveCheckpoint(TorchDispatchMode):
    """Stores the outputs of the chosen operators; when recomputing, returns them in the same order.

    PyTorch's own selective checkpointing requires recomputation to call the same operators. Under
    ZeRO-3 it does not: weights that the forward pass gathers are still there in the backward pass.
    """

    def __init__(
        self, chosen: Callable[[Any, tuple[Any, ...]], bool], stored: Queue, *, recomputing: bool
    ) -> None:
        super().__init__()
        self.chosen, self.stored, self.recomputing = chosen, stored, recomputing

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Always True: functions may be compiled, and the mode then misses their operators."""
        return True

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        chosen = self.chosen(operator, args)
        if chosen and self.recomputing:
            return self.stored.popleft()
        result = operator(*args, **(kwargs or {}))
        if chosen:
            self.stored.append(tree_map_only(Tensor, Tensor.detach, result))
        return result
