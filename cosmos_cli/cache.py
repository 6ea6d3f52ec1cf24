"""What models made of words, for a later run: `$XDG_CACHE_HOME/cosmos`. No torch."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from cosmos_cli import __version__, layout
from cosmos_cli.errors import UserError

# The largest, T5-XXL's of 512 tokens, take 1 MB.
MOST_ANSWERS = 1000
# Whose next version may have a model answer otherwise.
PACKAGES = ("torch", "transformers", "tokenizers")


def cache_dir() -> Path:
    """The folder for what can be made again; where there is no home, one that cannot be made."""
    try:
        home = Path.home()
    except RuntimeError:
        home = Path(os.devnull)
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "cosmos"


class Answers:
    """What one model answers; an answer that cannot be kept is no error.

    Args:
        model: the folder of its files, which are known by size and time.
        asker: the class that asks it.
        settings: what else its answers depend on.
    """

    def __init__(self, model: Path, asker: type, *settings: object) -> None:
        found = [path for path in sorted(model.rglob("*")) if path.is_file()]
        # A download's notes are no part of the model.
        known = [path for path in found if layout.CACHE_DIR not in path.relative_to(model).parts]
        code = Path(inspect.getfile(asker))
        files = [f"{path.resolve()} {layout.stamp_of(path)}" for path in [*known, code]]
        versions = [__version__, *map(version, PACKAGES)]
        self.identity = layout.sha256_text(*files, *versions, *map(str, settings))
        # What is no folder is a name on the hub to transformers, and may change unseen.
        self.known = bool(known)
        self.folder = cache_dir() / "answers"

    def get(self, words: str, make: Callable[[], bytes]) -> bytes:
        """The answer to some words, kept from before or made now.

        An entry begins with the sha256 of its rest; one that is damaged is made again.
        """
        if not self.known:
            return make()
        path = self.folder / layout.sha256_text(self.identity, words)
        with suppress(OSError):
            entry = path.read_bytes()
            digest, answer = entry[:32], entry[32:]
            if hashlib.sha256(answer).digest() == digest:
                with suppress(OSError):
                    # What is used stays longest.
                    os.utime(path)
                return answer
        answer = make()
        with suppress(OSError, UserError):
            layout.remove_stale(self.folder)
            with layout.atomic_file(path) as temporary:
                temporary.write_bytes(hashlib.sha256(answer).digest() + answer)
            kept = sorted(self.folder.glob("[!.]*"), key=lambda old: layout.stamp_of(old)[1])
            for old in kept[:-MOST_ANSWERS]:
                old.unlink(missing_ok=True)
        return answer
