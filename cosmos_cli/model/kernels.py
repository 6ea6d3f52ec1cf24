"""The few operations where a faster kernel may take the place of plain PyTorch.

Every attention of the denoiser goes through `attention`: fp8 attaches there.

Dimension letters: B batch, L queries, M keys, N heads, K head width.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

# What scaled_dot_product_attention becomes, by backend; its first arguments are q and k, BNLK.
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over all keys, as BLNK."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def keep_self_attention() -> tuple[KeptAttention, KeptAttention]:
    """Contexts for `checkpoint` that keep what self-attention gave and compute the rest again.

    Attention is two thirds of a forward pass, its output one activation of a block's 34.
    """
    kept: deque[tuple[Any, ...]] = deque()
    return KeptAttention(kept, again=False), KeptAttention(kept, again=True)


class KeptAttention(TorchDispatchMode):
    """Keeps the results of self-attention in order, or `again` gives those instead of computing.

    PyTorch's own selective checkpoints want every operator to come again, which it does not with
    ZeRO-3: what gathers weights in the forward pass finds them gathered in the backward pass.
    """

    def __init__(self, kept: deque[tuple[Any, ...]], *, again: bool) -> None:
        super().__init__()
        self.kept, self.again = kept, again

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of an operator."""
        if operator not in _ATTENTION or args[0].shape[2] != args[1].shape[2]:
            return operator(*args, **(kwargs or {}))
        if self.again:
            return self.kept.popleft()
        result = operator(*args, **(kwargs or {}))
        self.kept.append(tuple(x.detach() if isinstance(x, Tensor) else x for x in result))
        return result


def attention_backend(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> str:
    """What torch computes `attention` of such tensors with: cudnn, flash, efficient or math."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    # The choice that scaled_dot_product_attention makes by itself; no public name for it.
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))
    return chosen.name.removesuffix("_ATTENTION").lower()


def causal_attention(q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> Tensor:
    """The same where query l sees keys 0..l only, as BLNK."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BLNK, v_BLNK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """X / rms(x) * weight over the last dimension, computed in fp32 and cast back once."""
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


def rotate(x_BLNK: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> Tensor:
    """Each channel pair (c, c + K/2) of x turned by its angle, computed in fp32 and cast back.

    `cos` and `sin` are fp32 with one angle per pair: (B, L, K/2).
    """
    cos, sin = cos_BLK.unsqueeze(2), sin_BLK.unsqueeze(2)
    a, b = x_BLNK.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x_BLNK)
