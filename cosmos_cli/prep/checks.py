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
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cosmos_cli import ranks
from cosmos_cli.errors import environment_error
from cosmos_cli.prep import damage

if TYPE_CHECKING:
    from cosmos_cli.model.video import Clip

# Reading clips takes cores too, so there is one check for every four.
CORES_PER_CHECK = 4
# More at once would gain nothing: four check an H.264 clip in less time than a GPU encodes it.
MOST_AT_ONCE = 4

# A process that uses a GPU must not be forked.
_SPAWN = multiprocessing.get_context("spawn")

Check = Callable[[], list[damage.Span]]
Item = TypeVar("Item")


class Checks:
    """Checks of videos: `ahead` of them run in processes while this one does other things."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self._pool = _pool(ahead) if ahead else None

    def begin(self, path: Path, clips: Sequence[Clip]) -> Check:
        """Return a function that waits for `damage.find` of these clips and returns its result.

        A check whose process crashes or is killed is repeated in a process of its own. If that one
        dies too, the function raises a UserError.
        """
        frames = [damage.Frames(clip.indices, clip.seconds) for clip in clips]
        if not self._pool:
            return lambda: damage.find(path, frames)
        with _interrupts_stay_here():
            try:
                found = self._pool.submit(damage.find, path, frames)
            except BrokenProcessPool:
                self._pool = _pool(self.ahead)
                found = self._pool.submit(damage.find, path, frames)

        def result() -> list[damage.Span]:
            try:
                return found.result()
            except BrokenProcessPool:
                # One dead process fails the checks of all videos, so it is unknown which did it.
                return _find_alone(path, frames)

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
            _end(self._pool, multiprocessing.active_children())


@contextmanager
def running(videos: int, processes: int) -> Iterator[Checks]:
    """Run as many checks ahead as this process may use cores for, none on a small machine.

    `processes` of this machine share the `videos`. Each takes at most a quarter of its share ahead:
    otherwise others may be idle.
    """
    cores = len(os.sched_getaffinity(0)) // processes
    ahead = min(cores // CORES_PER_CHECK, MOST_AT_ONCE, videos // (4 * processes))
    try:
        checks = Checks(ahead)
    except OSError:
        # A pool needs semaphores, and with them a /dev/shm that can be written.
        checks = Checks(0)
    try:
        yield checks
    finally:
        checks.stop()


def _find_alone(path: Path, frames: Sequence[damage.Frames]) -> list[damage.Span]:
    """Return `damage.find` from a process of its own, whose death can only be due to this video."""
    others, alone = multiprocessing.active_children(), _pool(1)
    try:
        with _interrupts_stay_here():
            found = alone.submit(damage.find, path, frames)
        return found.result()
    except BrokenProcessPool as error:
        what = "the process that looks for damaged frames in it crashed or was killed"
        fix = "replace or remove the video if this happens again, else close other programs"
        raise environment_error(path, what, fix) from error
    finally:
        _end(alone, [one for one in multiprocessing.active_children() if one not in others])


def _pool(size: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(size, _SPAWN, initializer=ranks.die_with_parent)


def _end(pool: ProcessPoolExecutor, its_processes: Sequence[BaseProcess]) -> None:
    """End a pool in the middle of its work."""
    for process in its_processes:
        process.kill()
    pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_stay_here() -> Iterator[None]:
    """Keep Ctrl-C from the processes that start meanwhile, so that they print no traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
