"""The few operations where a faster kernel may take the place of plain PyTorch.

Every attention of the denoiser goes through `attention`: sequence parallel and fp8 attach there.

Dimension letters: B batch, L queries, M keys, N heads, K head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over all keys, as BLNK."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


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
