"""Start processes that help `cosmos prep`, one on each further GPU. No torch.

This process finds the videos, their captions and all errors in them, and finishes the dataset. Its
helpers only take pieces of work off it, so it does the rest if one of them dies.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cosmos_cli import console, gpus, ranks
from cosmos_cli.errors import UserError

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


# The time that all helpers together get to end before they are killed.
END_SECONDS = 3.0


def process_count(r: Recipe, pieces: int) -> int:
    """Return the number of processes that share the work: as for training, at most one per GPU.

    It is 1 if a launcher such as torchrun has already started one process per GPU.
    """
    if ranks.under_launcher():
        return 1
    visible = len(gpus.gpu_names())
    wanted = max(visible, 1) if r.num_processes == "auto" else int(r.num_processes)
    return max(min(wanted, visible or wanted, pieces), 1)


@contextmanager
def helping(
    r: Recipe, pieces: int, work: Callable[..., None], arguments: tuple[object, ...]
) -> Iterator[None]:
    """Run `work(*arguments, device)` in helper processes while the block runs.

    Process N computes on GPU N, the block on GPU 0. The block itself must wait for what the helpers
    have begun, because those that still run at its end are stopped.
    """
    count = process_count(r, pieces)
    if count == 1:
        yield
        return
    console.say(f"{count} processes share {pieces} videos")
    task = pickle.dumps((work, arguments))
    helpers: list[subprocess.Popen[bytes]] = []
    with ranks.RankErrors() as box:
        environment = {**ranks.environment(count), ranks.ADDRESS: box.address}
        try:
            for rank in range(1, count):
                helpers.append(_start(task, {**environment, "LOCAL_RANK": str(rank)}))
            yield
            codes = [helper.poll() for helper in helpers]
        finally:
            # Files are written atomically, so helpers have none to finish. They need the time to
            # remove the semaphores of their checks.
            for helper in helpers:
                helper.terminate()
            deadline = time.monotonic() + END_SECONDS
            for helper in helpers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    helper.wait(max(deadline - time.monotonic(), 0))
                ranks.kill_group(helper.pid)
                helper.wait()
        reasons = {message["error"]: message["rank"] for message in box.read()}
    for reason, rank in reasons.items():
        console.warn(f"process {rank} stopped, and others did its work: {reason}")
    for rank, code in enumerate(codes, start=1):
        if code and not reasons:
            console.warn(f"process {rank} stopped with code {code}, and others did its work")


def _start(task: bytes, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    helper = subprocess.Popen(
        [sys.executable, "-m", "cosmos_cli.prep.processes"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=sys.stderr,
        # Ctrl-C must reach only this process, which then stops its helpers.
        start_new_session=True,
    )
    assert helper.stdin
    # A helper that ended before it read its task is reported with its exit code.
    with contextlib.suppress(BrokenPipeError), helper.stdin as stream:
        stream.write(task)
    return helper


def main() -> int:
    """Do the work that `helping` sends on standard input, and return the exit code."""
    ranks.die_with_parent()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console.mute()
    rank = int(os.environ["LOCAL_RANK"])
    try:
        work, arguments = pickle.loads(sys.stdin.buffer.read())
        from cosmos_cli.model.device import gpu_memory_errors
        from cosmos_cli.recipe import advice

        with gpu_memory_errors(f"use {advice.smaller_clip(arguments[0])}"):
            work(*arguments, gpus.best_device())
    except UserError as error:
        ranks.post({"rank": rank, "error": str(error)[: ranks.MAX_CHARACTERS]})
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
