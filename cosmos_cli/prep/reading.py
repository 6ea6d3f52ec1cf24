"""Read the next clip in a thread while another one is encoded.

Decoding runs on the CPU, and on a fast GPU a clip takes longer to decode than to encode. One thread
is enough to keep it busy, and no file is ever read by two threads at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from cosmos_cli.model.video import Clip

# A clip of a file.
Item = tuple[Path, Clip]


class Reader:
    """Reads clips with `read`, with `ahead` the planned ones before they are asked for."""

    def __init__(self, read: Callable[[Path, Clip], Tensor], *, ahead: bool) -> None:
        self.read = read
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._planned: deque[Item] = deque()
        self._next: tuple[Item, Future[Tensor]] | None = None

    def plan(self, path: Path, clips: Iterable[Clip]) -> None:
        """Note that these clips will be asked for, after those that were planned before."""
        if self._pool:
            self._planned.extend((path, clip) for clip in clips)

    def get(self, path: Path, clip: Clip) -> Tensor:
        """Return the pixels of a clip, and begin to read the planned one after it.

        Planned clips that come before it are not read: their video was rejected.
        """
        if not self._pool:
            return self.read(path, clip)
        item = path, clip
        begun = self._begun(item)
        if item in self._planned:
            while self._planned.popleft() != item:
                pass
        pixels = begun.result()
        if self._planned:
            following = self._planned[0]
            self._next = following, self._pool.submit(self.read, *following)
        return pixels

    def _begun(self, item: Item) -> Future[Tensor]:
        assert self._pool
        begun, self._next = self._next, None
        if begun and begun[0] == item:
            return begun[1]
        return self._pool.submit(self.read, *item)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
