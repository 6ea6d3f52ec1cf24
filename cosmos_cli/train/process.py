"""The process of one rank. torchrun starts this module with the path of the resolved recipe."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from cosmos_cli import console, files, hashes, ranks
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model.device import gpu_memory_errors
from cosmos_cli.paths import Run
from cosmos_cli.prep import holdout
from cosmos_cli.recipe import advice, loading
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import data, loop, page, requests, status
from cosmos_cli.train.heldout import HeldOut
from cosmos_cli.train.previews import Previews
from cosmos_cli.train.watchdog import Watchdog

# NCCL_MAX_CTAS under ZeRO-3: the number of SMs that NCCL may hold to gather weights and reduce
# gradients. It holds them while it waits for the slowest rank, and full-grid GEMMs queue behind it.
# Measured on 2 x H100 with 12 blocks of the 7B: 6.18 s a step without communication, 6.58 s with
# NCCL's default, 6.30 s with 4.
NCCL_SMS = 4


class LostConnection(UserError):
    """This rank lost its connection to another one, whose own failure says more if there is one."""


@contextmanager
def connection_errors() -> Iterator[None]:
    """Turn the errors of communication between the ranks into a LostConnection.

    The time-outs of gloo and NCCL count seconds. So a run that was stopped as a whole for longer,
    as by a closed laptop or a paused virtual machine, may find them expired.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        # gloo begins with a place in its source and ends with general advice.
        reason = str(error).rpartition("] ")[2].partition(". ")[0].partition("\n")[0][:100]
        raise LostConnection(
            "lost the connection to another rank, which hangs or has ended, or the run was stopped "
            f"as a whole for longer than timeout_seconds ({reason})",
            code=ExitCode.TRAINING, fix="the same command resumes",
        ) from error  # fmt: skip


def run_rank(r: Recipe) -> dict[str, Any]:
    """Train as the rank given by the environment, and return the figures of the run's result.

    Raises:
        UserError: training failed on this rank.
    """
    requests.listen()
    run = Run(r.run_dir)
    if r.zero_stage == 3 and r.sequence_parallel == 1:
        os.environ.setdefault("NCCL_MAX_CTAS", str(NCCL_SMS))
    device = join_world(r.timeout_seconds)
    if dist.get_rank():
        console.mute()
    watchdog = Watchdog(r.timeout_seconds)
    watchdog.start()
    fix = advice.relief(r, dist.get_world_size())
    with console.log_file(run.log), gpu_memory_errors(fix), connection_errors():
        outcome = train_on_dataset(r, device)
    if dist.get_rank() == 0:
        outcome["best_step"] = status.best_step(run)
        files.write_json(run.result, outcome)
        page.write_page(run)
    watchdog.end()
    dist.destroy_process_group()
    return outcome


def train_on_dataset(r: Recipe, device: torch.device) -> dict[str, Any]:
    """Open the recipe's dataset and train on it; return the figures of the run's result."""
    clips, held_out, about = open_dataset(r)
    shown = held_out.clips if held_out else clips
    stop_code = partial(requests.stop_code, device)
    previews = Previews(r, Run(r.run_dir), clips, shown, stop_code)
    return loop.train(r, device, clips, held_out, previews, about)


def open_dataset(r: Recipe) -> tuple[data.Clips, HeldOut | None, dict[str, Any]]:
    """Return the training clips, the held-out clips if any, and the provenance for checkpoints."""
    dataset = r.dataset
    manifest = dataset.read_manifest()
    clips, held_out = (
        data.Clips(dataset.root, rows, r.spec) for rows in holdout.split_clips(manifest)
    )
    about = {
        "recipe": json.loads(r.model_dump_json()),
        "dataset": hashes.sha256_file(dataset.manifest),
        "measured": holdout.measured_key(manifest, r.validate_clips),
    }
    if r.lora_rank and dist.get_rank() == 0:
        # The factors of a LoRA are valid only together with the base weights they were trained on.
        base = r.model_files.dit
        about["base"] = hashes.sha256_path(base)
    return clips, HeldOut(held_out, r.validate_clips) if len(held_out) else None, about


def join_world(timeout_seconds: float) -> torch.device:
    """Join the other ranks over NCCL, or over gloo on a CPU; return this rank's device."""
    # DeepSpeed still calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    # Otherwise each full garbage collection goes through all objects of torch and DeepSpeed, which
    # costs 1.2 s at the start of a training on the CPU.
    gc.freeze()
    logger.setLevel("WARNING")
    # The watchdog stops a hung run earlier, and names the rank that the others wait for.
    timeout = timedelta(seconds=2 * timeout_seconds)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl", timeout=timeout)
        return device
    # DeepSpeed's shared-memory all-reduce needs a compiler and takes over a minute to build. On
    # a CPU, gloo is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", timeout=timeout)
    return torch.device("cpu")


def main(resolved: str) -> int:
    """Run the rank that torchrun started, and return the exit code of its process."""
    ranks.die_with_parent()
    rank = int(os.environ["RANK"])

    def post_bug(kind: Any, error: BaseException, trace: Any) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        ranks.post({"rank": rank, "traceback": text[-ranks.MAX_CHARACTERS :]})

    sys.excepthook = post_bug
    try:
        run_rank(loading.load(resolved).recipe)
    except LostConnection as error:
        ranks.post({"rank": rank, "connection": str(error)})
        return int(error.code)
    except UserError as error:
        ranks.post({"rank": rank, "code": int(error.code), "error": str(error)})
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
