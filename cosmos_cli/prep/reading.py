"""Read the next clips in threads while another one is encoded.

Decoding runs on the CPU, and on a fast GPU a clip takes longer to decode than to encode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from cosmos_cli.model.video import Clip

# A clip of a file.
Item = tuple[Path, Clip]


class Reader:
    """Reads clips with `read`; `ahead` of the planned ones before they are asked for.

    `read` returns pixels on `device`. Their memory belongs to the stream of a thread, so the GPU
    must have finished with them when they are freed.
    """

    def __init__(
        self, read: Callable[[Path, Clip], Tensor], ahead: int, device: torch.device
    ) -> None:
        self.read, self.ahead, self.device = read, ahead, device
        self._pool = ThreadPoolExecutor(ahead, initializer=self._use_own_stream) if ahead else None
        self._planned: deque[Item] = deque()
        self._begun: dict[Item, Future[Tensor]] = {}

    def plan(self, path: Path, clips: Iterable[Clip]) -> None:
        """Note that these clips will be asked for, after those that were planned before."""
        if self._pool:
            self._planned.extend((path, clip) for clip in clips)

    def get(self, path: Path, clip: Clip) -> Tensor:
        """Return the pixels of a clip, and begin to read the planned ones after it.

        Planned clips before it are dropped, because their video was rejected.
        """
        if not self._pool:
            return self.read(path, clip)
        item = path, clip
        if item in self._planned:
            while (passed := self._planned.popleft()) != item:
                self._begun.pop(passed, Future()).cancel()
        for following in (item, *islice(self._planned, self.ahead)):
            if following not in self._begun:
                self._begun[following] = self._pool.submit(self._read_whole, *following)
        return self._begun.pop(item).result()

    def _use_own_stream(self) -> None:
        # On the stream of the encoder, each copy to the GPU would wait for the clip being encoded.
        if self.device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def _read_whole(self, path: Path, clip: Clip) -> Tensor:
        pixels = self.read(path, clip)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return pixels

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
