"""The dimensions of each model, as frozen dataclasses, and the shapes they imply. No torch.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, `diffusion/config/base/net.py`,
`diffusion/training/config/{text2world,video2world}/registry.py`, `tokenizer/networks/configs.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

# The linears of a block by name, and the sets of them that a LoRA can adapt.
_ATTENTION = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out",
    "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.out",
)  # fmt: skip
_MLP = ("mlp.up", "mlp.down")
_ADALN = (
    "self_attn_adaln.down", "cross_attn_adaln.down", "mlp_adaln.down",
    "self_attn_adaln.up", "cross_attn_adaln.up", "mlp_adaln.up",
)  # fmt: skip
LORA_TARGETS = {
    "attention": _ATTENTION,
    "attention_mlp": (*_ATTENTION, *_MLP),
    "all": (*_ATTENTION, *_MLP, *_ADALN),
}
# Noise levels of the previews: little, much, and so much that almost nothing of a clip is left.
PREVIEW_SIGMAS = (0.5, 2.0, 8.0)
# The numbers of frames that a Video2World model can be given: one or two latent frames.
GIVEN_FRAMES = (1, 9)
# `speed: fast` evaluates the denoiser only at these values of log sigma, from the highest to the
# lowest. It guides above FAST_GUIDED_ABOVE. Between levels it extrapolates the estimate of x0 by
# this share of the second-order term. `study.py --parts search` found them on the tiny model.
FAST_LOG_SIGMAS = (4.38, 3.86, 3.30, 2.68, 2.01, 1.26, 0.43, -0.52, -1.61)
FAST_GUIDED_ABOVE = -1.1
FAST_EXTRAPOLATION = 0.6


@dataclass(frozen=True)
class DiTSpec:
    """The dimensions of the denoiser. `max_t` and `max_hw` are in latent cells.

    `cond_channels` is 1 in Video2World: a mask that tells the network which frames are given.
    """

    width: int = 4096
    blocks: int = 28
    heads: int = 32
    text_channels: int = 1024
    latent_channels: int = 16
    cond_channels: int = 0
    mlp_ratio: int = 4
    adaln_rank: int = 256
    patch_t: int = 1
    patch_hw: int = 2
    max_t: int = 128
    max_hw: int = 240
    rope_ratio: tuple[float, float, float] = (2.0, 1.0, 1.0)
    rope_base_fps: float = 24.0
    logvar_features: int = 128

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def block_parameters(self) -> int:
        """Return the number of weights of one block."""
        d, text, rank = self.width, self.text_channels, self.adaln_rank
        attention = 4 * d * d + 2 * self.head_width
        cross_attention = 2 * d * d + 2 * d * text + 2 * self.head_width
        return attention + cross_attention + 2 * self.mlp_ratio * d * d + 3 * (rank * 4 * d)

    @property
    def parameters(self) -> int:
        """Return the number of weights of the network, without the log-variance head."""
        d, rank = self.width, self.adaln_rank
        embedders = self.patch_inputs * d + 4 * d * d + d
        tables = (self.max_t + self.max_hw) * d
        final = rank * 3 * d + d * self.patch_channels
        return self.blocks * self.block_parameters + embedders + tables + final

    def lora_parameters(self, rank: int, targets: str) -> int:
        """Return the number of weights a LoRA trains: rank * (inputs + outputs) per linear."""
        d = self.width
        sides = {
            "cross_attn.k": self.text_channels + d, "cross_attn.v": self.text_channels + d,
            **dict.fromkeys(_MLP, d + self.mlp_ratio * d),
            **{n: self.adaln_rank + (d if n.endswith("down") else 3 * d) for n in _ADALN},
        }  # fmt: skip
        return self.blocks * rank * sum(sides.get(name, 2 * d) for name in LORA_TARGETS[targets])

    @property
    def patch_channels(self) -> int:
        """Return the values in an output token."""
        return self.latent_channels * self.patch_t * self.patch_hw**2

    @property
    def patch_inputs(self) -> int:
        """Return the values in an input token: the latent, `cond_channels` and the padding mask."""
        return (self.in_channels + 1) * self.patch_t * self.patch_hw**2

    @property
    def in_channels(self) -> int:
        """Return the channels of the network's input, without the padding mask."""
        return self.latent_channels + self.cond_channels


@dataclass(frozen=True)
class TokenizerSpec:
    """The dimensions of the causal video tokenizer, CV8x8x8.

    `multipliers` scale `channels` level by level.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (2, 4, 4)
    res_blocks: int = 2
    latent_channels: int = 16
    patch: int = 4
    temporal: int = 8
    spatial: int = 8
    chunk_frames: int = 121

    @property
    def chunk_latent_frames(self) -> int:
        """Return the latent frames of one chunk, which is the length of the mean and std tables."""
        return self.latent_frames(self.chunk_frames)

    def latent_frames(self, frames: int) -> int:
        """Return the number of latent frames for `frames` = 8k + 1 video frames."""
        return 1 + (frames - 1) // self.temporal


@dataclass(frozen=True)
class TextSpec:
    """The T5 encoder; its output is padded with zeros to `tokens`."""

    name: str = "google-t5/t5-11b"
    channels: int = 1024
    tokens: int = 512


@dataclass(frozen=True)
class ModelSpec:
    """A model: its three networks and the video format it was trained on.

    `sigma_min` and `sigma_max` are the ends of the sampling schedule. `sizes` are the pretrained
    (height, width) pairs. The weights of an `embedded` model ship inside the package.
    `sigma_scale` multiplies the noise levels of training. A model with `shared_with` has the
    tokenizer and the text encoder of that model, and trains on the same prepared datasets.
    """

    name: str
    dit: DiTSpec
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    text: TextSpec = field(default_factory=TextSpec)
    sigma_data: float = 0.5
    sigma_min: float = 0.0002
    sigma_max: float = 80.0
    sigma_scale: float = 1.0
    num_frames: int = 121
    height: int = 704
    width: int = 1280
    fps: float = 24.0
    sizes: tuple[tuple[int, int], ...] = ((704, 1280), (720, 1280))
    embedded: bool = False
    trainable: bool = True
    shared_with: ModelSpec | None = None

    @property
    def takes_frames(self) -> bool:
        """True for Video2World models, which continue given frames."""
        return self.dit.cond_channels > 0

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the latent shape (C, T, H, W) of `frames` frames of `height` x `width` pixels."""
        tok = self.tokenizer
        return (
            tok.latent_channels,
            tok.latent_frames(frames),
            height // tok.spatial,
            width // tok.spatial,
        )

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Return the tokens of the denoiser for a clip of `frames` x `height` x `width` pixels."""
        _, t, h, w = self.latent_shape(frames, height, width)
        return (t // self.dit.patch_t) * (h // self.dit.patch_hw) * (w // self.dit.patch_hw)

    @property
    def size_multiple(self) -> int:
        """Return the number that height and width in pixels must be multiples of."""
        return self.tokenizer.spatial * self.dit.patch_hw

    @property
    def max_size(self) -> int:
        """Return the largest height or width in pixels that the position tables cover."""
        return self.tokenizer.spatial * self.dit.max_hw


COSMOS_7B = ModelSpec(name="Cosmos-Predict1-7B-Text2World", dit=DiTSpec())

# sigma_scale is the root of its latent frames. It belongs to the model: clips of another length
# are trained with the same one.
VIDEO2WORLD_7B = replace(
    COSMOS_7B,
    name="Cosmos-Predict1-7B-Video2World",
    dit=replace(COSMOS_7B.dit, cond_channels=1),
    sigma_scale=4.0,
    shared_with=COSMOS_7B,
)

COSMOS_14B = ModelSpec(
    name="Cosmos-Predict1-14B-Text2World",
    dit=DiTSpec(width=5120, blocks=36, heads=40, rope_ratio=(2.0, 2.0, 2.0)),
    trainable=False,
)

# With eight heads, sequence parallelism over up to eight ranks can be tested on this model. With
# widths that are multiples of 32, fp8 can.
TINY = ModelSpec(
    name="Cosmos-Tiny-Text2World",
    dit=DiTSpec(width=256, blocks=6, heads=8, text_channels=128, adaln_rank=32),
    tokenizer=TokenizerSpec(channels=24),
    text=TextSpec(name="tiny-t5", channels=128, tokens=128),
    num_frames=25,
    height=96,
    width=160,
    fps=16.0,
    sizes=((96, 160),),
    embedded=True,
)

TINY_VIDEO2WORLD = replace(
    TINY,
    name="Cosmos-Tiny-Video2World",
    dit=replace(TINY.dit, cond_channels=1),
    sigma_scale=2.0,
    shared_with=TINY,
)

MODELS = {
    spec.name: spec for spec in (COSMOS_7B, VIDEO2WORLD_7B, COSMOS_14B, TINY, TINY_VIDEO2WORLD)
}
