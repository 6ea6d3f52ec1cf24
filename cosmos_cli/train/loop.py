"""The training loop: set up, then the steps, and what happens every N steps."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cosmos_cli import console
from cosmos_cli.model.ema import PowerEMA
from cosmos_cli.model.sequence import sequence_group
from cosmos_cli.paths import Run
from cosmos_cli.train import checkpoint, data, metrics, requests
from cosmos_cli.train import engine as engines
from cosmos_cli.train.saver import Saver

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe
    from cosmos_cli.train.heldout import HeldOut
    from cosmos_cli.train.previews import Previews


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


def train(
    r: Recipe,
    device: torch.device,
    clips: data.Clips,
    held_out: HeldOut | None,
    previews: Previews,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Train to max_steps or until a stop signal, and return the figures of the run's result.

    `device` is this rank's device. `about` is the provenance that every checkpoint records.
    """
    run = Run(r.run_dir)
    sequence = sequence_group(r.sequence_parallel)
    rank, world = (n // sequence.size for n in (dist.get_rank(), dist.get_world_size()))
    share = data.Share.of(rank, world, r.global_batch_size, r.micro_batch_size)
    settings = data.BatchSettings(r.seed, r.global_batch_size, r.text_dropout)

    console.say(f"loading the base weights {r.model_files.dit}")
    engine = engines.build(r, share, device)
    engine.module.net.share(sequence)
    ema_device = None if r.offload == "none" else "cpu"
    ema = PowerEMA(checkpoint.shards(engine.module), r.ema_rate, ema_device)
    start = resume_run(r, run, engine, ema)
    saver = Saver(engine, ema, run, r, about)
    record = metrics.Metrics(run, r, start, device)
    if held_out:
        console.say(f"step {start}: measuring the error on {len(held_out.chosen)} held-out clips")
        record.write_held_out(start, held_out.measure(engine, device, start))
    record.write_samples(start, previews.make(engine, start, asked=False))

    # A stop among these pictures leaves them to the next start, which begins at the same step.
    saved, stop_code = start, requests.stop_code(device)
    steps = range(start, start if stop_code else r.max_steps)
    with console.progress("train", r.max_steps, "steps", done=start) as bar, saver:
        for step, micro_batches in data.batches(clips, share, settings, steps):
            stats, row = optimize(r, engine, ema, saver, step, micro_batches)
            done, stop_code = step + 1, stats.stop_code
            bar.advance(metrics.words(row))
            record.status["running_seconds"] = bar.seconds()
            if done % r.log_every_steps == 0 or done == r.max_steps:
                record.write(row)
            saving = done % r.save_every_steps == 0 or done == r.max_steps or stats.save_asked
            if saving:
                saver.save(done)
                saved = done
            # Do not make a user who stops the run wait: the next start measures this step.
            if held_out and not stop_code and (saving or done % r.validate_every_steps == 0):
                record.write_held_out(done, held_out.measure(engine, device, done))
            if not stop_code:
                with bar.paused():
                    record.write_samples(done, previews.make(engine, done, stats.sample_asked))
                stop_code = requests.stop_code(device) if saving else 0
            if stop_code or done == r.max_steps:
                saver.finish()
            record.write_saved(saver.check())
            if stop_code:
                break
    return {"step": saved, "exit_code": stop_code}


def optimize(
    r: Recipe, engine: Any, ema: PowerEMA, saver: Saver, step: int, micro_batches: list[data.Batch]
) -> tuple[metrics.Stats, dict[str, Any]]:
    """Run one optimizer step. Return its statistics with any requests, and its metrics.jsonl row.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    began = time.monotonic()
    rate = learning_rate(r, step)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    losses, errors_B, sigmas_B = [], [], []
    for batch in micro_batches:
        loss, edm_B = engine(*batch.to(engine.device))
        engine.backward(loss)
        losses.append(loss.detach())
        errors_B.append(edm_B)
        sigmas_B.append(batch.sigma_B)
        if batch is not micro_batches[-1]:
            engine.step()
    asked, scale = requests.since_last_step(saver.run), r.spec.sigma_scale
    stats = metrics.Stats.over_ranks(losses, errors_B, sigmas_B, asked, scale)
    metrics.require_finite_loss(stats, step, micro_batches, errors_B)
    saver.wait_copied()
    engine.step()
    # Before clipping.
    norm = float(engine.get_global_grad_norm())
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


def resume_run(r: Recipe, run: Run, engine: Any, ema: PowerEMA) -> int:
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
