"""Read video files as uint8 frames: probe, select clips, decode, resize.

Dimension letters: C channels (RGB), T frames, H height, W width.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosmos_cli import files
from cosmos_cli.model import containers, rgb

if TYPE_CHECKING:
    from torchcodec.decoders import VideoDecoder, VideoStreamMetadata

# FFmpeg's names of the transfer functions PQ and HLG.
HDR = ("smpte2084", "arib-std-b67")
FPS_POLICIES = ("keep", "resample", "reject")

# Containers round time stamps to their time base; that of Matroska is a millisecond.
CLOCK_SECONDS = 1e-3
# Relative: frame rates this close count as equal, 23.976 and 24 but not 24 and 25.
FPS_TOLERANCE = 0.01
# Pixels count as square if their aspect ratio is this close to 1.
SQUARE = 0.01
# Frames are decoded in chunks of about this size, so that a 4K clip is never in memory as a whole.
# Below 32 MiB, glibc reuses the memory of a chunk; above, it maps every page anew for the next one.
CHUNK_BYTES = 2**24


class VideoError(Exception):
    """Raised if a file cannot be used; the message says why in one short sentence."""


@dataclass(frozen=True)
class VideoInfo:
    """Describes a video stream or a part of one. Sizes are in pixels as displayed, after rotation.

    `begin` is the time stamp of its first frame in seconds, `first` the frame's number in the file.
    `hdr` is True for PQ and HLG, which are decoded without tone mapping. `interlaced` is True if
    its first frame is marked as interlaced.
    """

    frames: int
    fps: float
    height: int
    width: int
    seconds: float
    codec: str
    begin: float = 0.0
    first: int = 0
    hdr: bool = False
    interlaced: bool = False


@dataclass(frozen=True)
class Clip:
    """Names `length` consecutive frames of a video at rate `fps`, from its frame `start` on.

    Args:
        first: number in the file of the video's frame 0.
        begin: time stamp of the video's frame 0. With it, frames are selected by time: each is the
            one on screen then. Without it, frames are selected by their number in the file.
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
        """The numbers of its frames in the file; empty when frames are selected by time."""
        first = self.first + self.start
        return range(first, first + (self.length if self.begin is None else 0))

    @property
    def seconds(self) -> list[float]:
        """The time stamps of its frames; empty when frames are selected by number."""
        if self.begin is None:
            return []
        # Ask a little late, so that a frame whose time stamp was rounded up is already shown.
        zero = self.begin + CLOCK_SECONDS
        return [zero + k / self.fps for k in range(self.start, self.start + self.length)]


def probe(path: Path) -> VideoInfo:
    """Describe the video stream of a file. Scans all packets but decodes only one frame.

    Raises:
        VideoError: the file is not a video, is empty or is truncated.
    """
    decoder = _open(path)
    meta = decoder.metadata
    if containers.lacks(path) > 0:
        count, wanted = meta.num_frames or 0, meta.num_frames_from_header
        found = f"{count} of {wanted}" if wanted else f"only {count}"
        raise VideoError(f"truncated: {found} frames are in the file")
    if not meta.num_frames or not meta.average_fps:
        raise VideoError("0 frames")
    if not meta.duration_seconds:
        raise VideoError("no video stream but a picture, such as the cover of a song")
    assert meta.height and meta.width
    fps = meta.average_fps
    header_fps = meta.average_fps_from_header
    # The header has the exact rate, but with a variable rate it has that of the time base.
    if header_fps and _same_rate(fps, header_fps):
        fps = header_fps
    _check_first_frame(path, decoder)
    return VideoInfo(
        frames=meta.num_frames,
        fps=float(fps),
        height=meta.height,
        width=round(meta.width * _pixel_aspect(meta)),
        seconds=float(meta.duration_seconds),
        codec=meta.codec or "unknown",
        begin=meta.begin_stream_seconds or 0.0,
        hdr=meta.color_transfer_characteristic in HDR,
        interlaced=containers.is_interlaced(path, decoder.stream_index),
    )


def _pixel_aspect(meta: VideoStreamMetadata) -> float:
    """Return the width of a displayed pixel over its height; 1 unless the file says otherwise."""
    aspect = float(meta.pixel_aspect_ratio or 1)
    # Some encoders put the rounding of the picture size into the pixel aspect ratio.
    if abs(aspect - 1) < SQUARE:
        return 1.0
    return 1 / aspect if round(abs(meta.rotation or 0)) % 180 == 90 else aspect


def _check_first_frame(path: Path, decoder: VideoDecoder) -> None:
    """Refuse files whose first frame can neither be sought nor be decoded from the start.

    Traps: MPEG program and transport streams have no index, and torchcodec 0.13 finds no frame or a
    later one. If an edit list hides the first key frame, it silently returns frames from the next
    key frame; `_Reader` then decodes from the start. In an AVI, B-frames are stored in decoding
    order.
    """
    try:
        late = decoder.get_frame_at(0).pts_seconds - (decoder.metadata.begin_stream_seconds or 0)
    except RuntimeError:
        late = math.inf
    if abs(late) <= CLOCK_SECONDS:
        return
    if containers.is_mpeg_stream(path):
        raise VideoError(f"an MPEG stream has no index: {repair(path, '-c copy')} makes one")
    if containers.is_avi(path) and late < math.inf:
        fix = f"{repair(path, '-c copy', '-fflags +genpts')} makes them"
        raise VideoError(f"an AVI with B-frames has no time stamps: {fix}")
    if late == math.inf:
        raise VideoError("damaged: the first frame does not decode")
    reader = _open_again(path)
    try:
        reader.read([0])
    except (RuntimeError, VideoError) as error:
        why = "their key frame was cut off, or time stamps are wrong"
        what = f"its first frames do not decode: {why}: {repair(path)} keeps what can be decoded"
        raise VideoError(what) from error


# Re-encodes with hardly any loss.
_ENCODE = "-crf 12 -pix_fmt yuv420p"


def repair(path: Path, how: str = _ENCODE, before: str = "") -> str:
    """Return the command that replaces a video by a readable one and keeps the old file.

    The old file gets a suffix that is not a video's, so captions keep matching the new one.
    """
    if not str(path).isprintable():
        return f"`ffmpeg {before} -i IN {how} OUT.mp4`".replace("  ", " ")
    old, kept, new = map(quote, (str(path), f"{path}.orig", str(path.with_suffix(".mp4"))))
    command = f"ffmpeg {before} -i {kept} {how} {new}"
    return f"`mv {old} {kept} && {command.replace('  ', ' ')}`"


def part(info: VideoInfo, span: range) -> VideoInfo:
    """Return the frames `span` of a constant-rate video as a video of their own.

    Raises:
        VideoError: the file has fewer frames.
    """
    if span.stop > info.frames:
        raise VideoError(f"ends at frame {span.stop}, but the file has {info.frames} frames")
    return replace(
        info,
        frames=len(span),
        seconds=len(span) / info.fps,
        begin=info.begin + span.start / info.fps,
        first=span.start,
    )


def frames_at_policy(info: VideoInfo, policy: str, fps: float) -> int:
    """Return the number of frames that the file has under a policy of `FPS_POLICIES`."""
    if policy != "resample":
        return info.frames
    return max(0, -int(-(info.seconds - CLOCK_SECONDS) * fps // 1))


def select_clips(
    info: VideoInfo, policy: str, fps: float, num_frames: int, stride: int, max_clips: int | None
) -> list[Clip]:
    """Return the clips of a file. They start at frame 0, stride, 2 * stride ... of the clip rate.

    keep: every source frame, at the source's rate. resample: constant rate `fps`, where each frame
    is the one on screen at its time. reject: like keep, but only for sources whose rate is `fps`.

    Raises:
        VideoError: the rate is rejected, or there are fewer than `num_frames` frames.
    """
    if policy not in FPS_POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {FPS_POLICIES}")
    if policy == "reject" and not _same_rate(info.fps, fps):
        raise VideoError(f"{info.fps:.4g} fps instead of {fps:.4g}")
    rate = info.fps if policy == "keep" else fps
    available = frames_at_policy(info, policy, fps)
    if available < num_frames:
        source = f" (from {info.frames} at {info.fps:.4g})" if policy == "resample" else ""
        found = f"{available} frames at {rate:.4g} fps{source}"
        raise VideoError(f"too short: {found}, {num_frames} are needed")
    starts = range(0, available - num_frames + 1, stride)[:max_clips]
    begin = info.begin if policy == "resample" else None
    return [Clip(s, rate, num_frames, info.first, begin) for s in starts]


def read_frames(path: Path, indices: Sequence[int]) -> Tensor:
    """Decode the source frames of these numbers at full size, uint8 (3, T, H, W).

    Raises:
        VideoError: a frame does not exist or does not decode.
    """
    return torch.cat([chunk.transpose(0, 1) for chunk in _decode(path, indices, ())], dim=1)


def read_clip(
    path: Path, clip: Clip, height: int, width: int, resize: str, device: str = "cpu"
) -> Tensor:
    """Decode a clip and resize it to uint8 (3, T, height, width); `resize` as in `resize_frames`.

    Frames are decoded on the CPU and resized on `device`. All devices give the same numbers.

    Raises:
        VideoError: a frame does not exist or does not decode.
    """
    decoded = _decode(path, clip.indices, clip.seconds)
    aspect = _pixel_aspect(_open_again(path).decoder.metadata)
    chunks = (
        rgb.resize_frames(chunk.to(device), height, width, resize, aspect) for chunk in decoded
    )
    return torch.cat([chunk.transpose(0, 1) for chunk in chunks], dim=1)


def read_small(path: Path, info: VideoInfo, count: int, width: int) -> Tensor:
    """Decode `count` evenly spaced frames, first and last included, `width` wide, uint8 CTHW.

    Raises:
        VideoError: one of them does not decode.
    """
    chosen = [info.first + round(k * (info.frames - 1) / max(1, count - 1)) for k in range(count)]
    height = max(1, min(4 * width, round(info.height * width / info.width)))
    decoded = _decode(path, chosen, ())
    chunks = (rgb.resize_frames(chunk, height, width, "stretch") for chunk in decoded)
    return torch.cat([chunk.transpose(0, 1) for chunk in chunks], dim=1)


def _same_rate(a: float, b: float) -> bool:
    return abs(a - b) <= FPS_TOLERANCE * b


def _open(path: Path) -> VideoDecoder:
    with containers.needs_ffmpeg("FFmpeg is missing"):
        from torchcodec.decoders import VideoDecoder
    try:
        status = path.stat()
        # Checked before opening, because opening a pipe waits for a writer.
        if not stat.S_ISREG(status.st_mode):
            raise VideoError("not a file")
        path.open("rb").close()
        str(path).encode()
    except FileNotFoundError as error:
        raise VideoError("no such file") from error
    except OSError as error:
        raise VideoError(f"cannot be read: {os.strerror(error.errno or 0)}") from error
    except UnicodeEncodeError as error:
        raise VideoError("its path is not UTF-8; rename it") from error
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
    """Yield frames in uint8 chunks (T, 3, H, W), by number or, without numbers, by time."""
    reader = _open_again(path)
    meta = reader.decoder.metadata
    assert meta.height and meta.width
    size = max(1, CHUNK_BYTES // (3 * meta.height * meta.width))
    numbers = list(indices) or reader.packets.shown_at(seconds)
    for first in range(0, len(numbers), size):
        try:
            yield reader.read(numbers[first : first + size])
        except (RuntimeError, IndexError) as error:
            reader.require_one_size(numbers[first : first + size])
            at = f"frame {indices[first]}" if indices else f"{seconds[first]:.2f} s"
            reason = f"damaged: decoding fails after {at} ({meta.num_frames} frames in the file)"
            raise VideoError(reason) from error


class _Reader:
    """Reads frames of a file and checks the time stamp of each against that of its packet.

    Trap: after a seek, a decoder may return later frames than those asked for, or damaged ones if
    the file marks frames as key frames that are not. The file is then decoded from the first frame.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.decoder = path, _open(path)
        try:
            self.packets = containers.scan_packets(path, self.decoder.stream_index)
        except ValueError as error:
            what = f"some frames have no time stamps: {repair(path)} makes them"
            raise VideoError(what) from error
        found, counted = self.decoder.metadata.num_frames, len(self.packets.pts)
        if found != counted:
            raise VideoError(f"damaged: torchcodec finds {found} frames in it, PyAV {counted}")
        self.seeks = self.packets.honest
        self.last = counted

    def read(self, numbers: list[int]) -> Tensor:
        """Return the frames of these numbers, uint8 (T, 3, H, W).

        Raises:
            RuntimeError: a frame does not decode.
            IndexError: there is no such frame.
            VideoError: the decoder returns other frames.
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
            # The first read of a decoder does not seek if it asks for frame 0.
            self.decoder.get_frame_at(0)
        frames, self.last = self._shown(numbers), max(numbers)
        if frames is None:
            at = self.packets.pts[first] * self.packets.tick
            raise VideoError(
                f"the decoder skips frames after {at:.2f} s: {repair(self.path)} makes it readable"
            )
        return frames

    def require_one_size(self, numbers: list[int]) -> None:
        """Refuse frames of several sizes, as in a recording whose resolution changes on the way.

        Call it after these frames failed to decode together.
        """
        meta, first = self.decoder.metadata, ""
        for number in numbers:
            try:
                frame = self.decoder.get_frame_at(number)
            except (RuntimeError, IndexError):
                return
            size = "x".join(map(str, reversed(frame.data.shape[1:])))
            first = first or f"{meta.width}x{meta.height}"
            if size != first:
                fix = repair(self.path, f"-vf scale={meta.width}:{meta.height},setsar=1 {_ENCODE}")
                raise VideoError(
                    f"its frames change from {first} to {size} at {frame.pts_seconds:.2f} s: "
                    f"{fix} makes one size"
                )

    def _shown(self, numbers: list[int]) -> Tensor | None:
        """Return the frames, or None if the decoder returns others."""
        batch = self.decoder.get_frames_at(numbers)
        expected = torch.tensor([self.packets.pts[n] for n in numbers], dtype=torch.float64)
        tick = self.packets.tick
        same = ((batch.pts_seconds - expected * tick).abs() < tick / 2).all()
        return batch.data if same else None

    def _decoder_from_start(self) -> VideoDecoder:
        """Return a decoder that is told that only the first frame is a key frame."""
        from torchcodec.decoders import VideoDecoder

        rows = enumerate(zip(self.packets.pts, self.packets.durations, strict=True))
        frames = [{"pts": p, "duration": d, "key_frame": int(n == 0)} for n, (p, d) in rows]
        mappings = json.dumps({"frames": frames})
        return VideoDecoder(self.path, num_ffmpeg_threads=0, custom_frame_mappings=mappings)

    def _require_distinct(self, numbers: list[int]) -> None:
        """Refuse frames that share a time stamp, because decoded frames could not be told apart."""
        pts = self.packets.pts
        for n in numbers:
            if n < len(pts) and pts[n] in (*pts[max(0, n - 1) : n], *pts[n + 1 : n + 2]):
                at = pts[n] * self.packets.tick
                raise VideoError(f"two frames have the same time stamp, {at:.2f} s")


class _Opened(threading.local):
    """The reader that a thread opened last. Two threads must not share one."""

    key: tuple[Path, tuple[int, int]] | None = None
    reader: _Reader


_opened = _Opened()


def _open_again(path: Path) -> _Reader:
    """Return the reader of a file. The last one is kept, because opening one scans all packets."""
    key = path, files.stamp_of(path)
    if _opened.key != key:
        _opened.key = None
        _opened.reader = _Reader(path)
        _opened.key = key
    return _opened.reader
