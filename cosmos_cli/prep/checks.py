"""Look for damage in the next videos while others are encoded. No torch.

A check decodes on one core, which takes longer than encoding on a GPU. So checks run ahead in
processes, where a machine has the cores for it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cosmos_cli import gpus, ranks
from cosmos_cli.errors import environment_error
from cosmos_cli.prep import damage

if TYPE_CHECKING:
    from cosmos_cli.model.video import Clip

# Reading clips takes other cores, so one in four checks.
CORES_PER_CHECK = 4
# More at once would gain nothing: four check an H.264 clip in less time than a GPU encodes it.
MOST_AT_ONCE = 4

Check = Callable[[], list[damage.Span]]
Item = TypeVar("Item")


class Checks:
    """Checks of videos: `ahead` of them run in processes while this one does other things."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self._processes: set[BaseProcess] = set()
        # A process that uses a GPU must not be forked.
        spawn = multiprocessing.get_context("spawn")
        self._pool = (
            ProcessPoolExecutor(ahead, spawn, initializer=ranks.die_with_parent) if ahead else None
        )

    def begin(self, path: Path, clips: Sequence[Clip]) -> Check:
        """Return a function that waits for `damage.find` of these clips and returns its result.

        Raises:
            UserError: the process of a check was killed. The returned function raises it too.
        """
        frames = [damage.Frames(clip.indices, clip.seconds) for clip in clips]
        if not self._pool:
            return lambda: damage.find(path, frames)
        with _named(path), _interrupts_stay_here():
            others = {*multiprocessing.active_children()}
            found: Future[list[damage.Span]] = self._pool.submit(damage.find, path, frames)
            self._processes |= {*multiprocessing.active_children()} - others

        def result() -> list[damage.Span]:
            with _named(path):
                return found.result()

        return result

    def delayed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield each item after `ahead` further ones were read, so that its check has time."""
        waiting: deque[Item] = deque()
        for item in items:
            waiting.append(item)
            if len(waiting) > self.ahead:
                yield waiting.popleft()
        yield from waiting

    def stop(self) -> None:
        """End the processes, also in the middle of a check."""
        if self._pool:
            for process in self._processes:
                process.kill()
            self._pool.shutdown(cancel_futures=True)


@contextmanager
def running() -> Iterator[Checks]:
    """Run as many checks ahead as this process may use cores for, none on a small machine."""
    cores = len(os.sched_getaffinity(0)) // max(len(gpus.gpu_names()), 1)
    checks = Checks(min(cores // CORES_PER_CHECK, MOST_AT_ONCE))
    try:
        yield checks
    finally:
        checks.stop()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the death of a process into a UserError that names the video."""
    try:
        yield
    except BrokenProcessPool as error:
        what = "a process that looks for damaged frames was killed"
        raise environment_error(path, what, "run the same command again") from error


@contextmanager
def _interrupts_stay_here() -> Iterator[None]:
    """Keep Ctrl-C from the processes that start meanwhile, so that they print no traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
