"""The denoiser: a diffusion transformer over video latents, conditioned on text and noise level.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, `diffusion/networks/general_dit.py`,
`diffusion/module/{blocks,attention,position_embedding}.py`.

Dimension letters: B batch, C channels, T H W latent frames, height, width (t h w in patches),
L = t h w video tokens, M text tokens, D width, E = 3 D, N heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosmos_cli.model import checkpointing, kernels
from cosmos_cli.model.sequence import SequenceGroup
from cosmos_cli.spec import DiTSpec

if TYPE_CHECKING:
    from cosmos_cli.model.streaming import ActivationStream, WeightStream

# Cosine and sine of the rotary angles, each (B, L, K/2) in fp32.
Rope = tuple[Tensor, Tensor]
# The input of cross-attention: text embeddings BMD, or the keys and values computed from them.
Text = Tensor | tuple[Tensor, Tensor]
# A noise level: its embedding BD, and the modulation BE that all sub-blocks share.
Level = tuple[Tensor, Tensor]


class Prompt(NamedTuple):
    """Holds what all sampling steps of one prompt share: positions and the text of each block.

    `first_BLD`, where known, is the output of the first block's self-attention. It does not depend
    on the text, because no cross-attention comes before it.
    """

    pos_LD: Tensor
    rope: Rope
    texts: Sequence[Text]
    first_BLD: Tensor | None = None


class DiT(nn.Module):
    """The denoising network: predicts the raw output of EDM preconditioning for a noised latent."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.spec = spec
        # What each block stores for the backward pass; it recomputes the rest:
        #   none       everything
        #   attention  its input and the output of self-attention
        #   most       like attention, but also the output of the MLP in the first `mlps_kept`
        #              blocks and the outputs of all linears in the first `blocks_kept` blocks
        #   all        its input only ("all" is recomputed)
        self.activation_checkpointing: Literal["none", "most", "attention", "all"] = "none"
        self.mlps_kept = self.blocks_kept = 0
        self.sequence = SequenceGroup()
        # Set where the GPU cannot hold all weights or activations.
        self.weights: WeightStream | None = None
        self.activations: ActivationStream | None = None
        self.x_embedder = linear(spec.patch_inputs, spec.width)
        self.pos_embedder = PositionTables(spec)
        self.t_embedder = TimeMLP(spec)
        self.t_norm = RMSNorm(spec.width)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.blocks))
        self.final = Final(spec)

    def forward(
        self,
        x_BCTHW: Tensor,
        c_noise_B: Tensor,
        text_emb_BMD: Tensor,
        fps_B: Tensor,
        padding_mask_BCHW: Tensor | None = None,
        prompt: Prompt | None = None,
    ) -> Tensor:
        """Return the network output, BCTHW.

        Args:
            x_BCTHW: c_in * xt. It and `text_emb_BMD` have the dtype of the parameters. For a
                Video2World model, its last channel is 1 on the given frames (see cond_frames.py).
            c_noise_B: ln(sigma) / 4, fp32.
            text_emb_BMD: padded with zeros, which take part in the softmax; there is no mask.
            fps_B: frames per second of each sample.
            padding_mask_BCHW: one channel of any size, 1 where there is no picture; default all 0.
            prompt: the results of `locate` and `read`, for callers whose steps all share text,
                frame rate and size. By default they are computed here.

        Raises:
            ValueError: the latent does not divide into patches or exceeds the position tables.
        """
        t, h, w = patch_grid(self.spec, x_BCTHW)

        # 1. Patches of the latent and its padding mask become tokens. Up to step 5, L counts only
        # the tokens of this rank: with sequence parallelism a part of them, else all.
        x_BLD = self.tokens(x_BCTHW, padding_mask_BCHW)

        # 2. The position embedding, the rotary angles, and the text for each block.
        if prompt is None:
            texts = [text_emb_BMD] * len(self.blocks)
            prompt = Prompt(*self.locate((t, h, w), fps_B), texts)

        # 3. The noise level: an embedding and a modulation, shared by all sub-blocks.
        level = self.noise_level(c_noise_B)

        # 4. The blocks.
        for i, text in enumerate(prompt.texts):
            inputs = (prompt.pos_LD, prompt.rope, level, text, None if i else prompt.first_BLD)
            x_BLD = self.run(i, x_BLD, *inputs)

        # 5. Tokens become a latent. This is not the inverse of step 1: the model was trained with
        # the channel slowest on the way in and fastest on the way out.
        x_BLC = self.sequence.gather(self.final(x_BLD, level))
        return rearrange(
            x_BLC, "B (t h w) (dh dw dt C) -> B C (t dt) (h dh) (w dw)", t=t, h=h, w=w, **self.patch
        )

    @property
    def patch(self) -> dict[str, int]:
        """The patch sizes under the axis names of `rearrange`."""
        return {"dt": self.spec.patch_t, "dh": self.spec.patch_hw, "dw": self.spec.patch_hw}

    def tokens(self, x_BCTHW: Tensor, padding_mask_BCHW: Tensor | None = None) -> Tensor:
        """Return the embedded patches of this rank, BLD."""
        x = append_mask(x_BCTHW, padding_mask_BCHW)
        x_BLC = rearrange(x, "B C (t dt) (h dh) (w dw) -> B (t h w) (C dt dh dw)", **self.patch)
        embedded: Tensor = self.x_embedder(self.sequence.own(x_BLC, 1))
        return embedded

    def noise_level(self, c_noise_B: Tensor) -> Level:
        """Return the embedding and the shared modulation of a noise level."""
        wave_BD = sinusoid(c_noise_B, self.spec.width).to(self.t_norm.weight.dtype)
        return self.t_norm(wave_BD), self.t_embedder(wave_BD)

    def block(self, i: int) -> Block:
        """Return block `i`, with its weights on the device."""
        if self.weights:
            self.weights.bring(i)
        return cast(Block, self.blocks[i])

    def call(self, i: int, *inputs: Any) -> Tensor:
        """Return the output of block `i`."""
        return self.block(i)(*inputs)

    def run(self, i: int, x_BLD: Tensor, *inputs: Any) -> Tensor:
        """Return the output of block `i`, run under the activation checkpointing mode."""
        mode, store = self.activation_checkpointing, self.activations
        if mode == "none":
            return self.call(i, x_BLD, *inputs)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        on_cpu = store is not None and store.begin(i)
        if mode != "all":
            chosen = checkpointing.is_self_attention
            if mode == "most" and i < self.mlps_kept:
                chosen = checkpointing.is_costly_for_its_size
            if mode == "most" and i < self.blocks_kept:
                chosen = checkpointing.is_costly
            queue = store.queue(i) if on_cpu else None
            options["context_fn"] = partial(checkpointing.keep, chosen, queue)
        if not on_cpu:
            return checkpoint(partial(self.call, i), x_BLD, *inputs, **options)
        # checkpoint would hold x itself on the GPU.
        lent = store.lend(i, x_BLD)
        return checkpoint(lambda *rest: self.call(i, lent(), *rest), *inputs, **options)

    def locate(self, grid: tuple[int, int, int], fps_B: Tensor) -> tuple[Tensor, Rope]:
        """Return the position embedding (LD) and rotary table of a grid of (t, h, w) patches.

        Raises:
            ValueError: the tokens do not divide evenly over the sequence-parallel group.
        """
        if math.prod(grid) % self.sequence.size:
            raise ValueError(f"{math.prod(grid)} tokens over {self.sequence.size} processes")
        cos, sin = (self.sequence.own(x, 1) for x in rope_table(self.spec, grid, fps_B))
        return self.sequence.own(self.pos_embedder(*grid), 0), (cos, sin)

    def share(self, sequence: SequenceGroup) -> None:
        """Split the tokens over a sequence-parallel group, whose ranks all get the same inputs."""
        self.sequence = sequence
        for block in self.blocks:
            block.self_attn.sequence = sequence

    def first_attention(self, x_BCTHW: Tensor, c_noise_B: Tensor, prompt: Prompt) -> Tensor:
        """Return the output of the first block's self-attention, BLD, the same for every text."""
        x_BLD, level = self.tokens(x_BCTHW), self.noise_level(c_noise_B)
        attended: Tensor = self.block(0).attend(x_BLD, prompt.pos_LD, prompt.rope, level)
        return attended

    def read(self, text_emb_BMD: Tensor) -> list[Text]:
        """Return the cross-attention keys and values of a text for each block."""
        return [self.block(i).cross_attn.keys_values(text_emb_BMD) for i in range(len(self.blocks))]

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise the weights. At first the gates depend on the shared modulation alone."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for layer in (self.t_embedder.linear_1, self.t_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
        for table in self.pos_embedder.parameters():
            nn.init.trunc_normal_(table, std=0.02, generator=generator)
        for module in self.blocks.modules():
            if isinstance(module, AdaLN):
                nn.init.zeros_(module.up.weight)


class Block(nn.Module):
    """Self-attention, cross-attention to the text and MLP, each with AdaLN modulation and gate."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.self_attn_adaln = AdaLN(spec, parts=3)
        self.self_attn = Attention(spec, spec.width)
        self.cross_attn_adaln = AdaLN(spec, parts=3)
        self.cross_attn = Attention(spec, spec.text_channels)
        self.mlp_adaln = AdaLN(spec, parts=3)
        self.mlp = MLP(spec)

    def forward(
        self,
        x_BLD: Tensor,
        pos_LD: Tensor,
        rope: Rope,
        level: Level,
        text: Text,
        attended_BLD: Tensor | None = None,
    ) -> Tensor:
        """Return the tokens after this block, BLD. Every block adds the position embedding again.

        `attended_BLD` is the output of `attend`, where the caller already has it.
        """
        shift, scale, gate = self.self_attn_adaln(level)
        x, u = kernels.add_modulate(x_BLD, None, pos_LD, shift, scale)
        y = self.self_attn(u, u, rope) if attended_BLD is None else attended_BLD

        shift, scale, next_gate = self.cross_attn_adaln(level)
        x, u = kernels.add_modulate(x, gate, y, shift, scale)
        y, gate = self.cross_attn(u, text), next_gate

        shift, scale, next_gate = self.mlp_adaln(level)
        x, u = kernels.add_modulate(x, gate, y, shift, scale)
        return kernels.add_last(x, next_gate, self.mlp(u))

    def attend(self, x_BLD: Tensor, pos_LD: Tensor, rope: Rope, level: Level) -> Tensor:
        """Return the output of self-attention for these tokens, BLD."""
        shift, scale, _ = self.self_attn_adaln(level)
        _, u = kernels.add_modulate(x_BLD, None, pos_LD, shift, scale)
        y: Tensor = self.self_attn(u, u, rope)
        return y


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys."""

    def __init__(self, spec: DiTSpec, kv_channels: int) -> None:
        super().__init__()
        self.heads = spec.heads
        self.sequence = SequenceGroup()
        # With LoRAs on q, k or v, appends A x to the tokens, once for all three.
        self.widen: nn.Module = nn.Identity()
        self.q = linear(spec.width, spec.width)
        self.k = linear(kv_channels, spec.width)
        self.v = linear(kv_channels, spec.width)
        self.out = linear(spec.width, spec.width)
        self.q_norm = RMSNorm(spec.head_width)
        self.k_norm = RMSNorm(spec.head_width)

    def forward(self, u_BLD: Tensor, context: Text, rope: Rope | None = None) -> Tensor:
        """Return the attention of `u` over `context`, BLD: self-attention if they are one tensor.

        `rope` rotates the queries and, in self-attention, the keys.
        """
        if context is u_BLD:
            u_BLD = context = self.widen(u_BLD)
        q = self.q_norm(self.q(u_BLD).unflatten(-1, (self.heads, -1)), rope)
        k, v = context if isinstance(context, tuple) else self.keys_values(context, rope)
        q, k, v = (self.sequence.to_heads(x) for x in (q, k, v))
        return self.out(self.sequence.to_tokens(self.attend(q, k, v)).flatten(-2))

    def attend(self, q_BLNK: Tensor, k_BMNK: Tensor, v_BMNK: Tensor) -> Tensor:
        """Return the output of each head, BLNK."""
        return kernels.attention(q_BLNK, k_BMNK, v_BMNK)

    def keys_values(self, context_BMD: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values, each BMNK. Those of a text do not depend on the noise level."""
        k = self.k_norm(self.k(context_BMD).unflatten(-1, (self.heads, -1)), rope)
        return k, self.v(context_BMD).unflatten(-1, (self.heads, -1))


class MLP(nn.Module):
    """Two linears around an exact (erf) GELU."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.up = linear(spec.width, spec.mlp_ratio * spec.width)
        self.down = linear(spec.mlp_ratio * spec.width, spec.width)

    def forward(self, u_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(u_BLD)))


class AdaLN(nn.Module):
    """Maps the noise level to shift, scale and, with three parts, gate through a low rank."""

    def __init__(self, spec: DiTSpec, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.down = linear(spec.width, spec.adaln_rank)
        self.up = linear(spec.adaln_rank, parts * spec.width)

    def forward(self, level: Level) -> tuple[Tensor, ...]:
        """Return `parts` tensors B1D. Only the first `parts` of the shared modulation are used."""
        t_emb_BD, t_mod_BE = level
        own = self.up(self.down(F.silu(t_emb_BD)))
        return (own + t_mod_BE[:, : own.shape[1]]).unsqueeze(1).chunk(self.parts, dim=-1)


class Final(nn.Module):
    """The last layer: modulates the tokens and projects them to patches."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.adaln = AdaLN(spec, parts=2)
        self.linear = linear(spec.width, spec.patch_channels)

    def forward(self, x_BLD: Tensor, level: Level) -> Tensor:
        """Return the values of each patch, BLC."""
        shift, scale = self.adaln(level)
        return self.linear(kernels.modulate(x_BLD, shift, scale))


class TimeMLP(nn.Module):
    """Maps the sinusoid of the noise level to the modulation that all sub-blocks share."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.linear_1 = linear(spec.width, spec.width)
        self.linear_2 = linear(spec.width, 3 * spec.width)

    def forward(self, wave_BD: Tensor) -> Tensor:
        """Return shift, scale and gate, concatenated, BE."""
        return self.linear_2(F.silu(self.linear_1(wave_BD)))


class PositionTables(nn.Module):
    """A learned embedding for each frame, row and column of patches."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.zeros(spec.max_t // spec.patch_t, spec.width))
        self.h = nn.Parameter(torch.zeros(spec.max_hw // spec.patch_hw, spec.width))
        self.w = nn.Parameter(torch.zeros(spec.max_hw // spec.patch_hw, spec.width))

    def forward(self, t: int, h: int, w: int) -> Tensor:
        """Return the sum of the three embeddings, divided by its root mean square, LD."""
        hw_HWD = self.h[:h, None].float() + self.w[:w].float()
        pos_LD = (self.t[:t, None, None].float() + hw_HWD).flatten(0, 2)
        # Unlike in RMSNorm, the epsilon is added outside the root.
        rms = torch.linalg.vector_norm(pos_LD, dim=-1, keepdim=True) / math.sqrt(pos_LD.shape[-1])
        return (pos_LD / (rms + 1e-6)).type_as(self.t)


class RMSNorm(nn.Module):
    """RMS normalisation over the last dimension, with a learned gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """Return `x` normalised and, with `rope`, rotated, in the same shape and dtype."""
        if rope is None:
            return kernels.rms_norm(x, self.weight)
        return kernels.rms_norm_rotate(x, self.weight, *rope)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear layer without bias, as everywhere in this network."""
    return nn.Linear(inputs, outputs, bias=False)


def sinusoid(c_noise_B: Tensor, width: int) -> Tensor:
    """Return cosines, then sines, of c_noise at width / 2 frequencies from 1 to 1e-4, BD, fp32."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=c_noise_B.device)
    angle = c_noise_B.float()[:, None] * torch.exp(index * (-math.log(10_000) / half))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def rope_table(spec: DiTSpec, grid: tuple[int, int, int], fps_B: Tensor) -> Rope:
    """Return cosine and sine of the rotary angles of a (t, h, w) grid, each (B, L, K/2) in fp32.

    The reference computes the angles in bf16, with errors of up to 0.15 rad.
    A third of the channels rotates with the row, a third with the column, the rest with time.
    """
    device = fps_B.device
    t, h, w = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    t_BT = t * spec.rope_base_fps / fps_B.float()[:, None]

    n_hw = spec.head_width // 6 * 2
    n_t = spec.head_width - 2 * n_hw
    freq_t, freq_h, freq_w = (
        rope_frequencies(n, ratio, device)
        for n, ratio in zip((n_t, n_hw, n_hw), spec.rope_ratio, strict=True)
    )
    size = (len(fps_B), *grid, -1)
    angle_BLK = torch.cat(
        (
            (t_BT[:, :, None, None, None] * freq_t).expand(size),
            (h[:, None, None] * freq_h).expand(size),
            (w[:, None] * freq_w).expand(size),
        ),
        dim=-1,
    ).flatten(1, 3)
    return angle_BLK.cos(), angle_BLK.sin()


def rope_frequencies(channels: int, ratio: float, device: torch.device) -> Tensor:
    """Return one fp32 frequency per pair of channels; `ratio` extends the range (NTK scaling)."""
    theta = 10_000.0 * ratio ** (channels / (channels - 2))
    exponent = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    return theta**-exponent


def append_mask(x_BCTHW: Tensor, mask_BCHW: Tensor | None) -> Tensor:
    """Return `x` with the padding mask, resized to its height and width, as the last channel."""
    size_B1THW = (len(x_BCTHW), 1, *x_BCTHW.shape[2:])
    if mask_BCHW is None:
        mask = x_BCTHW.new_zeros(size_B1THW)
    else:
        # "nearest", not "nearest-exact": source index floor(i * h / H).
        mask = F.interpolate(mask_BCHW.type_as(x_BCTHW), x_BCTHW.shape[-2:], mode="nearest")
        mask = mask.unsqueeze(2).expand(size_B1THW)
    return torch.cat((x_BCTHW, mask), dim=1)


def patch_grid(spec: DiTSpec, x_BCTHW: Tensor) -> tuple[int, int, int]:
    """Return the number of patches along T, H and W.

    Raises:
        ValueError: the latent does not divide into patches or exceeds the position tables.
    """
    size = tuple(x_BCTHW.shape[-3:])
    patch = (spec.patch_t, spec.patch_hw, spec.patch_hw)
    limit = (spec.max_t, spec.max_hw, spec.max_hw)
    if any(n % p or n > most for n, p, most in zip(size, patch, limit, strict=True)):
        raise ValueError(f"latent {size} is not a multiple of the patch {patch} up to {limit}")
    t, h, w = (n // p for n, p in zip(size, patch, strict=True))
    return t, h, w
