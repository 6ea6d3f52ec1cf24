"""Check weights files and archives before a library unpacks them. No torch.

A 5 MB zip can inflate to 5 GB, and a pickle of a few bytes can fill memory.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from cosmos_cli import files, pickles

# Safetensors headers and tensor pickles hold only names and shapes: 0.2 MB for the 7B.
HEADER_LIMIT = 8 * files.MB
PICKLE_LIMIT = 4 * files.MB
# The limit for the list of members of an archive.
LISTING_LIMIT = 16 * files.MB
# The exceptions that checking a damaged archive or pickle may raise.
_DAMAGE = (*pickles.DAMAGE, zipfile.BadZipFile, zipfile.LargeZipFile, OSError)


def check_safetensors(path: Path) -> None:
    """Check the header length of a safetensors file before the library reads it.

    Raises:
        NoSuchFile, BadFile: as of `open_regular`, or the header is too long.
    """
    length, left = _header(path)
    # If the header is longer than the file, safetensors itself refuses it.
    if HEADER_LIMIT < length <= left:
        what = f"has a header of {length:,} bytes, more than the limit of {HEADER_LIMIT:,}"
        raise files.bad(path, files.WEIGHTS, what)


def check_weights(path: Path) -> None:
    """Check a weights file of either format. Do so before hashing it, which may take minutes.

    Raises:
        NoSuchFile, BadFile: as of `check_safetensors` and `check_torch`.
    """
    if path.suffix != ".safetensors":
        check_torch(path)
        return
    check_safetensors(path)
    length, left = _header(path)
    if not 0 < length <= left:
        what = "is damaged or not a safetensors file: it has no header"
        raise files.bad(path, files.WEIGHTS, what)
    with files.open_regular(path, files.WEIGHTS) as stream:
        header = stream.read(8 + length)[8:]
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        needed = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        what = "is damaged or not a safetensors file: its header is not readable"
        raise files.bad(path, files.WEIGHTS, what) from error
    if needed != left - length:
        what = f"is damaged: its tensors have {needed:,} bytes, the file has {left - length:,}"
        raise files.bad(path, files.WEIGHTS, what)


def _header(path: Path) -> tuple[int, int]:
    """Return the header length that a safetensors file states, and the number of bytes after it."""
    with files.open_regular(path, files.WEIGHTS) as stream:
        length = int.from_bytes(stream.read(8), "little")
        return length, os.fstat(stream.fileno()).st_size - 8


def check_torch(path: Path) -> bool:
    """Check a torch file before it is unpacked. Return True if it is a zip archive.

    torch stores the members of its archives uncompressed. A member that is larger than the file
    would inflate. Files from before torch 1.6 are pickles, followed by the raw tensor data.

    Raises:
        NoSuchFile, BadFile: as of `open_regular`, or a member is compressed or too large, or a
            pickle would expand far beyond its size.
    """
    with files.open_regular(path, files.WEIGHTS) as stream:
        try:
            size = os.fstat(stream.fileno()).st_size
            bounded = pickles.Bounded(stream, LISTING_LIMIT)
            is_zip = zipfile.is_zipfile(bounded)
            if is_zip:
                _check_archive(bounded, size)
            else:
                stream.seek(0)
                bounded = pickles.Bounded(stream, PICKLE_LIMIT)
                for _ in range(pickles.OLD_FORMAT_PICKLES):
                    pickles.scan_pickle(bounded, PICKLE_LIMIT)
        except _DAMAGE as error:
            what = f"is damaged or holds more than tensors; nothing in it was run ({error})"
            raise files.bad(path, files.WEIGHTS, what) from error
    return is_zip


def _check_archive(stream: Any, size: int) -> None:
    """Check the members that torch reads. Raises ValueError and zipfile's exceptions."""
    with zipfile.ZipFile(stream) as archive:
        total = 0
        for member in archive.infolist():
            inner = member.filename.partition("/")[2]
            if inner.startswith(("code/", "extra/")) or inner.endswith(".debug_pkl"):
                # TorchScript compresses these members, but they are never read.
                continue
            total += member.file_size
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed, which can hide any size")
            if member.file_size != member.compress_size or total > size:
                raise ValueError(f"{member.filename} is larger than the file itself")
            if inner.endswith(".pkl"):
                pickles.scan_pickle(_member(archive, member, PICKLE_LIMIT), PICKLE_LIMIT)


def read_member(path: Path, name: str, kind: files.Kind) -> str:
    """Return the UTF-8 text of a member of a zip archive.

    Raises:
        NoSuchFile, BadFile: as of `open_regular`, or the member is missing, damaged or too large.
    """
    with files.open_regular(path, files.WEIGHTS) as stream:
        try:
            with zipfile.ZipFile(pickles.Bounded(stream, LISTING_LIMIT + kind.limit)) as archive:
                return _member(archive, archive.getinfo(name), kind.limit).read().decode()
        except _DAMAGE as error:
            raise files.bad(path, kind, f"is damaged: {error}") from error


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> BinaryIO:
    """Return the content of a member. The limit counts real bytes, not the size it states."""
    with archive.open(member) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{member.filename} is larger than {limit:,} bytes")
    return io.BytesIO(content)


# Files other than weights that transformers and peft read in a folder.
_SETTINGS = frozenset({".json", ".model", ".txt", ".jinja"})


def check_model_folder(folder: Path) -> None:
    """Check the files of a folder that transformers or peft will open by name.

    Raises:
        BadFile: a file is not a regular file, is too large, or cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        # The library reports missing files: it knows which ones it needs.
        return
    safe = any(path.suffix == ".safetensors" for path in paths)
    for path in paths:
        try:
            if path.suffix in _SETTINGS:
                files.require_regular(path, files.MODEL_SETTINGS)
            elif path.suffix == ".safetensors":
                check_safetensors(path)
            elif path.suffix == ".bin" and path.name.startswith("pytorch_model") and not safe:
                check_torch(path)
        except files.NoSuchFile:
            continue
