"""mp4 files <-> uint8 frames: probe, choose frames, read, resize, write, contact sheet.

Dimension letters: C channels (RGB), T frames, H height, W width.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from cosmos_cli import files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import containers

if TYPE_CHECKING:
    from torchcodec.decoders import VideoDecoder, VideoStreamMetadata

FPS_POLICIES = ("keep", "resample", "reject")
RESIZE_MODES = ("stretch", "crop", "pad")

# Containers round time stamps to their clock, Matroska to whole milliseconds.
CLOCK_SECONDS = 1e-3
# Rates this close are the same rate: 23.976 is 24, 25 is not.
FPS_TOLERANCE = 0.01
# Pixels this near to it are square.
SQUARE = 0.01
# Frames are decoded in chunks of about this size, so a 4K clip is never in memory whole. Below 32
# MiB glibc uses the memory of a chunk again for the next; above, every page of it is mapped anew.
CHUNK_BYTES = 2**24
# Same frames, same bytes: with AVX-512, x264's macroblock tree (build 164) depends on where memory
# lies, and any stream on the number of threads.
X264_REPRODUCIBLE = {"threads": 4, "x264-params": "cpu-independent=1"}


class VideoError(Exception):
    """Why a file cannot be used, in one short sentence."""


@dataclass(frozen=True)
class VideoInfo:
    """A video stream, or a part of one. Sizes in pixels as shown, after rotation.

    `begin` is the time stamp of its first frame, `first` that frame's number in the file.
    """

    frames: int
    fps: float
    height: int
    width: int
    seconds: float
    codec: str
    begin: float = 0.0
    first: int = 0


@dataclass(frozen=True)
class Clip:
    """`length` frames of rate `fps` in a row, number `start` of the video and those behind it.

    Args:
        first: number in the file of the video's frame 0.
        begin: time stamp of the video's frame 0. With it a frame is the one on screen at its time;
            without it frames go by their number in the file.
    """

    start: int
    fps: float
    length: int
    first: int = 0
    begin: float | None = None

    def __len__(self) -> int:
        return self.length

    @property
    def indices(self) -> range:
        """The numbers of its frames in the file; none when they go by time."""
        first = self.first + self.start
        return range(first, first + (self.length if self.begin is None else 0))

    @property
    def seconds(self) -> list[float]:
        """The time stamps of its frames; none when they go by number."""
        if self.begin is None:
            return []
        # A clock's width late, so that a time stamp rounded up still counts as shown.
        zero = self.begin + CLOCK_SECONDS
        return [zero + k / self.fps for k in range(self.start, self.start + self.length)]


def probe(path: Path) -> VideoInfo:
    """The video stream of a file, from a scan of all its packets; only one frame is decoded.

    Raises:
        VideoError: the file is no video, is empty or is truncated.
    """
    decoder = _open(path)
    meta = decoder.metadata
    if not meta.num_frames or not meta.average_fps:
        raise VideoError("0 frames")
    if not meta.duration_seconds:
        raise VideoError("no video stream but a picture, as the cover of a song")
    assert meta.height and meta.width
    fps = meta.average_fps
    header_fps = meta.average_fps_from_header
    # The header has the exact rate, but for variable rates it names the clock's instead.
    if header_fps and _same_rate(fps, header_fps):
        fps = header_fps
    if containers.lacks(path) > 0:
        wanted = meta.num_frames_from_header
        found = f"{meta.num_frames} of {wanted}" if wanted else f"only {meta.num_frames}"
        raise VideoError(f"truncated: {found} frames are in the file")
    _check_first_frame(path, decoder)
    return VideoInfo(
        frames=meta.num_frames,
        fps=float(fps),
        height=meta.height,
        width=round(meta.width * _pixel_aspect(meta)),
        seconds=float(meta.duration_seconds),
        codec=meta.codec or "unknown",
        begin=meta.begin_stream_seconds or 0.0,
    )


def _pixel_aspect(meta: VideoStreamMetadata) -> float:
    """Width of a pixel over its height as shown, where the file says that they differ."""
    aspect = float(meta.pixel_aspect_ratio or 1)
    # Some encoders round the shape of the picture into that of a pixel.
    if abs(aspect - 1) < SQUARE:
        return 1.0
    return 1 / aspect if round(abs(meta.rotation or 0)) % 180 == 90 else aspect


def _check_first_frame(path: Path, decoder: VideoDecoder) -> None:
    """Refuses what torchcodec 0.13 cannot go back to the start of.

    Traps: of MPEG's streams, which have no index, it finds no frame or a later one; when an edit
    list hides the first key frame, it silently returns the frames of the next one instead. In an
    AVI, B-frames stand in the order in which they are decoded.
    """
    try:
        late = decoder.get_frame_at(0).pts_seconds - (decoder.metadata.begin_stream_seconds or 0)
    except RuntimeError:
        late = math.inf
    if abs(late) <= CLOCK_SECONDS:
        return
    if containers.is_mpeg_stream(path):
        raise VideoError("an MPEG stream has no index: `ffmpeg -i IN -c copy OUT.mp4` makes one")
    if containers.is_avi(path) and late < math.inf:
        fix = "`ffmpeg -fflags +genpts -i IN -c copy OUT.mp4` makes them"
        raise VideoError(f"an AVI with B-frames has no time stamps: {fix}")
    if late == math.inf:
        raise VideoError("damaged: the first frame does not decode")
    raise VideoError("cut without re-encoding, its first key frame is hidden: re-encode it")


def part(info: VideoInfo, span: range) -> VideoInfo:
    """The frames `span` of a video of constant rate as a video of their own.

    Raises:
        VideoError: the file does not have them.
    """
    if span.stop > info.frames:
        raise VideoError(f"ends at frame {span.stop} of a file of {info.frames}")
    return replace(
        info,
        frames=len(span),
        seconds=len(span) / info.fps,
        begin=info.begin + span.start / info.fps,
        first=span.start,
    )


def frames_at_policy(info: VideoInfo, policy: str, fps: float) -> int:
    """Number of frames the file has under a policy of `FPS_POLICIES`."""
    if policy != "resample":
        return info.frames
    return max(0, -int(-(info.seconds - CLOCK_SECONDS) * fps // 1))


def select_clips(
    info: VideoInfo, policy: str, fps: float, num_frames: int, stride: int, max_clips: int | None
) -> list[Clip]:
    """The clips of a file, starting at frame 0, stride, 2 * stride... of the clip's own rate.

    keep: every source frame at the source's rate. resample: constant rate `fps`, each frame the
    one on screen at that time. reject: as keep, but only for sources whose rate is `fps`.

    Raises:
        VideoError: the rate is rejected, or there are fewer than `num_frames` frames.
    """
    if policy not in FPS_POLICIES:
        raise ValueError(f"policy {policy!r} is none of {FPS_POLICIES}")
    if policy == "reject" and not _same_rate(info.fps, fps):
        raise VideoError(f"{info.fps:.4g} fps where {fps:.4g} are wanted")
    rate = info.fps if policy == "keep" else fps
    available = frames_at_policy(info, policy, fps)
    if available < num_frames:
        source = f" (from {info.frames} at {info.fps:.4g})" if policy == "resample" else ""
        raise VideoError(
            f"too short: {available} frames at {rate:.4g} fps{source}, {num_frames} are needed"
        )
    starts = range(0, available - num_frames + 1, stride)[:max_clips]
    begin = info.begin if policy == "resample" else None
    return [Clip(s, rate, num_frames, info.first, begin) for s in starts]


def read_frames(path: Path, indices: Sequence[int]) -> Tensor:
    """The named source frames at full size, uint8 (3, T, H, W).

    Raises:
        VideoError: a frame does not exist or does not decode.
    """
    return torch.cat([chunk.transpose(0, 1) for chunk in _decode(path, indices, ())], dim=1)


def read_clip(
    path: Path, clip: Clip, height: int, width: int, resize: str, device: str = "cpu"
) -> Tensor:
    """A clip at another size, uint8 (3, T, height, width); `resize` as for `resize_frames`.

    It is decoded on the CPU and resized on `device`; every device gives the same numbers.

    Raises:
        VideoError: a frame does not exist or does not decode.
    """
    decoded = _decode(path, clip.indices, clip.seconds)
    aspect = _pixel_aspect(_open_again(path, files.stamp_of(path)).decoder.metadata)
    chunks = (resize_frames(chunk.to(device), height, width, resize, aspect) for chunk in decoded)
    return torch.cat([chunk.transpose(0, 1) for chunk in chunks], dim=1)


def read_small(path: Path, info: VideoInfo, count: int, width: int) -> Tensor:
    """`count` evenly spaced frames, first and last included, `width` pixels wide, uint8 CTHW.

    Raises:
        VideoError: one of them does not decode.
    """
    chosen = [info.first + round(k * (info.frames - 1) / max(1, count - 1)) for k in range(count)]
    height = max(1, min(4 * width, round(info.height * width / info.width)))
    decoded = _decode(path, chosen, ())
    chunks = (resize_frames(chunk, height, width, "stretch") for chunk in decoded)
    return torch.cat([chunk.transpose(0, 1) for chunk in chunks], dim=1)


def resize_frames(
    frames: Tensor, height: int, width: int, mode: str, pixel_aspect: float = 1.0
) -> Tensor:
    """uint8 frames (..., ..., height, width), in whichever order the first two dimensions come.

    stretch: the aspect ratio is not kept. crop: scaled to cover, the centre cut out. pad: scaled
    to fit, between black bars. `pixel_aspect` is the width of a pixel over its height.

    Source: stretch is cosmos-predict1 `training/datasets/dataset_video.py`, bilinear with
    antialiasing. The reference truncates to uint8; rounding removes its loss of half a level.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"resize {mode!r} is none of {RESIZE_MODES}")
    old_height, old_width = frames.shape[-2], frames.shape[-1] * pixel_aspect
    if mode == "stretch":
        return _interpolate(frames, height, width)
    if mode == "crop":
        scale = max(height / old_height, width / old_width)
        scaled = _interpolate(
            frames,
            max(height, round(old_height * scale)),
            max(width, round(old_width * scale)),
        )
        top, left = (scaled.shape[-2] - height) // 2, (scaled.shape[-1] - width) // 2
        return scaled[..., top : top + height, left : left + width]
    scale = min(height / old_height, width / old_width)
    new_height = min(height, max(1, round(old_height * scale)))
    new_width = min(width, max(1, round(old_width * scale)))
    top, left = (height - new_height) // 2, (width - new_width) // 2
    margins = (left, width - new_width - left, top, height - new_height - top)
    return F.pad(_interpolate(frames, new_height, new_width), margins)


def to_model(video: Tensor) -> Tensor:
    """float32 in [-1, 1] from uint8, any shape. Source: cosmos-predict1, u8 / 127.5 - 1."""
    return video.float() / 127.5 - 1


def to_uint8(video: Tensor) -> Tensor:
    """uint8 from [-1, 1], any shape; the exact inverse of `to_model`.

    The reference truncates; rounding removes its loss of half a level on average.
    """
    return ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def write_mp4(path: Path, video_CTHW: Tensor, fps: float, crf: float) -> None:
    """Writes H.264 yuv420p in an mp4 container, whatever the suffix of `path`; same bytes each run.

    Raises:
        UserError: FFmpeg is missing or has no H.264 encoder.
    """
    _, frames, height, width = video_CTHW.shape
    if video_CTHW.dtype != torch.uint8 or frames == 0:
        raise ValueError(f"video must be uint8 with frames, got {video_CTHW.dtype}, {frames}")
    if height % 2 or width % 2:
        raise ValueError(f"height and width must be even for yuv420p, got {height}x{width}")
    with _needs_ffmpeg("FFmpeg is missing"):
        from torchcodec.encoders import VideoEncoder
    frames_TCHW = video_CTHW.transpose(0, 1).contiguous().cpu()
    with _needs_ffmpeg("this FFmpeg cannot encode H.264 with libx264"):
        data = VideoEncoder(frames_TCHW, frame_rate=fps).to_tensor(
            "mp4",
            codec="libx264",
            pixel_format="yuv420p",
            crf=crf,
            # The encoder converts with the BT.601 matrix; untagged, players take HD for BT.709.
            extra_options={
                **X264_REPRODUCIBLE,
                "colorspace": "smpte170m",
                "color_primaries": "bt709",
                "color_trc": "bt709",
                "color_range": "tv",
            },
        )
    path.write_bytes(data.numpy().tobytes())


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two uint8 tensors in dB; 99 when they are equal."""
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else 99.0


def contact_sheet(
    video_CTHW: Tensor, columns: int = 4, rows: int = 2, width: int = 320
) -> Image.Image:
    """An image of evenly spaced frames, first and last included, each `width` pixels wide."""
    _, frames, height, old_width = video_CTHW.shape
    chosen = torch.linspace(0, frames - 1, columns * rows).round().long()
    cell_height = max(1, round(height * width / old_width))
    cells = resize_frames(video_CTHW[:, chosen].cpu(), cell_height, width, "stretch")
    grid = cells.unflatten(1, (rows, columns)).permute(1, 3, 2, 4, 0)
    return Image.fromarray(grid.reshape(rows * cell_height, columns * width, 3).numpy())


def _same_rate(a: float, b: float) -> bool:
    return abs(a - b) <= FPS_TOLERANCE * b


def _interpolate(frames: Tensor, height: int, width: int) -> Tensor:
    if frames.shape[-2:] == (height, width):
        return frames
    if frames.is_cuda:
        return interpolate_exactly(frames, height, width)
    # In integers: twenty times as fast as in floats, off by about a level at most.
    return F.interpolate(
        frames, (height, width), mode="bilinear", antialias=True, align_corners=False
    )


def interpolate_exactly(frames: Tensor, height: int, width: int) -> Tensor:
    """What PyTorch's integer interpolation on a CPU gives, bit for bit, on any device.

    A GPU has it for floats alone. The columns first, then the rows, each rounded to uint8; in
    float64, where the sums are exact.

    Source: PyTorch, `aten/src/ATen/native/cpu/UpSampleKernel.cpp`.
    """
    for dim, size in ((-1, width), (-2, height)):
        if frames.shape[dim] != size:
            weights, one = _integer_weights(frames.shape[dim], size)
            weights = weights.to(frames.device)
            # Frame by frame: in float64 a frame takes eight times its bytes.
            sums = (frame.transpose(dim, -1).double() @ weights for frame in frames)
            rounded = [(s / one + 0.5).floor().clamp(0, 255).to(torch.uint8) for s in sums]
            frames = torch.stack(rounded).transpose(dim, -1)
    return frames


@lru_cache(maxsize=8)
def _integer_weights(old: int, new: int) -> tuple[Tensor, int]:
    """Weights (old, new) of the antialiased bilinear filter in whole numbers, and their unit.

    The largest weight has 15 bits.
    """
    scale = old / new
    radius = max(scale, 1.0)
    centres = scale * (torch.arange(new, dtype=torch.float64) + 0.5)
    pixels = torch.arange(old, dtype=torch.float64)[:, None] + 0.5
    weights = (1 - (pixels - centres).abs() / radius).clamp(min=0)
    weights /= weights.sum(0)
    largest, bits = weights.max().item(), 0
    while bits < 22 and int(0.5 + largest * 2 ** (bits + 1)) < 2**15:
        bits += 1
    return (weights * 2**bits + 0.5).floor(), 2**bits


@contextmanager
def _needs_ffmpeg(what: str) -> Iterator[None]:
    # torchcodec raises RuntimeError, on import too, when FFmpeg's libraries are not there.
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        fix = "run `cosmos setup --install`"
        raise UserError(what, code=ExitCode.ENVIRONMENT, where="video", fix=fix) from error


def _open(path: Path) -> VideoDecoder:
    with _needs_ffmpeg("FFmpeg is missing"):
        from torchcodec.decoders import VideoDecoder
    try:
        status = path.stat()
        # Only then opened: a pipe would have us wait for whoever writes to it.
        if not stat.S_ISREG(status.st_mode):
            raise VideoError("not a file")
        path.open("rb").close()
        path.name.encode()
    except FileNotFoundError as error:
        raise VideoError("no such file") from error
    except OSError as error:
        raise VideoError(f"cannot be read: {os.strerror(error.errno or 0)}") from error
    except UnicodeEncodeError as error:
        raise VideoError("its name is not UTF-8; rename it") from error
    if status.st_size == 0:
        raise VideoError("the file is empty")
    try:
        return VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=0)
    except ValueError as error:
        raise VideoError("no video stream") from error
    except RuntimeError as error:
        boxes, lacking = containers.mp4_boxes(path)
        if boxes and (lacking > 0 or b"moov" not in boxes):
            raise VideoError("truncated: the index of the mp4 is missing") from error
        raise VideoError("no video stream" if boxes else "not a video") from error


def _decode(path: Path, indices: Sequence[int], seconds: Sequence[float]) -> Iterator[Tensor]:
    """Yield the frames of these numbers or, else, times, in uint8 chunks (T, 3, H, W)."""
    reader = _open_again(path, files.stamp_of(path))
    meta = reader.decoder.metadata
    assert meta.height and meta.width
    size = max(1, CHUNK_BYTES // (3 * meta.height * meta.width))
    numbers = list(indices) or reader.packets.shown_at(seconds)
    for first in range(0, len(numbers), size):
        try:
            yield reader.read(numbers[first : first + size])
        except (RuntimeError, IndexError) as error:
            at = f"frame {indices[first]}" if indices else f"{seconds[first]:.2f} s"
            reason = f"damaged: decoding fails after {at} ({meta.num_frames} frames in the file)"
            raise VideoError(reason) from error


class _Reader:
    """Reads frames of a file and compares the time stamp of each with that of its packet.

    Trap: after a seek, a decoder may show later frames than those asked for, or damaged ones where
    the file calls frames key frames that are none. Then every frame is reached from the first one.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.decoder = path, _open(path)
        try:
            self.packets = containers.scan(path, self.decoder.stream_index)
        except ValueError as error:
            raise VideoError("damaged: its frames have no time stamps") from error
        found, counted = self.decoder.metadata.num_frames, len(self.packets.pts)
        if found != counted:
            raise VideoError(f"damaged: two readers find {found} and {counted} frames in it")
        self.seeks = self.packets.honest
        self.last = counted

    def read(self, numbers: list[int]) -> Tensor:
        """Return the frames of these numbers, uint8 (T, 3, H, W).

        Raises:
            RuntimeError: a frame does not decode.
            IndexError: there is no such frame.
            VideoError: the decoder shows other frames.
        """
        self._require_distinct(numbers)
        if self.seeks:
            try:
                frames = self._shown(numbers)
            except RuntimeError:
                frames = None
            if frames is not None:
                return frames
            self.seeks = False
        first = min(numbers)
        if first <= self.last:
            self.decoder, self.last = self._decoder_from_start(), -1
        if self.last < 0 < first:
            # The first read of a decoder does not seek, if it is of frame 0.
            self.decoder.get_frame_at(0)
        frames, self.last = self._shown(numbers), max(numbers)
        if frames is None:
            at = self.packets.pts[first] * self.packets.tick
            raise VideoError(f"the decoder leaves out frames after {at:.2f} s: re-encode it")
        return frames

    def _shown(self, numbers: list[int]) -> Tensor | None:
        """Return the frames, None when the decoder shows others."""
        batch = self.decoder.get_frames_at(numbers)
        expected = torch.tensor([self.packets.pts[n] for n in numbers], dtype=torch.float64)
        tick = self.packets.tick
        same = ((batch.pts_seconds - expected * tick).abs() < tick / 2).all()
        return batch.data if same else None

    def _decoder_from_start(self) -> VideoDecoder:
        """Return a decoder to which only the first frame is a key frame."""
        from torchcodec.decoders import VideoDecoder

        rows = enumerate(zip(self.packets.pts, self.packets.durations, strict=True))
        frames = [{"pts": p, "duration": d, "key_frame": int(n == 0)} for n, (p, d) in rows]
        mappings = json.dumps({"frames": frames})
        return VideoDecoder(self.path, num_ffmpeg_threads=0, custom_frame_mappings=mappings)

    def _require_distinct(self, numbers: list[int]) -> None:
        """Refuse frames that share a time stamp: nothing tells which of them a decoder shows."""
        pts = self.packets.pts
        for n in numbers:
            if n < len(pts) and pts[n] in (*pts[max(0, n - 1) : n], *pts[n + 1 : n + 2]):
                raise VideoError(
                    f"two frames have one time stamp, {pts[n] * self.packets.tick:.2f} s"
                )


@lru_cache(maxsize=1)
def _open_again(path: Path, _version: tuple[int, int]) -> _Reader:
    """Return the reader of a file, kept for its next clip: opening one scans all its packets."""
    return _Reader(path)
