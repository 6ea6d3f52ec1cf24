"""Compute the sha256 of files, folders and texts. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosmos_cli import files


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file as hex, reading it in pieces.

    Raises:
        UserError: the file is missing, is not a regular file, or cannot be read.
    """
    with files.open_regular(path, files.DATA) as stream:
        try:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise files.unreadable(path, files.DATA, error) from error


# The size of the pieces in which a large file is hashed, so that several readers share the work.
PIECE = 64 * 2**20


class PieceHash:
    """Hashes data in pieces: the result is the sha256 of the sha256 of every PIECE bytes."""

    def __init__(self) -> None:
        self._pieces = [hashlib.sha256()]
        self._left = PIECE

    def update(self, data: Any) -> None:
        """Add bytes."""
        view = memoryview(data).cast("B")
        while len(view):
            if not self._left:
                self._pieces.append(hashlib.sha256())
                self._left = PIECE
            part = view[: self._left]
            self._pieces[-1].update(part)
            self._left -= len(part)
            view = view[len(part) :]

    def hexdigest(self) -> str:
        """Return the hash of everything so far as hex."""
        return sha256_pieces([piece.digest() for piece in self._pieces])


def piece_count(path: Path) -> int:
    """Return the number of pieces in which a file is hashed; an empty file has one."""
    return max(-(-files.size_of(path) // PIECE), 1)


def sha256_piece(path: Path, index: int) -> bytes:
    """Return the sha256 of one piece of a file.

    Raises:
        UserError: as of `sha256_file`.
    """
    with files.open_regular(path, files.DATA) as stream:
        try:
            stream.seek(index * PIECE)
            return hashlib.sha256(stream.read(PIECE)).digest()
        except OSError as error:
            raise files.unreadable(path, files.DATA, error) from error


def sha256_pieces(digests: list[bytes]) -> str:
    """Return the hash of a file as hex, given the sha256 of its pieces, as `PieceHash` does."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def sha256_path(path: Path, hash_file: Callable[[Path], str] = sha256_file) -> str:
    """Return the sha256 of a file, or of a folder by its files without the download records."""
    if not path.is_dir():
        return hash_file(path)
    found = sorted(file for file in path.rglob("*") if file.is_file())
    names = {file: str(file.relative_to(path)) for file in found}
    kept = [file for file in found if not names[file].startswith(f"{files.CACHE_DIR}/")]
    return sha256_text(*(f"{names[file]} {hash_file(file)}" for file in kept))


def sha256_text(*parts: str) -> str:
    """Return the sha256 of several texts as hex. ("ab", "c") and ("a", "bc") differ."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
