"""The causal video tokenizer: it encodes pixels to latents at the scale of x0 and decodes them.

No latent frame depends on later pixels. Module names are the keys of the released weights.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, `tokenizer/modules/{layers3d,patching,utils}.py`,
`diffusion/module/pretrained_vae.py`.

Dimension letters: B batch, C channels, T frames, H height, W width; every x and z is BCTHW.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from torch import Tensor, nn

from cosmos_cli.model import kernels, weights
from cosmos_cli.model.finite import require_finite
from cosmos_cli.spec import ModelSpec, TokenizerSpec

Extent = tuple[int, int, int]
Parts = OrderedDict[str, nn.Module]

COLORS = 3
POINT: Extent = (1, 1, 1)
SPACE: Extent = (1, 3, 3)
TIME: Extent = (3, 1, 1)


def load_tokenizer(path: Path, spec: ModelSpec, device: str, dtype: torch.dtype) -> Tokenizer:
    """Load the video tokenizer of a model, ready to encode and decode.

    Raises:
        UserError: its file is missing or damaged, or has weights that are not finite.
    """
    tokenizer = Tokenizer(spec.tokenizer, spec.sigma_data)
    weights.load_strict(tokenizer, weights.load_tokenizer_state(path), path)
    tokenizer = tokenizer.to(device=device, dtype=dtype).eval()
    require_finite(tokenizer.state_dict(), path)
    return tokenizer


class Tokenizer(nn.Module):
    """The encoder and decoder, with the mean and std that bring latents to the scale of x0.

    The buffers `mean` and `std` have one number per channel and latent frame of a chunk.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: TokenizerSpec, sigma_data: float = ModelSpec.sigma_data) -> None:
        super().__init__()
        self.spec = spec
        self.sigma_data = sigma_data
        self.encoder = Encoder(spec)
        self.quant_conv = CausalConv(spec.latent_channels, spec.latent_channels)
        self.post_quant_conv = CausalConv(spec.latent_channels, spec.latent_channels)
        self.decoder = Decoder(spec)
        table = (spec.latent_channels, spec.chunk_latent_frames)
        self.register_buffer("mean", torch.zeros(table))
        self.register_buffer("std", torch.ones(table))

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Encode a video to a latent at the scale of x0, BCTHW.

        Args:
            video_BCTHW: values in [-1, 1]; height and width are multiples of 8. Either 8k + 1
                frames of at most one chunk, or whole chunks, which are encoded one by one.

        Raises:
            ValueError: the number of frames, height or width does not fit.
        """
        chunks = self._chunks(video_BCTHW, self.spec.chunk_frames)
        return torch.cat([self._normalize(self.encode_raw(chunk)) for chunk in chunks], dim=2)

    def decode(self, x0_BCTHW: Tensor) -> Tensor:
        """Decode a latent at the scale of x0 to a video in [-1, 1], BCTHW.

        Raises:
            ValueError: the latent is longer than one chunk and is not a number of whole chunks.
        """
        chunks = self._chunks(x0_BCTHW, self.spec.chunk_latent_frames)
        video = torch.cat([self.decode_raw(self._denormalize(chunk)) for chunk in chunks], dim=2)
        return video.clamp(-1, 1)

    def compile_blocks(self) -> None:
        """Compile the residual blocks of the encoder at their first call."""
        for block in self.encoder.modules():
            if isinstance(block, ResBlock):
                block.compile(dynamic=False)

    def encode_raw(self, video_BCTHW: Tensor) -> Tensor:
        """Encode one chunk to a latent that is not normalised."""
        frames, height, width = video_BCTHW.shape[2:]
        spec = self.spec
        if frames % spec.temporal != 1 or height % spec.spatial or width % spec.spatial:
            raise ValueError(
                f"{frames} frames of {width}x{height} are not {spec.temporal}k + 1 frames "
                f"with sides that are multiples of {spec.spatial}"
            )
        return self.quant_conv(self.encoder(video_BCTHW))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Decode one latent chunk that is not normalised to a video that is not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def _normalize(self, z: Tensor) -> Tensor:
        mean, std = self._scale(z)
        return (z - mean) / std * self.sigma_data

    def _denormalize(self, x0: Tensor) -> Tensor:
        mean, std = self._scale(x0)
        return x0 / self.sigma_data * std + mean

    def _scale(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (table[:, : z.shape[2], None, None].to(z) for table in (self.mean, self.std))
        return mean, std

    @staticmethod
    def _chunks(x: Tensor, chunk: int) -> tuple[Tensor, ...]:
        frames = x.shape[2]
        if frames > chunk and frames % chunk:
            raise ValueError(f"{frames} frames are more than {chunk} and not a multiple of it")
        return x.split(chunk, dim=2)


class Encoder(nn.Module):
    """Encodes the Haar bands of a video to a latent through levels of residual blocks."""

    def __init__(self, spec: TokenizerSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        widths = [spec.channels * m for m in (1, *spec.multipliers)]
        resamples = round(math.log2(spec.spatial / spec.patch))
        self.conv_in = conv_pair(COLORS * spec.patch**3, widths[0])
        self.down = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            level: Parts = OrderedDict(block=res_blocks(inputs, outputs, spec.res_blocks))
            if i < resamples:
                level["downsample"] = Downsample(outputs)
            self.down.append(nn.Sequential(level))
        self.mid = middle(widths[-1])
        self.norm_out = FrameNorm(widths[-1])
        self.conv_out = conv_pair(widths[-1], spec.latent_channels)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        # The first frame is repeated to fill a whole patch in time, so that it is encoded alone.
        first = video_BCTHW[:, :, :1].expand(-1, -1, self.patch - 1, -1, -1)
        x = to_bands(torch.cat((first, video_BCTHW), dim=2), self.patch)
        x = self.mid(self.down(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Decodes a latent; mirrors the encoder, with one residual block more at each level.

    The middle block is small and attends over time, so it runs on all frames at once. The levels
    above it take most of the memory, and their convolutions reach back two frames at most, so they
    run on the latent in pieces. They always do: it costs only the copies of those frames, and the
    video must not depend on how much memory is free.
    """

    # Latent frames per piece. Memory grows with this number, not with the length of the video.
    piece = 4

    def __init__(self, spec: TokenizerSpec) -> None:
        super().__init__()
        self.patch = spec.patch
        widths = [spec.channels * m for m in spec.multipliers]
        resamples = round(math.log2(spec.spatial / spec.patch))
        last = len(widths) - 1
        self.conv_in = conv_pair(spec.latent_channels, widths[-1])
        self.mid = middle(widths[-1])
        self.up = nn.Sequential()
        for i, outputs in enumerate(widths):
            inputs = widths[min(i + 1, last)]
            level: Parts = OrderedDict(block=res_blocks(inputs, outputs, spec.res_blocks + 1))
            # Unlike in the encoder, the innermost level does not change the size.
            if 0 < last - i <= resamples:
                level["upsample"] = Upsample(outputs)
            self.up.append(nn.Sequential(level))
        self.norm_out = FrameNorm(widths[0])
        self.conv_out = conv_pair(widths[0], COLORS * spec.patch**3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        with streaming(self.up, self.conv_out):
            pixels = [self._pixels(piece) for piece in x.split(self.piece, dim=2)]
        return torch.cat(pixels, dim=2)[:, :, self.patch - 1 :]

    def _pixels(self, x: Tensor) -> Tensor:
        """Decode the next piece to frames."""
        for level in reversed(self.up):
            x = level(x)
        return from_bands(self.conv_out(F.silu(self.norm_out(x))), self.patch)


class CausalConv(nn.Module):
    """A causal 3-D convolution, padded in time with copies of the first frame, in space with zeros.

    Inside `streaming`, every input but the first is padded with the last frames of the one before.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: Extent = POINT, stride: Extent = POINT
    ) -> None:
        super().__init__()
        border = kernel[1] // 2 if stride[1] == 1 else 0
        self.past = kernel[0] - stride[0]
        self.streaming = False
        self.last_frames: Tensor | None = None
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, padding=(0, border, border))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[3:]
        # GPUs have fast kernels for channels-last convolutions in at most two dimensions. The copy
        # is free if x is channels-last already, as it is after another convolution.
        x = rearrange(x, "B C T H W -> B T H W C").contiguous()
        if self.past:
            first = x[:, :1].expand(-1, self.past, -1, -1, -1)
            x = torch.cat((first if self.last_frames is None else self.last_frames, x), dim=1)
        if self.past and self.streaming:
            self.last_frames = x[:, -self.past :].clone()
        weight, bias = self.conv3d.weight, self.conv3d.bias
        (step, *stride), (_, *border) = self.conv3d.stride, self.conv3d.padding
        if weight.shape[2:] == POINT:
            return rearrange(F.linear(x, weight.flatten(1), bias), "B T H W C -> B C T H W")
        in_space = weight.shape[2] == 1
        weight = weight.squeeze(2 if in_space else 4)
        if x.is_cuda:
            # With other weights, cuDNN copies the input of a convolution in time to channels first.
            weight = weight.contiguous(memory_format=torch.channels_last)
        if in_space:
            frames = rearrange(x, "B T H W C -> (B T) C H W")
            frames = F.conv2d(frames, weight, bias, stride, border)
            return rearrange(frames, "(B T) C H W -> B C T H W", B=len(x))
        flat = rearrange(x, "B T H W C -> B C T (H W)")
        flat = F.conv2d(flat, weight, bias, (step, 1))
        return flat.unflatten(3, (height, width))


@contextmanager
def streaming(*parts: nn.Module) -> Iterator[None]:
    """Make the parts treat each input as the continuation in time of the one before."""
    layers = [m for part in parts for m in part.modules() if isinstance(m, CausalConv)]
    for layer in layers:
        layer.streaming = True
    try:
        yield
    finally:
        for layer in layers:
            layer.streaming, layer.last_frames = False, None


class FrameNorm(nn.Module):
    """Normalises each frame over its channels and pixels, with a gain and bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return kernels.frame_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        frames = self.norm(rearrange(x, "B C T H W -> (B T) C H W"))
        return rearrange(frames, "(B T) C H W -> B C T H W", B=len(x))


class ResBlock(nn.Module):
    """A residual block: norm, SiLU and convolution, twice, with a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(inputs)
        self.conv1 = conv_pair(inputs, outputs)
        self.norm2 = FrameNorm(outputs)
        self.conv2 = conv_pair(outputs, outputs)
        self.nin_shortcut = nn.Identity() if inputs == outputs else CausalConv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv1(F.silu(self.norm1(x)))
        u = self.conv2(F.silu(self.norm2(u)))
        return self.nin_shortcut(x) + u


class Attention(nn.Module):
    """Residual single-head attention.

    `arrangement` is the einops pattern of (batch, tokens, 1 head, C): it chooses which axes of the
    video are tokens.
    """

    def __init__(
        self, channels: int, arrangement: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.arrangement = arrangement
        self.attend = attend
        self.norm = FrameNorm(channels)
        self.q = CausalConv(channels, channels)
        self.k = CausalConv(channels, channels)
        self.v = CausalConv(channels, channels)
        self.proj_out = CausalConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        # Fused kernels need contiguous inputs. Without them all scores of a frame, 14,080 x 14,080
        # at 704x1280, would be in memory.
        q, k, v = (
            rearrange(project(u), f"B C T H W -> {self.arrangement}").contiguous()
            for project in (self.q, self.k, self.v)
        )
        _, _, t, h, w = x.shape
        u = rearrange(self.attend(q, k, v), f"{self.arrangement} -> B C T H W", T=t, H=h, W=w)
        return x + self.proj_out(u)


class Downsample(nn.Module):
    """Halves height and width, then time: strided convolutions plus average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(channels, channels, SPACE, stride=(1, 2, 2))
        self.conv2 = CausalConv(channels, channels, TIME, stride=(2, 1, 1))
        self.conv3 = CausalConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Turn T frames of HxW (T odd) into (T + 1) / 2 frames of H/2 x W/2."""
        x = self.conv1(F.pad(x, (0, 1, 0, 1))) + reduce(
            x, "B C T (H h) (W w) -> B C T H W", "mean", h=2, w=2
        )
        x = torch.cat((x[:, :, :1], x), dim=2)
        x = self.conv2(x) + reduce(x, "B C (T t) H W -> B C T H W", "mean", t=2)
        return self.conv3(x)


class Upsample(nn.Module):
    """Doubles time, then height and width, by repetition and residual convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = CausalConv(channels, channels, TIME)
        self.conv2 = CausalConv(channels, channels, SPACE)
        self.conv3 = CausalConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Turn T frames of HxW into 2T - 1 frames of 2H x 2W, or 2T if they continue a video."""
        x = x.repeat_interleave(2, dim=2)
        x = x[:, :, 1:] if self.conv1.last_frames is None else x
        x = self.conv1(x) + x
        x = repeat(x, "B C T H W -> B T (H h) (W w) C", h=2, w=2)
        x = rearrange(x, "B T H W C -> B C T H W")
        x = self.conv2(x) + x
        return self.conv3(x)


def conv_pair(inputs: int, outputs: int) -> nn.Sequential:
    """Return a convolution in space, then one in time: a factorised 3-D convolution."""
    return nn.Sequential(CausalConv(inputs, outputs, SPACE), CausalConv(outputs, outputs, TIME))


def res_blocks(inputs: int, outputs: int, count: int) -> nn.Sequential:
    """Return `count` residual blocks, the first of which changes the number of channels."""
    widths = [inputs] + [outputs] * (count - 1)
    return nn.Sequential(*(ResBlock(width, outputs) for width in widths))


def middle(channels: int) -> nn.Sequential:
    """Return the innermost part of the encoder and decoder, the only one with attention."""
    return nn.Sequential(
        OrderedDict(
            block_1=ResBlock(channels, channels),
            attn_1=nn.Sequential(
                Attention(channels, "(B T) (H W) 1 C", kernels.wide_attention),
                Attention(channels, "(B H W) T 1 C", kernels.causal_attention),
            ),
            block_2=ResBlock(channels, channels),
        )
    )


def to_bands(x: Tensor, patch: int) -> Tensor:
    """Return the Haar bands of cubes of `patch` frames, rows and columns as channels.

    `haar` is linear, so its matrix is built from unit vectors and applied in one product. That is
    much faster than halving the whole video repeatedly.
    """
    pixels = COLORS * patch**3
    cubes = torch.eye(pixels, dtype=x.dtype, device=x.device)
    cubes = rearrange(cubes, "N (C t h w) -> N C t h w", C=COLORS, t=patch, h=patch)
    for _ in range(round(math.log2(patch))):
        cubes = haar(cubes)
    size = dict.fromkeys("thw", patch)
    x = rearrange(x, "B C (T t) (H h) (W w) -> B T H W (C t h w)", **size) @ cubes.flatten(1)
    return rearrange(x, "B T H W C -> B C T H W")


def from_bands(x: Tensor, patch: int) -> Tensor:
    """Invert `to_bands`."""
    bands = x.shape[1]
    cubes = torch.eye(bands, dtype=x.dtype, device=x.device)[..., None, None, None]
    for _ in range(round(math.log2(patch))):
        cubes = inverse_haar(cubes)
    size = dict.fromkeys("thw", patch)
    x = rearrange(x, "B C T H W -> B T H W C") @ cubes.flatten(1)
    return rearrange(x, "B T H W (C t h w) -> B C (T t) (H h) (W w)", **size)


def haar(x: Tensor) -> Tensor:
    """Return eight bands of half the size: sums and differences of 2x2x2 cells, divided by 8.

    The band is the slow part of the channel index; its bits, from high to low, are time, height
    and width.
    """
    x = rearrange(x, "B C (T t) (H h) (W w) -> B t h w C T H W", t=2, h=2, w=2)
    for axis in (1, 2, 3):
        a, b = x.unbind(axis)
        x = torch.stack((a + b, a - b), dim=axis) / 2
    return rearrange(x, "B t h w C T H W -> B (t h w C) T H W")


def inverse_haar(x: Tensor) -> Tensor:
    """Invert `haar`."""
    x = rearrange(x, "B (t h w C) T H W -> B t h w C T H W", t=2, h=2, w=2)
    for axis in (1, 2, 3):
        low, high = x.unbind(axis)
        x = torch.stack((low + high, low - high), dim=axis)
    return rearrange(x, "B t h w C T H W -> B C (T t) (H h) (W w)")
