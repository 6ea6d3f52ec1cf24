"""The few operations that can run on a faster kernel than plain PyTorch.

The denoiser calls `attention` for every attention, and the functions that `fuse` compiles for the
element-wise work between its linears.

Dimension letters: B batch, L queries, M keys, D width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Compute capabilities where cuDNN attention is twice as fast as FlashAttention 2: Hopper and
# data-center Blackwell.
CUDNN_FIRST = ((9, 0), (10, 0))

# With wider heads than this, a GPU's fused attention no longer accumulates in registers.
MAX_FUSED_WIDTH = 256


def attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v over all keys, BLNK."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def wide_attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """Return `attention` for a single head of any width.

    The fused kernels of a GPU are slow for heads of more than 256 channels. There the scores of one
    sample at a time are materialised in fp32: 0.8 GB for a frame of 704x1280.
    """
    width = q_BLNK.shape[-1]
    if not q_BLNK.is_cuda or width <= MAX_FUSED_WIDTH:
        return attention(q_BLNK, k_BMNK, v_BMNK)
    q_BLK, k_BMK, v_BMK = (x.squeeze(2) for x in (q_BLNK * width**-0.5, k_BMNK, v_BMNK))
    outputs = []
    for q, k, v in zip(q_BLK, k_BMK, v_BMK, strict=True):
        scores_LM = torch.mm(q, k.t(), out_dtype=torch.float32)
        outputs.append(scores_LM.softmax(dim=-1).to(v.dtype) @ v)
    return torch.stack(outputs).unsqueeze(2)


def put_cudnn_first() -> None:
    """Put cuDNN first in torch's order of attention backends, on GPUs where it is the fastest.

    This is torch's default. It is lost if anything sets the order before the first attention of the
    process, even to the same order. Importing Transformer Engine loses it too.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in CUDNN_FIRST:
        first = int(SDPBackend.CUDNN_ATTENTION)
        others = [one for one in torch._C._get_sdp_priority_order() if one != first]
        torch._C._set_sdp_priority_order([first, *others])


def attention_backend(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> str:
    """Return the backend torch picks for `attention`: cudnn, flash, efficient or math."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    # scaled_dot_product_attention makes this choice itself; torch has no public name for it.
    chosen = SDPBackend(torch._fused_sdp_choice(q, k, v))
    return chosen.name.removesuffix("_ATTENTION").lower()


def causal_attention(q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> Tensor:
    """Return `attention` where query l sees only the keys 0 to l, BLNK."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BLNK, v_BLNK))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def biased_attention(
    q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, bias_NLL: Tensor, *, often: bool
) -> Tensor:
    """Return softmax(q k^T + bias) v, BLNK; set `often` if many batches have this length."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BLNK, v_BLNK))
    # This list sets no order. torch keeps its own; see `put_cudnn_first`.
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if often:
        # cuDNN is twice as fast, but planning for a new length takes it a while.
        backends.append(SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(backends):
        output = F.scaled_dot_product_attention(q, k, v, bias_NLL[None], scale=1.0)
    return output.transpose(1, 2)


def linear_relu(x: Tensor, weight: Tensor) -> Tensor:
    """Return relu(x weight^T) of a matrix x; on a GPU, relu is the epilogue of the GEMM."""
    return torch._addmm_activation(x.new_zeros(len(weight)), x, weight.t())


def frame_norm(x_BCTHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """Apply GroupNorm with one group to each frame, in operations that use the whole GPU.

    PyTorch's own kernel runs a whole frame on one SM, and copies x to channels first.
    """
    var, mean = torch.var_mean(x_BCTHW.float(), dim=(1, 3, 4), correction=0, keepdim=True)
    scale = weight_C.float()[:, None, None, None] * torch.rsqrt(var + eps)
    shift = bias_C.float()[:, None, None, None] - mean * scale
    return torch.addcmul(shift, x_BCTHW, scale).to(x_BCTHW.dtype)


class Elementwise:
    """An element-wise function that `fuse` compiles to a kernel or two."""

    instances: ClassVar[list[Elementwise]] = []

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = self.run = function
        self.__doc__ = function.__doc__
        self.instances.append(self)

    def __call__(self, *tensors: Tensor | None) -> Any:
        return self.run(*tensors)


def fuse(on: bool) -> None:
    """Compile every `Elementwise` function at its first call, or run all of them uncompiled.

    Unlike whole blocks, these functions can be compiled under ZeRO-3: they call no modules.
    """
    # torch 2.11: on a GPU, Inductor's mixed-order reduction drops the size-1 dimensions of its
    # result, so it is turned off.
    unsound = "triton.mix_order_reduction"
    options = {unsound: False} if on and unsound in torch._inductor.list_options() else None
    for f in Elementwise.instances:
        f.run = torch.compile(f.plain, dynamic=False, options=options) if on else f.plain


@Elementwise
def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return x / rms(x) * weight over the last dimension, computed in fp32 and cast back once."""
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


@Elementwise
def rotate(x_BLNK: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> Tensor:
    """Rotate each channel pair (c, c + K/2) by its angle in fp32.

    `cos` and `sin` are fp32 with one angle per pair: (B, L, K/2).
    """
    cos, sin = cos_BLK.unsqueeze(2), sin_BLK.unsqueeze(2)
    a, b = x_BLNK.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x_BLNK)


@Elementwise
def rms_norm_rotate(x_BLNK: Tensor, weight: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> Tensor:
    """Return rotate(rms_norm(x))."""
    return rotate.plain(rms_norm.plain(x_BLNK, weight), cos_BLK, sin_BLK)


@Elementwise
def modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Return layer_norm(x) * (1 + scale) + shift, BLD; the LayerNorm has no weights."""
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6) * (1 + scale_B1D) + shift_B1D


@Elementwise
def add(x_BLD: Tensor, gate_B1D: Tensor, y_BLD: Tensor) -> Tensor:
    """Return x + gate * y, BLD."""
    return x_BLD + gate_B1D * y_BLD


class FixedGate(torch.autograd.Function):
    """`add` for a gate that is not trained, so that no gradient needs y.

    Activation checkpointing recomputes a block up to the last tensor that autograd saved. The gate
    is therefore a plain attribute of `ctx`: the linear that computes y is not run again.
    """

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, gate_B1D: Tensor, y_BLD: Tensor) -> Tensor:
        ctx.gate_B1D = gate_B1D
        out: Tensor = add(x_BLD, gate_B1D, y_BLD)
        return out

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        return grad_BLD, None, ctx.gate_B1D * grad_BLD


def add_last(x_BLD: Tensor, gate_B1D: Tensor, y_BLD: Tensor) -> Tensor:
    """Return `add` at the end of a block; if the gate is not trained, y is not recomputed."""
    if y_BLD.requires_grad and not gate_B1D.requires_grad:
        fixed: Tensor = FixedGate.apply(x_BLD, gate_B1D, y_BLD)
        return fixed
    out: Tensor = add(x_BLD, gate_B1D, y_BLD)
    return out


@Elementwise
def add_modulate(
    x_BLD: Tensor, gate_B1D: Tensor | None, y_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x' = x + gate * y and modulate(x'), both BLD; without a gate, x' = x + y.

    A residual step of the denoiser, x = x + gate * attn(modulate(x)), is split over two calls: one
    returns modulate(x), the next adds gate * attn(...).
    """
    x_BLD = x_BLD + (y_BLD if gate_B1D is None else gate_B1D * y_BLD)
    return x_BLD, modulate.plain(x_BLD, shift_B1D, scale_B1D)
