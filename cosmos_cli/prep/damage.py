"""Find damaged frames of a video from the error reports of decoders. No torch.

FFmpeg's decoders conceal damage, and torchcodec does not pass on their reports. So the frames that
clips use are decoded a second time: with FFmpeg's native decoder for most codecs, and with libvpx
for VP8 and VP9, for which the native decoders report nothing. For HEVC, FFmpeg reports only a third
of the damage, so libde265 decodes the frames as well, if the system has it. For H.264, h264.py
makes the native decoder check where slices end.

Limit: damage that leaves a valid stream is not found. Of files with 1 to 16 flipped bits, 2 of 460
in HEVC were not found, none of 160 in H.264 and none of 160 in VP9.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from ctypes.util import find_library
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import av
import av.logging
from av.bitstream import BitStreamFilterContext

from cosmos_cli import files
from cosmos_cli.model import containers
from cosmos_cli.model.containers import Packets
from cosmos_cli.prep import h264

if TYPE_CHECKING:
    from cosmos_cli.model.video import Clip

# Decoders that report more damage than FFmpeg's native ones.
STRICTER = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Warnings of libde265 that an undamaged file never causes: a slice that ends early, wrong entry
# points, a block outside of the picture, invalid headers, a row without an end.
HEVC_DAMAGE = {1002, 1003, 1004, 1005, 1006, 1007, 1017}
HEVC_PARAMETER_SETS = (32, 33, 34)
# Pixel formats for which libde265 gives no such warnings on undamaged files.
HEVC_FORMATS = {"yuv420p", "yuvj420p", "yuv420p10le"}

# PyAV also sends the reports to Python's logging, which would print them.
logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False

Span = tuple[float, float]


class Frames(NamedTuple):
    """The frames of a clip, by their numbers in the file or by their time stamps in seconds.

    Another process can read a pickled `Frames` without importing torch, unlike a `Clip`.
    """

    indices: Sequence[int]
    seconds: Sequence[float]


def find(path: Path, clips: Sequence[Clip | Frames]) -> list[Span]:
    """Return the spans with damaged frames in the clips of a file.

    Spans are in seconds from the first frame of the file. A damaged frame also spoils the frames
    that are decoded after it, up to the next frame at which a decoder can start.

    Trap: a decoder that starts in the middle of an undamaged file may report missing references.
    So a file with reports is decoded again from its start.
    """
    stream, packets = _scan(path, files.stamp_of(path))
    if packets is None or not clips:
        return []
    pts, zero, tick = packets.pts, packets.pts[0], packets.tick
    shown = [list(clip.indices) or packets.shown_at(clip.seconds) for clip in clips]
    # A damaged index may list fewer frames than the clips have. Missing frames do not decode.
    most = len(pts) - 1
    ends = [(pts[min(numbers[0], most)], pts[min(numbers[-1], most)]) for numbers in shown]
    first, last = min(begin for begin, _ in ends), max(end for _, end in ends)
    start = max((p for p, key in zip(pts, packets.keys, strict=True) if key and p <= first))
    spans: list[tuple[int, int]] = []
    for decode in (_decode, _decode_hevc):
        if any(report for _, report in decode(path, stream, (start, last))):
            spans += _spans(decode(path, stream, (zero, last)), packets)
    shown_spans = [
        (a, b) for a, b in _merged(spans) if any(a <= end and b > begin for begin, end in ends)
    ]
    return [((a - zero) * tick, (b - zero) * tick) for a, b in shown_spans]


def checks_hevc() -> bool:
    """True if libde265 is installed. Without it most damage in HEVC goes unnoticed."""
    return find_library("de265") is not None


@lru_cache(maxsize=1)
def _scan(path: Path, _version: tuple[int, int]) -> tuple[int, Packets | None]:
    """Return the index of the video stream and its packets, or None if PyAV cannot decode it."""
    try:
        with av.open(str(path), metadata_errors="replace") as file:
            video = file.streams.best("video")
            if video is None or video.codec_context is None:
                return 0, None
            index = video.index
        return index, containers.scan_packets(path, index)
    except (av.FFmpegError, ValueError):
        return 0, None


def _decode(path: Path, stream: int, span: tuple[int, int]) -> Iterator[tuple[int, bool]]:
    """Yield the timestamp of each packet, in coded order, and True if decoding it reports damage.

    Trap: the decoder must use one thread. Another thread that logs a report waits for Python's
    lock, and it waits for ever if the decoder is closed meanwhile.
    """
    level, repeated = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.INFO)
    av.logging.set_skip_repeated(False)
    pts = span[0]
    try:
        with (
            av.logging.Capture(local=False) as logs,
            av.open(str(path), metadata_errors="replace") as file,
        ):
            video = file.streams[stream]
            codec = video.codec_context
            if codec.codec.canonical_name in STRICTER:
                codec = av.CodecContext.create(STRICTER[codec.codec.canonical_name], "r")
            codec.thread_count = 1
            taller = h264.TallerStream(codec)
            for packet in _packets(file, video, span):
                pts = packet.dts if packet.pts is None else packet.pts
                report = _reports(codec, logs, *taller.packet(packet))
                yield pts, packet.is_corrupt or report
            yield pts, _reports(codec, logs, *taller.packet(None))
    except av.FFmpegError:
        yield pts, True
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(repeated)


def _packets(
    file: av.container.InputContainer, video: av.VideoStream, span: tuple[int, int]
) -> Iterator[av.Packet]:
    """Yield the packets that are needed to decode a span of timestamps."""
    if span[0] > (video.start_time or 0):
        file.seek(span[0], stream=video)
    for packet in file.demux(video):
        if packet.dts is not None and packet.dts > span[1]:
            return
        if packet.size:
            yield packet


def _reports(
    codec: av.VideoCodecContext,
    logs: list[tuple[int, str, str]],
    packet: av.Packet | None,
    expected: str | None,
) -> bool:
    """True if decoding a packet reports damage. Clears the log.

    `expected` is what `TallerStream.packet` returns.
    """
    try:
        frames = codec.decode(packet)
        failed = expected is None and any(frame.is_corrupt for frame in frames)
    except av.FFmpegError:
        failed = True
    found = [text for level, _, text in logs if level <= av.logging.ERROR or "concealing" in text]
    logs.clear()
    if expected:
        return failed or len(found) != 1 or not found[0].startswith(expected)
    return failed or bool(found)


def _spans(rows: Iterable[tuple[int, bool]], packets: Packets) -> Iterator[tuple[int, int]]:
    """Yield the spans of timestamps that the reported damage spoils. Rows are in coded order."""
    starts = {p for p, key in zip(packets.pts, packets.keys, strict=True) if key}
    begin: int | None = None
    for pts, report in rows:
        if begin is not None and pts in starts:
            yield begin, pts
            begin = None
        if report:
            begin = pts if begin is None else min(begin, pts)
        elif begin is not None:
            begin = min(begin, pts)
    if begin is not None:
        end = packets.next_start(max(begin, max((p for p, _ in rows), default=begin)))
        yield begin, packets.pts[-1] + 1 if end is None else end


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans in order, with those that touch merged."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


# --- HEVC -----------------------------------------------------------------------------------------


def _decode_hevc(path: Path, stream: int, span: tuple[int, int]) -> Iterator[tuple[int, bool]]:
    """Yield the same as `_decode`, but from libde265; nothing if it is missing or not needed.

    libde265 runs in its own process, because a damaged file may crash that process.
    """
    if not checks_hevc():
        return
    with av.open(str(path), metadata_errors="replace") as file:
        video = file.streams[stream]
        if video.codec_context.name != "hevc" or video.codec_context.pix_fmt not in HEVC_FORMATS:
            return
        unpack = BitStreamFilterContext("hevc_mp4toannexb", video)
        units: list[tuple[int, bytes]] = []
        sent: set[bytes] = set()
        try:
            for packet in _packets(file, video, span):
                pts = packet.dts if packet.pts is None else packet.pts
                data = b"".join(bytes(part) for part in unpack.filter(packet))
                nals = list(containers.nals(data, None))
                sets = {nal for nal in nals if nal[0] >> 1 & 63 in HEVC_PARAMETER_SETS}
                # Trap: if parameter sets are repeated, libde265 1.0.11 loses reference pictures. It
                # keeps only 20 warnings, so those about lost pictures then hide the others.
                if sets <= sent:
                    nals = [nal for nal in nals if nal not in sets]
                else:
                    sent = sets
                units.append((pts, b"".join(b"\0\0\1" + nal for nal in nals)))
        except av.FFmpegError:
            yield units[-1][0] if units else span[0], True
    rows = [struct.pack("<I", len(data)) + data for _, data in units]
    child = [sys.executable, "-m", "cosmos_cli.prep.damage"]
    done = subprocess.run(child, input=b"".join(rows), capture_output=True, check=False)
    reports = done.stdout.split()
    for (pts, _), report in zip(units, reports, strict=False):
        yield pts, report != b"0"
    if len(reports) < len(units):
        yield units[len(reports)][0], True


def _hevc_reports(stream: BinaryIO) -> Iterator[int]:
    """Yield 1 for each picture for which libde265 reports damage, else 0."""
    library = ctypes.CDLL(find_library("de265"))
    library.de265_new_decoder.restype = ctypes.c_void_p
    library.de265_get_next_picture.restype = ctypes.c_void_p
    decoder, more = ctypes.c_void_p(library.de265_new_decoder()), ctypes.c_int()
    while head := stream.read(4):
        data = stream.read(struct.unpack("<I", head)[0])
        library.de265_push_data(decoder, data, len(data), ctypes.c_int64(0), None)
        library.de265_push_end_of_frame(decoder)
        more.value, codes = 1, set()
        while more.value:
            error = library.de265_decode(decoder, ctypes.byref(more))
            # Error 13 only means that the decoder waits for more input.
            if error not in (0, 13):
                codes.add(1002)
            while code := library.de265_get_warning(decoder):
                codes.add(code)
            while library.de265_get_next_picture(decoder):
                pass
            if error:
                break
        yield int(bool(codes & HEVC_DAMAGE))


if __name__ == "__main__":
    for report in _hevc_reports(sys.stdin.buffer):
        print(report, flush=True)
