"""Cache what models compute from texts in `$XDG_CACHE_HOME/cosmos`, for later runs. No torch."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from cosmos_cli import __version__, files, hashes
from cosmos_cli.errors import UserError

# The largest answers, T5-XXL embeddings of 512 tokens, take 1 MB each.
MOST_ANSWERS = 1000
# Packages whose other versions may change an answer.
PACKAGES = ("torch", "transformers", "tokenizers")


def cache_dir() -> Path:
    """Return the folder for files that can be made again.

    For a user without a home folder it is a path that cannot be created.
    """
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.devnull)
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "cosmos"


def keep_newest(folder: Path, count: int) -> None:
    """Delete all entries of a cache but the `count` that were used last."""
    for old in sorted(folder.glob("[!.]*"), key=lambda path: files.stamp_of(path)[1])[:-count]:
        old.unlink(missing_ok=True)


class Answers:
    """Cache the answers of one model. An answer that cannot be written is not an error.

    Args:
        model: the folder of the model's files, identified by size and modification time.
        asker: the class that runs the model. Its source file is part of the cache key.
        settings: everything else that the answers depend on.
    """

    def __init__(self, model: Path, asker: type, *settings: object) -> None:
        found = [path for path in sorted(model.rglob("*")) if path.is_file()]
        # The notes of `cosmos download` are not part of the model.
        known = [path for path in found if files.CACHE_DIR not in path.relative_to(model).parts]
        code = Path(inspect.getfile(asker))
        stamps = [f"{path.resolve()} {files.stamp_of(path)}" for path in [*known, code]]
        versions = [__version__, *map(version, PACKAGES)]
        self.identity = hashes.sha256_text(*stamps, *versions, *map(str, settings))
        # transformers takes a path without files for a name on the hub. Such a model may change
        # unnoticed, so its answers are not cached.
        self.known = bool(known)
        self.folder = cache_dir() / "answers"

    def get(self, words: str, make: Callable[[], bytes]) -> bytes:
        """Return the cached answer to a text, or make it and cache it.

        An entry begins with the sha256 of the rest. A damaged entry is made again.
        """
        if not self.known:
            return make()
        path = self.folder / hashes.sha256_text(self.identity, words)
        with suppress(OSError):
            entry = path.read_bytes()
            digest, answer = entry[:32], entry[32:]
            if hashlib.sha256(answer).digest() == digest:
                with suppress(OSError):
                    # The entries that are removed first are those used longest ago.
                    os.utime(path)
                return answer
        answer = make()
        with suppress(OSError, UserError):
            files.remove_stale(self.folder)
            with files.atomic_file(path) as temporary:
                temporary.write_bytes(hashlib.sha256(answer).digest() + answer)
            keep_newest(self.folder, MOST_ANSWERS)
        return answer
