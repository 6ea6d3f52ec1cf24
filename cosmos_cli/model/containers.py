"""What the first bytes and the boxes of a video file say about it, decoded or not. No torch."""

from __future__ import annotations

import struct
from pathlib import Path

from cosmos_cli import files


def lacks(path: Path) -> int:
    """The bytes that lack at the end of an mp4 or Matroska file, 0 for others."""
    return max(mp4_boxes(path)[1], _matroska_lacks(path))


def is_mpeg_stream(path: Path) -> bool:
    """Whether a file is a program or transport stream of MPEG's."""
    with files.open_regular(path, files.VIDEO) as file:
        start = file.read(5)
    # The former starts with a pack, the latter with 0x47, on a Blu-ray behind a time.
    return start[:4] == b"\0\0\1\xba" or b"G" in (start[:1], start[4:])


def mp4_boxes(path: Path) -> tuple[list[bytes], int]:
    """Names of the top-level boxes of an mp4 file, and the bytes lacking at its end.

    Other files have no boxes. Frame counts would not show a truncation: edit lists hide frames.
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
    """The bytes that lack at the end of a Matroska file, 0 for others and where it does not say.

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
