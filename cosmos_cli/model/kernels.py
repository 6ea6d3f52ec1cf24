"""The few operations where a faster kernel may take the place of plain PyTorch.

Every attention of the denoiser goes through `attention`, and what lies between its linears through
functions that `fuse` has torch compile. What a backward pass finds kept instead of computing it
again is here too, for it is told by the kernels that computed it.

Dimension letters: B batch, L queries, M keys, D width, N heads, K head width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cosmos_cli.model.lora import LoRALinear

# What scaled_dot_product_attention becomes, by backend; its first arguments are q and k, BNLK.
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)

# GPUs, by compute capability, on which cuDNN attends twice as fast as FlashAttention 2: Hopper and
# the data-center kind of Blackwell.
CUDNN_FIRST = ((9, 0), (10, 0))

# Channels of a head, above which a GPU's fused attention keeps what it read outside its registers.
MAX_FUSED_WIDTH = 256


def attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over all keys, as BLNK."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BMNK, v_BMNK))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def wide_attention(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
    """The same for one head of any width.

    What a GPU has for heads of more than 256 channels is slow. There the scores of one sample at a
    time are written down, in fp32: 0.8 GB for a frame of 704x1280.
    """
    width = q_BLNK.shape[-1]
    if not q_BLNK.is_cuda or width <= MAX_FUSED_WIDTH:
        return attention(q_BLNK, k_BMNK, v_BMNK)
    q_BLK, k_BMK, v_BMK = (x.squeeze(2) for x in (q_BLNK * width**-0.5, k_BMNK, v_BMNK))
    read = []
    for q, k, v in zip(q_BLK, k_BMK, v_BMK, strict=True):
        scores_LM = torch.mm(q, k.t(), out_dtype=torch.float32)
        read.append(scores_LM.softmax(dim=-1).to(v.dtype) @ v)
    return torch.stack(read).unsqueeze(2)


def is_self_attention(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether as many keys as queries are attended to; two thirds of a forward pass."""
    return operator in _ATTENTION and args[0].shape[2] == args[1].shape[2]


def is_costly(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is a linear layer, or self-attention."""
    return operator is torch.ops.aten.mm.default or is_self_attention(operator, args)


def is_costly_for_its_size(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is a linear layer to fewer channels, as the MLP's last, or self-attention."""
    shrinks = operator is torch.ops.aten.mm.default and args[1].shape[0] > args[1].shape[1]
    return shrinks or is_self_attention(operator, args)


def keep(chosen: Callable[[Any, tuple[Any, ...]], bool]) -> tuple[Kept, Kept]:
    """Contexts for `checkpoint` that keep what some operators gave and compute the rest again."""
    kept: deque[Any] = deque()
    return Kept(chosen, kept, again=False), Kept(chosen, kept, again=True)


class Kept(TorchDispatchMode):
    """Keeps the results of chosen operators in order, or `again` gives those without computing.

    PyTorch's own selective checkpoints want every operator to come again, which it does not with
    ZeRO-3: what gathers weights in the forward pass finds them gathered in the backward pass.
    """

    def __init__(
        self, chosen: Callable[[Any, tuple[Any, ...]], bool], kept: deque[Any], *, again: bool
    ) -> None:
        super().__init__()
        self.chosen, self.kept, self.again = chosen, kept, again

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """That torch may compile what is called meanwhile, and need not show it."""
        return True

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The result of an operator."""
        chosen = self.chosen(operator, args)
        if chosen and self.again:
            return self.kept.popleft()
        result = operator(*args, **(kwargs or {}))
        if chosen:
            self.kept.append(tree_map_only(Tensor, Tensor.detach, result))
        return result


def use_fp8(blocks: nn.ModuleList) -> None:
    """Has the linears of blocks compute in fp8, under their names, with their own weights.

    The first and the last block, every modulation and the factors of a LoRA stay as they are. The
    scale of each tensor is that of its own largest value, so there is nothing to remember from step
    to step.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    scaling = Float8CurrentScaling()

    def in_fp8(linear: nn.Linear | LoRALinear) -> Callable[[Tensor], Tensor]:
        # Its weight has no shape before ZeRO-3 gathers it.
        size, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        product = te.Linear(*size, bias=False, params_dtype=dtype, device="meta")
        product.weight = linear.weight

        def run(x: Tensor) -> Tensor:
            # Within, so that it holds too where a checkpoint computes a block again.
            with te.autocast(enabled=True, recipe=scaling):
                y: Tensor = product(x)
            return y

        return run

    for block in blocks[1:-1]:
        for name, linear in block.named_modules():
            if "adaln" in name or ".lora_" in name:
                continue
            # Not in the place of the module, which has its name and its state.
            if isinstance(linear, LoRALinear):
                linear.product = in_fp8(linear)  # type: ignore[method-assign]
            elif isinstance(linear, nn.Linear):
                linear.forward = in_fp8(linear)  # type: ignore[method-assign]


def use_engine_attention(blocks: nn.ModuleList) -> None:
    """Has blocks normalise queries and keys, and attend, by Transformer Engine's kernels, in bf16.

    None of them is an operator of torch that `keep` would see.
    """
    import transformer_engine.pytorch as te

    def normaliser(weight: nn.Parameter, width: int) -> Callable[..., Tensor]:
        norm = te.RMSNorm(width, eps=1e-6, dtype=weight.dtype, device="meta")
        norm.weight = weight

        def run(x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
            y: Tensor = norm(x)
            return rotate(y, *rope) if rope else y

        return run

    @cache
    def attender(heads: int, width: int) -> Callable[..., Tensor]:
        run: Callable[..., Tensor] = te.DotProductAttention(
            heads, width, qkv_format="bshd", attn_mask_type="no_mask"
        )
        return run

    def attend(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
        heads, width = q_BLNK.shape[2:]
        return attender(heads, width)(q_BLNK, k_BMNK, v_BMNK).unflatten(-1, (heads, width))

    for block in blocks:
        for layer in (block.self_attn, block.cross_attn):
            layer.attend = attend
            width = layer.q.out_features // layer.heads
            for norm in (layer.q_norm, layer.k_norm):
                norm.forward = normaliser(norm.weight, width)


def put_cudnn_first() -> None:
    """Has torch ask cuDNN first for an attention, where its kernels are the fastest.

    torch does so by itself, unless something set the order before the first attention of the
    process, even to what it was. Importing Transformer Engine takes the first place from it too.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in CUDNN_FIRST:
        first = int(SDPBackend.CUDNN_ATTENTION)
        others = [one for one in torch._C._get_sdp_priority_order() if one != first]
        torch._C._set_sdp_priority_order([first, *others])


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


def biased_attention(
    q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, bias_NLL: Tensor, *, often: bool
) -> Tensor:
    """softmax(q k^T + bias) v, as BLNK; `often` is whether many batches have this length."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNK, k_BLNK, v_BLNK))
    # In what order torch tries them is left to it; see `put_cudnn_first`.
    backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if often:
        # Twice as fast, but it takes its time to plan for each new length.
        backends.append(SDPBackend.CUDNN_ATTENTION)
    with sdpa_kernel(backends):
        read = F.scaled_dot_product_attention(q, k, v, bias_NLL[None], scale=1.0)
    return read.transpose(1, 2)


def linear_relu(x: Tensor, weight: Tensor) -> Tensor:
    """relu(x weight^T) of a matrix x, which the multiplication itself does on a GPU."""
    return torch._addmm_activation(x.new_zeros(len(weight)), x, weight.t())


def frame_norm(x_BCTHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """GroupNorm of one group for each frame, in the layout of x, for a compiler to fuse.

    PyTorch's own kernel gives a whole frame to one processor of a GPU and wants channels first.
    """
    wide = x_BCTHW.float()
    var, mean = torch.var_mean(wide, dim=(1, 3, 4), correction=0, keepdim=True)
    weight, bias = (p.float()[:, None, None, None] for p in (weight_C, bias_C))
    return ((wide - mean) * torch.rsqrt(var + eps) * weight + bias).to(x_BCTHW.dtype)


class Elementwise:
    """A function of element-wise work, which `fuse` makes a kernel or two of."""

    every: ClassVar[list[Elementwise]] = []

    def __init__(self, function: Callable[..., Any]) -> None:
        self.plain = self.run = function
        self.__doc__ = function.__doc__
        self.every.append(self)

    def __call__(self, *tensors: Tensor | None) -> Any:
        """What the function gives."""
        return self.run(*tensors)


def fuse(on: bool) -> None:
    """Has torch compile element-wise work when it is first called, or leaves it as it is.

    Unlike whole blocks, these functions can be compiled under ZeRO-3: no module is called in them.
    """
    # On a GPU torch 2.11 gives sums over rows and columns in one kernel a shape without its ones.
    unsound = "triton.mix_order_reduction"
    options = {unsound: False} if on and unsound in torch._inductor.list_options() else None
    for work in Elementwise.every:
        work.run = torch.compile(work.plain, dynamic=False, options=options) if on else work.plain


@Elementwise
def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """X / rms(x) * weight over the last dimension, computed in fp32 and cast back once."""
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


@Elementwise
def rotate(x_BLNK: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> Tensor:
    """Each channel pair (c, c + K/2) turned by its angle in fp32.

    `cos` and `sin` are fp32 with one angle per pair: (B, L, K/2).
    """
    cos, sin = cos_BLK.unsqueeze(2), sin_BLK.unsqueeze(2)
    a, b = x_BLNK.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x_BLNK)


@Elementwise
def rms_norm_rotate(x_BLNK: Tensor, weight: Tensor, cos_BLK: Tensor, sin_BLK: Tensor) -> Tensor:
    """`rms_norm`, then `rotate`."""
    return rotate.plain(rms_norm.plain(x_BLNK, weight), cos_BLK, sin_BLK)


@Elementwise
def modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """LayerNorm without gain, scaled by 1 + scale and shifted, BLD."""
    return F.layer_norm(x_BLD, x_BLD.shape[-1:], eps=1e-6) * (1 + scale_B1D) + shift_B1D


@Elementwise
def add(x_BLD: Tensor, gate_B1D: Tensor, y_BLD: Tensor) -> Tensor:
    """X + gate * y, BLD."""
    return x_BLD + gate_B1D * y_BLD


class FixedGate(torch.autograd.Function):
    """`add` with a gate that is not trained, so that no gradient needs y.

    A checkpoint computes a block again up to the last tensor that autograd saved. The gate is kept
    where it does not look, which leaves out the linear that gives y.
    """

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, gate_B1D: Tensor, y_BLD: Tensor) -> Tensor:
        """X + gate * y."""
        ctx.gate_B1D = gate_B1D
        out: Tensor = add(x_BLD, gate_B1D, y_BLD)
        return out

    @staticmethod
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor, None, Tensor]:  # type: ignore[override]
        """Of x and y."""
        return grad_BLD, None, ctx.gate_B1D * grad_BLD


def add_last(x_BLD: Tensor, gate_B1D: Tensor, y_BLD: Tensor) -> Tensor:
    """`add` at the end of a block; y is not computed again where the gate is not trained."""
    if y_BLD.requires_grad and not gate_B1D.requires_grad:
        fixed: Tensor = FixedGate.apply(x_BLD, gate_B1D, y_BLD)
        return fixed
    out: Tensor = add(x_BLD, gate_B1D, y_BLD)
    return out


@Elementwise
def add_modulate(
    x_BLD: Tensor, gate_B1D: Tensor | None, y_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor
) -> tuple[Tensor, Tensor]:
    """X + gate * y, or x + y without a gate; and that modulated. Both BLD."""
    x_BLD = x_BLD + (y_BLD if gate_B1D is None else gate_B1D * y_BLD)
    return x_BLD, modulate.plain(x_BLD, shift_B1D, scale_B1D)
