"""Train on one rank. torchrun starts this module with the path of the run's resolved recipe."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from cosmos_cli import console, files, paths, ranks, signals
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model.device import gpu_memory_errors
from cosmos_cli.model.ema import PowerEMA
from cosmos_cli.model.sequence import neighbours
from cosmos_cli.paths import Dataset, Run
from cosmos_cli.ranks import die_with_parent
from cosmos_cli.recipe import loading, plan
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import checkpoint, data, metrics, status
from cosmos_cli.train import engine as engines
from cosmos_cli.train.heldout import HeldOut
from cosmos_cli.train.previews import Pictures
from cosmos_cli.train.watchdog import Pulse

# NCCL_MAX_CTAS under ZeRO-3: the number of SMs that NCCL may hold to gather weights and reduce
# gradients. It holds them while it waits for the slowest rank, and full-grid GEMMs queue behind it.
# Measured on 2 x H100 with 12 blocks of the 7B: 6.18 s a step without communication, 6.58 s with
# NCCL's default, 6.30 s with 4.
NCCL_SMS = 4

_stop_code = 0
_save_asked = False


def learning_rate(r: Recipe, step: int) -> float:
    """Return the learning rate of the update that follows `step` completed updates.

    Its factor rises linearly from lr_start_factor to 1 over the warm-up, then changes linearly to
    lr_end_factor at max_steps.
    Source: cosmos-predict1 at 4ed35fa, `LambdaLinearScheduler`, one cycle.
    """
    if step < r.warmup_steps:
        factor = r.lr_start_factor + (1 - r.lr_start_factor) * step / r.warmup_steps
    else:
        done = (step - r.warmup_steps) / max(r.max_steps - r.warmup_steps, 1)
        factor = 1 + (r.lr_end_factor - 1) * min(done, 1.0)
    return r.learning_rate * factor


def set_learning_rate(engine: Any, r: Recipe, step: int) -> float:
    """Set the optimizer's learning rate for a step and return it."""
    rate = learning_rate(r, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    return rate


def train(r: Recipe, device: torch.device) -> dict[str, Any]:
    """Train to max_steps or until a stop signal, and return the figures of the run's result."""
    run = Run(r.run_dir)
    clips, held_out, about = open_dataset(r)
    sequence = neighbours(r.sequence_parallel)
    share = data.Share.of(
        dist.get_rank() // sequence.size,
        dist.get_world_size() // sequence.size,
        r.global_batch_size,
        r.micro_batch_size,
    )
    settings = data.BatchSettings(r.seed, r.global_batch_size, r.text_dropout)

    engine = engines.build(r, share, device)
    engine.module.net.share(sequence)
    ema = PowerEMA(
        checkpoint.shards(engine.module), r.ema_rate, None if r.offload == "none" else "cpu"
    )
    start = resume(r, run, engine, ema)
    record = metrics.Metrics(run, r, start, device)
    if held_out:
        record.write_held_out(start, held_out.measure(engine, device, start))
    shown = held_out.clips if held_out else clips
    pictures = Pictures(r, run, clips, shown, lambda: is_stopping(device))
    record.write_samples(start, pictures.make(engine, start, asked=False))

    saved, stop_code = start, 0
    with console.progress("train", r.max_steps, "steps", done=start) as bar:
        for step, micro_batches in data.batches(clips, share, settings, range(start, r.max_steps)):
            stats, row = optimize(r, run, engine, ema, step, micro_batches)
            done, stop_code = step + 1, stats.stop_code
            bar.advance(metrics.words(row))
            if done % r.log_every_steps == 0 or done == r.max_steps:
                record.write(row)
            saving = done % r.save_every_steps == 0 or done == r.max_steps or stats.save_asked
            if saving:
                save(r, run, engine, ema, done, about)
                record.write_saved(done)
                saved = done
            # Do not make a user who stops the run wait: the next start measures this step.
            if held_out and not stop_code and (saving or done % r.validate_every_steps == 0):
                record.write_held_out(done, held_out.measure(engine, device, done))
            if not stop_code:
                record.write_samples(done, pictures.make(engine, done, stats.sample_asked))
            if saving:
                record.write_page()
            if stop_code:
                break
    return {"step": saved, "exit_code": stop_code}


def optimize(
    r: Recipe,
    run: Run,
    engine: Any,
    ema: PowerEMA,
    step: int,
    micro_batches: list[data.Batch],
) -> tuple[metrics.Stats, dict[str, Any]]:
    """Run one optimizer step. Return its statistics with any requests, and its metrics.jsonl row.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    began = time.monotonic()
    rate = set_learning_rate(engine, r, step)
    losses, errors_B, sigmas_B = [], [], []
    for batch in micro_batches:
        loss, edm_B = engine(*batch.to(engine.device))
        engine.backward(loss)
        losses.append(loss.detach())
        errors_B.append(edm_B)
        sigmas_B.append(batch.sigma_B)
        if batch is not micro_batches[-1]:
            engine.step()
    stats = metrics.Stats.over_ranks(losses, errors_B, sigmas_B, requests(run))
    metrics.require_finite(stats, step, micro_batches, errors_B)
    engine.step()
    norm = metrics.grad_norm(engine)
    metrics.require_finite_gradient(norm, step, micro_batches)
    ema.update(checkpoint.shards(engine.module), step)
    row = {
        "step": step + 1,
        **stats.row(),
        "grad_norm": norm,
        "learning_rate": rate,
        "seconds": round(time.monotonic() - began, 4),
    }
    return stats, row | metrics.gpu_row(r, engine.device, row["seconds"])


def open_dataset(r: Recipe) -> tuple[data.Clips, HeldOut | None, dict[str, Any]]:
    """Return the training clips, the held-out clips if any, and the provenance for checkpoints."""
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    clips, held_out = (
        data.Clips(dataset.root, rows, r.spec)
        for rows in paths.split_clips(dataset.read_manifest())
    )
    about = {
        "recipe": json.loads(r.model_dump_json()),
        "dataset": files.sha256_file(dataset.manifest),
    }
    if r.lora_rank and dist.get_rank() == 0:
        # The factors of a LoRA are valid only together with the base weights they were trained on.
        base = paths.model_files(r.spec, r.checkpoints_dir, r.base).dit
        about["base"] = files.sha256_path(base)
    return clips, HeldOut(held_out, r.validate_clips) if len(held_out) else None, about


def resume(r: Recipe, run: Run, engine: Any, ema: PowerEMA) -> int:
    """Restore the newest resume state and return its step, or return 0 for a new run."""
    # Rank 0 decides: on a shared disk, another node may not see the last save yet.
    newest = [run.last_step]
    dist.broadcast_object_list(newest)
    (start,) = newest
    if start:
        checkpoint.resume(engine, ema, run, start)
        # DeepSpeed restores these settings from the checkpoint, but the recipe's values apply.
        for group in engine.optimizer.param_groups:
            group.update(engines.optimizer_settings(r))
        console.say(f"resumed at step {start} from {run.resume_state(start)}")
    return start


def save(r: Recipe, run: Run, engine: Any, ema: PowerEMA, step: int, about: dict[str, Any]) -> None:
    """Save a step, then delete the resume states that the recipe does not keep.

    Raises:
        UserError: the disk is too full, or a write fails.
    """
    if dist.get_rank() == 0:
        sizes = plan.disk_bytes(r, step)
        needed = sizes["model files of a save"] + sizes["a resume state"]
        fix = "free some space and run the same command again; the last save is intact"
        files.require_free(run.checkpoints, needed, f"the files of step {step}", fix)
    checkpoint.save(engine, ema, run, step, about)
    if dist.get_rank() == 0:
        checkpoint.prune(run, r)
    console.say(f"saved step {step} to {run.resume_state(step)}")


def requests(run: Run) -> tuple[int, bool, bool]:
    """Return the requests since the last step: the exit code to stop with or 0, save, sample."""
    global _save_asked
    save, _save_asked = _save_asked or _stop_code > 0, False
    return (
        _stop_code,
        save or _consume_request(run.save_request),
        _consume_request(run.sample_request),
    )


def is_stopping(device: torch.device) -> bool:
    """True if any rank has received a stop signal; every rank must call this."""
    asked = torch.tensor(int(_stop_code > 0), device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return bool(asked)


def _consume_request(request: Path) -> bool:
    """True if a user created this request file. Rank 0 deletes it; other ranks return False."""
    if dist.get_rank() or not request.exists():
        return False
    with files.disk_errors(request):
        request.unlink(missing_ok=True)
    return True


def _request_save(_number: int, _frame: FrameType | None) -> None:
    global _save_asked  # noqa: PLW0603
    _save_asked = True


def _request_stop(number: int, _frame: FrameType | None) -> None:
    global _stop_code  # noqa: PLW0603
    _stop_code = int(ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM)


def run_rank(r: Recipe) -> dict[str, Any]:
    """Train as the rank given by the environment, and return the figures of the run's result.

    Raises:
        UserError: training failed on this rank.
    """
    for number in signals.ending():
        signal.signal(number, _request_stop)
    signal.signal(signal.SIGUSR1, _request_save)
    run = Run(r.run_dir)
    if r.zero_stage == 3 and r.sequence_parallel == 1:
        os.environ.setdefault("NCCL_MAX_CTAS", str(NCCL_SMS))
    device = _join_world(r.timeout_seconds)
    if dist.get_rank():
        console.mute()
    watchdog = Pulse(r.timeout_seconds)
    watchdog.start()
    fix = "use more GPUs, `--set activation_checkpointing=all`, or fewer frames"
    with console.log_file(run.log), gpu_memory_errors(fix):
        outcome = train(r, device)
    if dist.get_rank() == 0:
        outcome["best_step"] = status.best_step(run)
        files.write_json(run.result, outcome)
        status.write_page(run)
    watchdog.end()
    dist.destroy_process_group()
    return outcome


def _join_world(timeout_seconds: float) -> torch.device:
    # DeepSpeed still calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

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
    die_with_parent()
    rank = int(os.environ["RANK"])

    def post_bug(kind: Any, error: BaseException, trace: Any) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        ranks.post({"rank": rank, "traceback": text[-ranks.MAX_CHARACTERS :]})

    sys.excepthook = post_bug
    try:
        run_rank(loading.load(resolved).recipe)
    except UserError as error:
        ranks.post({"rank": rank, "code": int(error.code), "error": str(error)})
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
