"""Generate videos as one of several processes: run whole jobs, or share one with others."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from cosmos_cli import console, files, ranks, signals
from cosmos_cli.errors import ExitCode, Interrupted, UserError
from cosmos_cli.generate import jobs
from cosmos_cli.generate.phases import generate
from cosmos_cli.generate.video_models import Pair
from cosmos_cli.gpus import best_device
from cosmos_cli.model.device import gpu_memory_errors
from cosmos_cli.model.sequence import sequence_group
from cosmos_cli.recipe import advice

# A pipe writes up to 4,096 bytes atomically, so short lines of several processes do not mix.
MAX_CHARACTERS = 500


def main(listed: str, *memory: str) -> int:
    """Generate this rank's share of the jobs in a file; print a line of JSON for each.

    `memory` are files for the streamed weights of each denoiser of the jobs, in their order.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank:
        console.mute()
    todo = [jobs.from_json(entry) for entry in files.read_json(Path(listed))]
    shared = dict(zip(dict.fromkeys(job.denoiser for job in todo), map(Path, memory), strict=True))
    device = best_device()
    pair, teams = None, world
    if world > len(todo):
        dist.init_process_group("gloo" if device == "cpu" else "nccl")
        pair, teams = pair_of(world // len(todo)), len(todo)
    try:
        with gpu_memory_errors(f"use {advice.smaller_clip(todo[0].r)}"):
            for result in generate(todo[rank * teams // world :: teams], device, pair, shared):
                if pair is None or pair.writes:
                    _report(todo.index(result.job), result.error)
    except UserError as error:
        _report(None, error)
    finally:
        if pair:
            dist.destroy_process_group()
    return 0


def pair_of(size: int) -> Pair:
    """Return this rank's pair within its team of `size` ranks. Every rank must create every group.

    The first half of a team runs the conditional pass, the second half the unconditional pass. Each
    half is a sequence-parallel group, and a pair joins the two ranks that hold the same tokens.
    """
    sequence = sequence_group(size // 2)
    team, place = divmod(dist.get_rank(), size)
    firsts = [t * size + i for t in range(dist.get_world_size() // size) for i in range(size // 2)]
    groups = {first: dist.new_group([first, first + size // 2]) for first in firsts}
    return Pair(place // (size // 2), groups[team * size + sequence.index], sequence)


def _report(number: int | None, error: UserError | None) -> None:
    line = {"job": number}
    if error:
        line |= {"error": str(error)[:MAX_CHARACTERS], "code": int(error.code)}
    os.write(1, (json.dumps(line) + "\n").encode())


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise Interrupted(ExitCode.SIGTERM)


if __name__ == "__main__":
    for number in signals.ending().keys() - {signal.SIGINT}:
        signal.signal(number, _interrupt)
    try:
        ranks.die_with_parent()
        sys.exit(main(*sys.argv[1:]))
    except Interrupted as end:
        # Also while this process reports an error, or waits for the others to start.
        sys.exit(int(end.code))
