"""Inspect the bytes, boxes and packets of a video file without decoding it. No torch."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av

from cosmos_cli import files
from cosmos_cli.errors import environment_error


@contextmanager
def needs_ffmpeg(what: str) -> Iterator[None]:
    """Turn the errors of a missing FFmpeg into a UserError that says `what`."""
    # Without FFmpeg's libraries, torchcodec raises RuntimeError, even on import.
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        fix = "run `cosmos setup RECIPE --install`"
        raise environment_error("video", what, fix) from error


def lacks(path: Path) -> int:
    """Return the number of bytes missing at the end of an mp4 or Matroska file, 0 for others."""
    return max(mp4_boxes(path)[1], _matroska_lacks(path))


def is_mpeg_stream(path: Path) -> bool:
    """True if a file is an MPEG program stream or transport stream."""
    with files.open_regular(path, files.VIDEO) as file:
        start = file.read(5)
    # A program stream starts with a pack header, a transport stream with the sync byte 0x47; on a
    # Blu-ray, four bytes of time stamp precede it.
    return start[:4] == b"\0\0\1\xba" or b"G" in (start[:1], start[4:])


def is_avi(path: Path) -> bool:
    """True if a file is an AVI."""
    with files.open_regular(path, files.VIDEO) as file:
        start = file.read(12)
    return start[:4] == b"RIFF" and start[8:] == b"AVI "


def mp4_boxes(path: Path) -> tuple[list[bytes], int]:
    """Return the names of an mp4 file's top-level boxes and the number of bytes missing at its end.

    Other files have no boxes. A frame count would not reveal truncation, as edit lists hide frames.
    Source: ISO/IEC 14496-12, section 4.2.
    """
    names: list[bytes] = []
    end, position = path.stat().st_size, 0
    with files.open_regular(path, files.VIDEO) as file:
        while position + 8 <= end:
            file.seek(position)
            size, name = struct.unpack(">I4s", file.read(8))
            if not names and name != b"ftyp":
                return [], 0
            if size == 1 and position + 16 <= end:
                (size,) = struct.unpack(">Q", file.read(8))
            names.append(name)
            position = end if size == 0 else position + max(size, 8)
    return names, position - end


def _matroska_lacks(path: Path) -> int:
    """Return the number of bytes missing at the end of a Matroska file.

    It is 0 for other files and for a Matroska file that does not state its size.

    Source: RFC 8794, section 4; RFC 9559, section 5.1.
    """
    with files.open_regular(path, files.VIDEO) as file:
        start = file.read(4096)
    position = size = length = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        position += size + 4
        if start[position - 4 : position] != name or len(start) < position + 8:
            return 0
        length = 9 - start[position].bit_length()
        size = int.from_bytes(start[position : position + length]) & (1 << 7 * length) - 1
        position += length
    unknown = size == (1 << 7 * length) - 1
    return 0 if unknown else position + size - path.stat().st_size


def is_interlaced(path: Path, stream: int) -> bool:
    """True if the first frame that decodes is marked as interlaced."""
    try:
        with av.open(str(path), metadata_errors="replace") as file:
            video = file.streams[stream]
            return any(frame.interlaced_frame for frame in islice(file.decode(video), 1))
    except (av.FFmpegError, IndexError):
        return False


# --- packets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packets:
    """The frames of a video stream in display order.

    Args:
        pts: time stamps in units of `tick`.
        durations: in units of `tick`.
        keys: True for each frame at which a decoder can start. The first always counts as one.
        tick: the time base, the length of one unit in seconds.
        honest: True if the file marks no other frames as key frames.
    """

    pts: list[int]
    durations: list[int]
    keys: list[bool]
    tick: float
    honest: bool

    def shown_at(self, seconds: Iterable[float]) -> list[int]:
        """Return the number of the frame on screen at each time."""
        times = [pts * self.tick for pts in self.pts]
        return [max(0, bisect_right(times, s) - 1) for s in seconds]

    def next_start(self, pts: int) -> int | None:
        """Return the time stamp of the first frame after `pts` at which a decoder can start."""
        first = bisect_right(self.pts, pts)
        return next((self.pts[n] for n in range(first, len(self.pts)) if self.keys[n]), None)


def scan_packets(path: Path, stream: int) -> Packets:
    """Read the packets of a stream and sort them by time stamp.

    Raises:
        ValueError: a packet cannot be read or has no time stamp.
    """
    rows = []
    try:
        with av.open(str(path), metadata_errors="replace") as file:
            video = file.streams[stream]
            tick = video.time_base
            codec, extra = video.codec_context.codec.canonical_name, video.codec_context.extradata
            for packet in file.demux(video):
                if packet.size and not packet.is_discard:
                    pts = packet.dts if packet.pts is None else packet.pts
                    start = packet.is_keyframe and is_start(codec, bytes(packet), extra or b"")
                    rows.append((pts, packet.duration or 0, packet.is_keyframe, start))
    except (av.FFmpegError, IndexError, AttributeError) as error:
        raise ValueError(str(error)) from error
    if not rows or tick is None or any(pts is None for pts, *_ in rows):
        raise ValueError("frames without a time stamp")
    rows.sort(key=lambda row: row[0])
    return Packets(
        [row[0] for row in rows],
        [row[1] for row in rows],
        [i == 0 or row[3] for i, row in enumerate(rows)],
        tick.numerator / tick.denominator,
        all(row[2] == row[3] for row in rows[1:]),
    )


def is_start(codec: str, packet: bytes, extradata: bytes) -> bool:
    """True if a decoder that starts at this key frame decodes it and all later frames exactly.

    Trap: encoders with intra refresh, which renew the picture stripe by stripe, mark the start of
    each round as a key frame. Some muxers mark frames that are not key frames. Unknown codecs are
    trusted.

    Sources: ITU-T H.264 7.3 and D.1.8, H.265 7.4.2.2; VP9 bitstream 6.2; RFC 6386, section 9.1;
    ISO/IEC 14496-2, 6.2.5.
    """
    if codec == "h264":
        return _is_h264_start(list(nals(packet, extradata[4] if extradata[:1] == b"\1" else None)))
    if codec == "hevc":
        configured = len(extradata) > 22 and extradata[:1] == b"\1"
        kinds = (nal[0] >> 1 & 63 for nal in nals(packet, extradata[21] if configured else None))
        pictures = [kind for kind in kinds if kind < 32]
        return bool(pictures) and all(16 <= kind <= 23 for kind in pictures)
    if codec == "vp9":
        profile = packet[0] >> 5 & 1 | packet[0] >> 3 & 2
        return packet[0] >> (1 if profile == 3 else 2) & 1 == 0
    if codec == "vp8":
        return packet[0] & 1 == 0
    if codec == "mpeg4":
        _, found, picture = packet.partition(b"\0\0\1\xb6")
        return not found or picture[:1] < b"\x40"
    return True


def _is_h264_start(units: list[bytes]) -> bool:
    """True for an IDR picture, or an I picture with an exact recovery point of 0 frames."""
    if any(nal[0] & 31 == 5 for nal in units):
        return True
    exact = False
    for nal in units:
        if nal[0] & 31 == 6:
            exact = exact or _recovers_at_once(nal[1:])
        elif nal[0] & 31 == 1:
            _, at = _golomb(nal, 8)
            kind, _ = _golomb(nal, at)
            if not exact or kind % 5 not in (2, 4):
                return False
    return exact


def _recovers_at_once(sei: bytes) -> bool:
    """True if an SEI message holds an exact recovery point of 0 frames."""
    at = 0
    while at + 2 < len(sei):
        fields = []
        for _ in range(2):
            value = 0
            while at < len(sei) and sei[at] == 255:
                value, at = value + 255, at + 1
            fields.append(value + sei[at] if at < len(sei) else value)
            at += 1
        if fields[0] == 6:
            return at < len(sei) and sei[at] >> 6 == 3
        at += fields[1]
    return False


def _golomb(data: bytes, at: int) -> tuple[int, int]:
    """Return the Exp-Golomb number at bit `at` of the data and the position of the next bit."""
    bits = int.from_bytes(data[:24].ljust(24, b"\xff"))
    zeros = 0
    while zeros < 32 and not bits >> (191 - at - zeros) & 1:
        zeros += 1
    end = at + 2 * zeros + 1
    return (bits >> (192 - end) & (1 << zeros + 1) - 1) - 1, end


def nals(packet: bytes, sizes: int | None) -> Iterator[bytes]:
    """Yield the NAL units of an H.264 or HEVC packet.

    `sizes` is the header byte with the width of their length fields, or None for start codes.
    """
    if sizes is None:
        for nal in packet.split(b"\0\0\1"):
            if nal.strip(b"\0"):
                yield nal
        return
    width, at = (sizes & 3) + 1, 0
    while at + width < len(packet):
        size = int.from_bytes(packet[at : at + width])
        if size:
            yield packet[at + width : at + width + size]
        at += width + size
