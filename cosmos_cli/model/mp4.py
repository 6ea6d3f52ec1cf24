"""Write mp4 files: encode frames, or join files that were encoded alike.

Dimension letters: C channels (RGB), T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import av
import torch
from torch import Tensor

from cosmos_cli.model.containers import needs_ffmpeg

# Makes the same frames give the same bytes. With AVX-512, the macroblock tree of x264 (build 164)
# depends on memory addresses, and every stream depends on the number of threads.
X264_REPRODUCIBLE = {"threads": 4, "x264-params": "cpu-independent=1"}
# The index of an mp4 has at most five numbers of 4 to 8 bytes per frame: its size, its times, and a
# chunk and a keyframe of its own.
INDEX_BYTES_PER_FRAME = 40


def write_mp4(path: Path, video_CTHW: Tensor, fps: float, crf: float) -> None:
    """Write H.264 yuv420p in an mp4 container, whatever the suffix of `path`.

    The index is in front of the frames, so a browser plays the file while it loads. The same frames
    give the same bytes in every run.

    Raises:
        UserError: FFmpeg is missing or has no H.264 encoder.
    """
    _, frames, height, width = video_CTHW.shape
    if video_CTHW.dtype != torch.uint8 or frames == 0:
        raise ValueError(f"video must be uint8 with frames, got {video_CTHW.dtype}, {frames}")
    if height % 2 or width % 2:
        raise ValueError(f"height and width must be even for yuv420p, got {width}x{height}")
    with needs_ffmpeg("FFmpeg is missing"):
        from torchcodec.encoders import VideoEncoder
    frames_TCHW = video_CTHW.transpose(0, 1).contiguous().cpu()
    with needs_ffmpeg("this FFmpeg cannot encode H.264 with libx264"):
        data = VideoEncoder(frames_TCHW, frame_rate=fps).to_tensor(
            "mp4",
            codec="libx264",
            pixel_format="yuv420p",
            crf=crf,
            # The encoder uses the BT.601 matrix; without tags, players assume BT.709 for HD.
            extra_options={
                **X264_REPRODUCIBLE,
                # Space for the index in front. FFmpeg's faststart cannot move it in memory.
                "moov_size": str(2048 + INDEX_BYTES_PER_FRAME * frames),
                "colorspace": "smpte170m",
                "color_primaries": "bt709",
                "color_trc": "bt709",
                "color_range": "tv",
            },
        )
    path.write_bytes(data.numpy().tobytes())


def join_mp4(parts: Iterable[Path], path: Path) -> None:
    """Write the mp4 files `parts` as one, without decoding; all were written by `write_mp4` alike.

    The index is in front of the frames. No more than a packet is in memory.
    """
    options = {"movflags": "+faststart"}
    with av.open(str(path), "w", format="mp4", options=options) as joined:
        stream, begin = None, 0
        for part in parts:
            with av.open(str(part)) as file:
                source = file.streams.video[0]
                if stream is None:
                    stream = joined.add_stream_from_template(source)
                for packet in file.demux(source):
                    # The last packet is empty.
                    if packet.dts is None or packet.pts is None:
                        continue
                    packet.pts, packet.dts = packet.pts + begin, packet.dts + begin
                    packet.stream = stream
                    joined.mux(packet)
                begin += source.duration or 0
