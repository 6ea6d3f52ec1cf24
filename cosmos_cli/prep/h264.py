"""Reveal slices of an H.264 stream that do not end where their picture ends. No torch.

A flipped bit in a slice makes a decoder read other macroblocks from there on. FFmpeg stops at the
last macroblock of the picture and does not check that the slice ends there. So the decoder is told
that each picture has one more row of macroblocks, and must report exactly this row as missing. If a
slice continues into this row or ends before it, the decoder reports another number or none.
"""

from __future__ import annotations

import re
from typing import Any

import av

from cosmos_cli.model import containers

_SLICES, _SEQUENCE = (1, 5), 7
# The profiles whose parameter sets describe the pixel format. Source: ITU-T H.264, 7.3.2.1.1.
_HIGH_PROFILES = {44, 83, 86, 100, 110, 118, 122, 128, 134, 135, 138, 139, 244}


class TallerStream:
    """Makes the pictures of a stream one row taller before they are decoded.

    The pictures stay as they are if they are interlaced or their parameter sets are unusual. The
    decoder marks all taller pictures as corrupt.

    Args:
        codec: the decoder, not yet open. Its parameter sets are replaced.
    """

    def __init__(self, codec: av.VideoCodecContext) -> None:
        self._report: str | None = None
        # The header byte with the width of the length fields, or None for start codes.
        self._sizes: int | None = None
        self._is_h264 = codec.codec.canonical_name == "h264"
        extradata = codec.extradata
        if not self._is_h264 or not extradata:
            return
        # The missing rows need no good concealment.
        codec.options = {"ec": "favor_inter"}
        if extradata[0] != 1:
            codec.extradata = self._rewrite(extradata)
        elif len(extradata) > 8:
            # Source: ISO/IEC 14496-15, 5.3.3.1.
            self._sizes, end = extradata[4], 8 + int.from_bytes(extradata[6:8])
            taller = self._taller(extradata[8:end])
            codec.extradata = extradata[:6] + len(taller).to_bytes(2) + taller + extradata[end:]
            if extradata[5] & 31 != 1:
                self._report = None

    def packet(self, packet: av.Packet[Any] | None) -> tuple[av.Packet[Any] | None, str | None]:
        """Return the packet to decode and the beginning of the one report that it must cause.

        The report is "" for a packet without a picture, and None if the pictures are not taller.
        """
        if packet is None or not self._is_h264:
            return packet, None if self._report is None else ""
        data = bytes(packet)
        kinds = {nal[0] & 31 for nal in containers.nals(data, self._sizes)}
        if _SEQUENCE in kinds:
            packet = av.Packet(self._rewrite(data))
        return packet, "" if self._report and kinds.isdisjoint(_SLICES) else self._report

    def _rewrite(self, data: bytes) -> bytes:
        parts = []
        for nal in containers.nals(data, self._sizes):
            unit = self._taller(nal) if nal[0] & 31 == _SEQUENCE else nal
            length = None if self._sizes is None else (self._sizes & 3) + 1
            parts += [b"\0\0\1" if length is None else len(unit).to_bytes(length), unit]
        return b"".join(parts)

    def _taller(self, sequence: bytes) -> bytes:
        try:
            taller, width = one_row_taller(sequence)
        except (ValueError, IndexError):
            self._report = None
            return sequence
        self._report = f"concealing {width} DC, {width} AC, {width} MV errors"
        return taller


def one_row_taller(sequence: bytes) -> tuple[bytes, int]:
    """Return a sequence parameter set for pictures with one more row, and the row's macroblocks.

    Raises:
        ValueError, IndexError: it is damaged, for interlaced video, or of a kind that is rare.

    Source: ITU-T H.264, 7.3.2.1.1 and 9.1.
    """
    plain = sequence.replace(b"\0\0\3", b"\0\0")
    bits = "".join(f"{byte:08b}" for byte in plain)
    at = 32

    def number() -> int:
        """Read an Exp-Golomb number."""
        nonlocal at
        first = bits.index("1", at)
        at = 2 * first - at + 1
        return int(bits[first:at], 2) - 1

    number()
    if plain[1] in _HIGH_PROFILES:
        if number() == 3:
            at += 1
        number(), number()
        if bits[at + 1] == "1":
            raise ValueError("it has scaling matrices")
        at += 2
    number()
    order = number()
    if order == 0:
        number()
    elif order == 1:
        raise ValueError("its pictures are ordered by a cycle")
    number()
    at += 1
    width = number() + 1
    before = bits[:at]
    rows = number() + 2
    if bits[at] != "1":
        raise ValueError("its pictures are interlaced")
    height = f"{rows:b}".rjust(2 * rows.bit_length() - 1, "0")
    taller = (before + height + bits[at:]).rstrip("0")
    taller += "0" * (-len(taller) % 8)
    data = int(taller, 2).to_bytes(len(taller) // 8)
    return re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", data), width
