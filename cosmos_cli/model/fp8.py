"""Run linear layers in fp8 and attention in bf16 with Transformer Engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from torch import Tensor, nn

from cosmos_cli.model.kernels import rotate
from cosmos_cli.model.lora import LoRALinear


def train_in_fp8(blocks: nn.ModuleList) -> None:
    """Make the linears of the blocks compute in fp8, with the same weights and parameter names.

    The first and last block, the AdaLN linears and LoRA factors keep their precision. Each tensor
    is scaled by its own current maximum, so no state passes from step to step.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8CurrentScaling

    scaling = Float8CurrentScaling()

    def in_fp8(linear: nn.Linear | LoRALinear) -> Callable[[Tensor], Tensor]:
        # Take the sizes from the module: under ZeRO-3 a weight has no shape until it is gathered.
        size, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        product = te.Linear(*size, bias=False, params_dtype=dtype, device="meta")
        product.weight = linear.weight

        def run(x: Tensor) -> Tensor:
            # autocast is entered inside `run`, so that recomputation also runs in fp8.
            with te.autocast(enabled=True, recipe=scaling):
                y: Tensor = product(x)
            return y

        return run

    for block in blocks[1:-1]:
        for name, linear in block.named_modules():
            if "adaln" in name or ".lora_" in name:
                continue
            # Replace only the forward function, because the module owns the parameter and its name.
            if isinstance(linear, LoRALinear):
                linear.product = in_fp8(linear)  # type: ignore[method-assign]
            elif isinstance(linear, nn.Linear):
                linear.forward = in_fp8(linear)  # type: ignore[method-assign]


def use_engine_attention(blocks: nn.ModuleList) -> None:
    """Make the blocks use Transformer Engine's bf16 kernels for attention and query-key norms.

    These kernels are not torch operators, so `checkpointing.keep` cannot store their outputs.
    """
    import transformer_engine.pytorch as te

    def engine_norm(weight: nn.Parameter, width: int) -> Callable[..., Tensor]:
        norm = te.RMSNorm(width, eps=1e-6, dtype=weight.dtype, device="meta")
        norm.weight = weight

        def run(x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
            y: Tensor = norm(x)
            return rotate(y, *rope) if rope else y

        return run

    @cache
    def engine_attention(heads: int, width: int) -> Callable[..., Tensor]:
        run: Callable[..., Tensor] = te.DotProductAttention(
            heads, width, qkv_format="bshd", attn_mask_type="no_mask"
        )
        return run

    def attend(q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
        heads, width = q_BLNK.shape[2:]
        return engine_attention(heads, width)(q_BLNK, k_BMNK, v_BMNK).unflatten(-1, (heads, width))

    for block in blocks:
        for layer in (block.self_attn, block.cross_attn):
            layer.attend = attend
            width = layer.q.out_features // layer.heads
            for norm in (layer.q_norm, layer.k_norm):
                norm.forward = engine_norm(norm.weight, width)
