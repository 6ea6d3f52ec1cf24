"""What is used of Transformer Engine, which has no CPU, by plain PyTorch's arithmetic."""

import contextlib

import torch.nn.functional as F
from torch import nn


def autocast(enabled, recipe):
    return contextlib.nullcontext()


class Linear(nn.Linear):
    def __init__(self, inputs, outputs, bias, params_dtype, device):
        super().__init__(inputs, outputs, bias=bias, dtype=params_dtype, device=device)

    def forward(self, x):
        assert self.weight.shape == (self.out_features, self.in_features)
        return super().forward(x)


class RMSNorm(nn.RMSNorm):
    def __init__(self, width, eps, dtype, device):
        super().__init__(width, eps=eps, dtype=dtype, device=device)


class DotProductAttention(nn.Module):
    def __init__(self, heads, width, qkv_format, attn_mask_type):
        super().__init__()
        self.shape = heads, width

    def forward(self, q, k, v):
        assert q.shape[2:] == self.shape
        read = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return read.transpose(1, 2).flatten(2)
