"""Compute the denoiser's linears and self-attention in fp8 while sampling.

All tensors are e4m3. Every scale comes from the tensor that it scales, never from an earlier step,
so a result does not depend on what was computed before.

Linears: one scale for each token and one for each output channel, the weights quantised once.
Attention: adding one vector to all keys does not change the softmax, and an affine change of a
channel of V is the same change of the output. So K is centred, and V is centred and scaled per
channel, before they are quantised (Zhang et al. 2024, "SageAttention", arXiv 2410.02367, section
4.2; "SageAttention2", arXiv 2411.10958, section 3.2).

Dimension letters: B batch, L queries, M keys, N heads, K head width.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from cosmos_cli.model.lora import AdaptedLinear

E4M3 = torch.float8_e4m3fn
# The largest value of e4m3.
LARGEST = 448.0
# Keeps the scale of a tensor of zeros from being zero.
TINY = 1e-12
# The linears of a block that read all video tokens. The others are modulations, or read the text
# once per prompt.
LINEARS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out", "cross_attn.q", "cross_attn.out",
    "mlp.up", "mlp.down",
)  # fmt: skip


def use_fp8(blocks: nn.ModuleList, attention: bool) -> None:
    """Make all blocks but the first and last sample in fp8; quantise their weights in place.

    Load the weights first. With `attention`, the same blocks compute self-attention in fp8 too.
    """
    for block in blocks[1:-1]:
        for name in LINEARS:
            parent, _, child = name.rpartition(".")
            owner = block.get_submodule(parent)
            setattr(owner, child, Fp8Linear(owner.get_submodule(child)))
        if attention:
            block.self_attn.attend = attend


class Fp8Linear(nn.Module):
    """Computes a linear, or a linear with LoRAs, as a product of two e4m3 matrices."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.widen = linear.widen if isinstance(linear, AdaptedLinear) else nn.Identity()
        weight, scale = quantize(cast(Tensor, linear.weight).detach(), dim=-1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the linear in the format of `x`."""
        x = self.widen(x)
        rows = x.flatten(0, -2)
        y = multiply(*quantize(rows, dim=-1), self.weight, self.scale, x.dtype)
        return y.unflatten(0, x.shape[:-1])


def quantize(x: Tensor, dim: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return `x` in e4m3 and its fp32 scales over `dim`, which stays with size 1."""
    scale = x.abs().amax(dim, keepdim=True).float().clamp(min=TINY) / LARGEST
    return (x.float() / scale).to(E4M3), scale


def multiply(x: Tensor, scale_x: Tensor, weight: Tensor, scale_w: Tensor, dtype: Any) -> Tensor:
    """Return (x * scale_x) (weight * scale_w)^T, with one scale for each row of both."""
    if not x.is_cuda:
        return ((x.float() @ weight.float().t()) * scale_x * scale_w.t()).to(dtype)
    return torch._scaled_mm(
        x, weight.t(), scale_x, scale_w.t(), out_dtype=dtype, use_fast_accum=True
    )


def attend(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v over all keys, BLNK, in the format of `q`."""
    whole = (0, 1, 2, 3)
    q, scale_q = quantize(q_BLNK, whole)
    k, scale_k = quantize(k_BMNK - k_BMNK.float().mean(1, keepdim=True), whole)
    mean_B1NK = v_BMNK.float().mean(1, keepdim=True)
    v, scale_B1NK = quantize(v_BMNK - mean_B1NK, 1)
    # Subtract the mean of the quantised v. bf16 values have so few digits that rounding keeps a
    # small mean, which would be added twice.
    shift_B1NK = mean_B1NK - v.float().mean(1, keepdim=True) * scale_B1NK
    # The output is a mean of v, so it fits into e4m3 with the scale of v.
    out = fp8_attention(q, k, v, scale_q, scale_k)
    return (out.float() * scale_B1NK + shift_B1NK).to(q_BLNK.dtype)


@torch.library.custom_op("cosmos_cli::fp8_attention", mutates_args=())
def fp8_attention(
    q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor, scale_q: Tensor, scale_k: Tensor
) -> Tensor:
    """Return softmax(scale_q scale_k q k^T / sqrt(K)) v, all in e4m3, by cuDNN."""
    graph = _graph(q_BLNK.shape, k_BMNK.shape, q_BLNK.device.index)
    return graph.run(q_BLNK, k_BMNK, v_BMNK, scale_q, scale_k)


@fp8_attention.register_fake
def _(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor, scale_q: Tensor, scale_k: Tensor) -> Tensor:
    return torch.empty_like(q_BLNK, memory_format=torch.contiguous_format)


@fp8_attention.register_kernel("cpu")
def _(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor, scale_q: Tensor, scale_k: Tensor) -> Tensor:
    """Emulate the kernel: quantise the exponentials, and sum them before they are quantised."""
    q, k, v = (x.transpose(1, 2).float() for x in (q_BLNK, k_BMNK, v_BMNK))
    scores = (q @ k.mT) * (scale_q * scale_k / math.sqrt(q.shape[-1]))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded = (weights * LARGEST).to(E4M3).float() / LARGEST
    out = (rounded @ v) / weights.sum(-1, keepdim=True)
    return out.to(E4M3).transpose(1, 2).contiguous()


class AttentionGraph:
    """A cuDNN graph of fp8 attention for tensors of one shape on one GPU."""

    def __init__(self, q_shape: torch.Size, k_shape: torch.Size, device: int) -> None:
        import cudnn

        fp32 = cudnn.data_type.FLOAT
        self.cudnn, self.handle = cudnn, cudnn.create_handle()
        graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.FP8_E4M3,
            intermediate_data_type=fp32,
            compute_data_type=fp32,
            handle=self.handle,
        )
        with torch.device("meta"):
            q, k = (torch.empty(shape).transpose(1, 2) for shape in (q_shape, k_shape))

        def tensor(like: Tensor) -> Any:
            return graph.tensor(
                dim=list(like.shape), stride=list(like.stride()), data_type=cudnn.data_type.FP8_E4M3
            )

        def scalar() -> Any:
            return graph.tensor(dim=[1] * 4, stride=[1] * 4, data_type=fp32)

        self.inputs = [tensor(q), tensor(k), tensor(k)]
        self.scales = [scalar() for _ in range(6)]
        out, _, *amaxes = graph.sdpa_fp8(
            *self.inputs, *self.scales, is_inference=True, attn_scale=q.shape[-1] ** -0.5
        )
        out.set_output(True).set_dim(list(q.shape)).set_stride(list(q.stride()))
        for amax in amaxes:
            amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(fp32)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self.graph, self.out, self.amaxes = graph, out, amaxes
        size = max(graph.get_workspace_size(), 1)
        self.workspace = torch.empty(size, dtype=torch.uint8, device=device)
        # The scales of v, of the exponentials (both directions) and of the output, and two results
        # that are not read.
        fixed = (1.0, 1 / LARGEST, LARGEST, 1.0)
        self.fixed = [torch.tensor(value, device=device) for value in fixed]
        self.unread = [torch.empty(1, device=device) for _ in amaxes]

    def run(self, q: Tensor, k: Tensor, v: Tensor, scale_q: Tensor, scale_k: Tensor) -> Tensor:
        """Return the attention of contiguous BLNK tensors."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.empty_like(q)
        values = [q, k, v, scale_q, scale_k, *self.fixed, out, *self.unread]
        names = [*self.inputs, *self.scales, self.out, *self.amaxes]
        self.cudnn.set_stream(
            handle=self.handle, stream=torch.cuda.current_stream(q.device).cuda_stream
        )
        self.graph.execute(
            dict(zip(names, values, strict=True)), self.workspace, handle=self.handle
        )
        return out


_graph = cache(AttentionGraph)
