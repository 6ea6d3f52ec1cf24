"""The training loop of one rank, written out. torchrun starts it with the run's resolved recipe."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from cosmos_cli import console, layout, mailbox, recipe
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.keys import Recipe
from cosmos_cli.layout import Dataset, Run
from cosmos_cli.model import checkpoint, data, edm, weights
from cosmos_cli.model.device import gpu_memory_errors
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.elastic import die_with_parent
from cosmos_cli.model.ema import PowerEMA

_stop_code = 0


def learning_rate(r: Recipe, step: int) -> float:
    """The learning rate of the update after `step` completed ones.

    Linear from lr_start_factor to 1 over the warm-up, then linear to lr_end_factor at max_steps.
    Source: cosmos-predict1 at 4ed35fa, `LambdaLinearScheduler`, one cycle.
    """
    if step < r.warmup_steps:
        factor = r.lr_start_factor + (1 - r.lr_start_factor) * step / r.warmup_steps
    else:
        done = (step - r.warmup_steps) / max(r.max_steps - r.warmup_steps, 1)
        factor = 1 + (r.lr_end_factor - 1) * min(done, 1.0)
    return r.learning_rate * factor


def train(r: Recipe, device: torch.device) -> dict[str, Any]:
    """Trains to max_steps or until a signal; the figures of the run's result."""
    run = Run(r.run_dir.absolute())
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    clips = data.Clips(dataset.root, dataset.read_manifest()["clips"], r.spec)
    share = data.Share.of(
        dist.get_rank(), dist.get_world_size(), r.global_batch_size, r.micro_batch_size
    )
    settings = data.BatchSettings(r.seed, r.global_batch_size, r.text_dropout)
    about = {
        "recipe": json.loads(r.model_dump_json()),
        "dataset": layout.sha256_file(dataset.manifest),
    }

    engine = build_engine(r, share, device)
    ema = PowerEMA(checkpoint.shards(engine.module), r.ema_rate)
    start = (run.resumable_steps() or [0])[-1]
    if start:
        checkpoint.resume(engine, ema, run, start)
        # DeepSpeed restores these from the checkpoint; the recipe's hold.
        for group in engine.optimizer.param_groups:
            group.update(optimizer_settings(r))
        console.say(f"resumed at step {start} from {run.resume_state(start)}")
    metrics = Metrics(run, start)

    saved = start
    with console.progress("train", r.max_steps, "steps", done=start) as bar:
        for step, micro_batches in data.batches(clips, share, settings, range(start, r.max_steps)):
            began = time.monotonic()
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(r, step)
            losses, errors_B, sigmas_B = [], [], []
            for batch in micro_batches:
                loss, edm_B = engine(*batch.to(device))
                engine.backward(loss)
                losses.append(loss.detach())
                errors_B.append(edm_B)
                sigmas_B.append(batch.sigma_B)
                if batch is not micro_batches[-1]:
                    engine.step()
            stats = Stats.over_ranks(losses, errors_B, sigmas_B, device)
            require_finite(stats, step, micro_batches, errors_B)
            engine.step()
            ema.update(checkpoint.shards(engine.module), step)

            done = step + 1
            row = {
                "step": done,
                **stats.row(),
                "grad_norm": grad_norm(engine),
                "learning_rate": learning_rate(r, step),
                "seconds": round(time.monotonic() - began, 4),
            }
            bar.advance(f"loss {row['loss']:.4f}, edm {row['edm']:.4f}")
            if done % r.log_every_steps == 0 or done == r.max_steps:
                metrics.write(row)
            if done % r.save_every_steps == 0 or done == r.max_steps or stats.stop_code:
                checkpoint.save(engine, ema, run, done, about, r.keep_last)
                saved = done
                console.say(f"saved step {done} to {run.resume_state(done)}")
            if stats.stop_code:
                return {"step": saved, "exit_code": stats.stop_code}
    return {"step": saved, "exit_code": int(ExitCode.OK)}


def build_engine(r: Recipe, share: data.Share, device: torch.device) -> Any:
    """The DeepSpeed engine around the loss, with the base weights in its shards."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": r.micro_batch_size,
        "gradient_accumulation_steps": share.count // share.micro,
        "gradient_clipping": r.grad_clip,
        "steps_per_print": 10**9,
        "bf16": {"enabled": r.precision == "bf16"},
        "zero_optimization": {"stage": r.zero_stage, "contiguous_gradients": True},
    }
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=r.zero_stage == 3):
        net = DiT(r.spec.dit)
        module = edm.EDMLoss(net, r.spec)
    net.activation_checkpointing = r.activation_checkpointing
    base = layout.model_files(r.spec, r.checkpoints_dir, r.base).dit
    checkpoint.load_weights(module, weights.load_dit_state(base), base)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=r.learning_rate,
        **optimizer_settings(r),
        fused=True if device.type == "cuda" else None,
    )
    engine, *_ = deepspeed.initialize(model=module, config=config, optimizer=optimizer)
    return engine


def grad_norm(engine: Any) -> float | None:
    """Global norm of the gradient before clipping; ZeRO stage 0 does not tell it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def optimizer_settings(r: Recipe) -> dict[str, Any]:
    """What AdamW takes from the recipe besides the learning rate."""
    return {
        "betas": (r.beta1, r.beta2), "eps": r.adam_eps, "weight_decay": r.weight_decay
    }  # fmt: skip


class Stats:
    """Loss and EDM error of a step over all ranks, by noise band; and whether to stop."""

    def __init__(self, totals: list[float]) -> None:
        bands = len(edm.SIGMA_BANDS) - 1
        loss, micro_batches, self.stop_code = totals[0], totals[1], int(totals[2])
        sums, counts = totals[3 : 3 + bands], totals[3 + bands :]
        self.loss = loss / micro_batches
        self.edm = sum(sums) / sum(counts)
        self.bands = [s / c if c else None for s, c in zip(sums, counts, strict=True)]

    @classmethod
    def over_ranks(
        cls,
        losses: list[torch.Tensor],
        errors_B: list[torch.Tensor],
        sigmas_B: list[torch.Tensor],
        device: torch.device,
    ) -> Stats:
        """The sums of every rank's part of a step. The largest stop code wins."""
        errors, sigmas = torch.cat(errors_B).double(), torch.cat(sigmas_B).to(device)
        inside = [
            (sigmas >= low) & (sigmas < high)
            for low, high in zip(edm.SIGMA_BANDS, edm.SIGMA_BANDS[1:], strict=False)
        ]
        own = torch.tensor([float(_stop_code)], dtype=torch.float64, device=device)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        sums = torch.stack(
            [
                torch.stack(losses).double().sum(),
                torch.tensor(float(len(losses)), dtype=torch.float64, device=device),
                *[errors[band].sum() for band in inside],
                *[band.sum().double() for band in inside],
            ]
        )
        dist.all_reduce(sums)
        totals = sums.tolist()
        return cls([*totals[:2], own.item(), *totals[2:]])

    def row(self) -> dict[str, Any]:
        """The figures for metrics.jsonl; a band without a sample is null."""
        names = [f"edm_sigma_below_{high:g}" for high in edm.SIGMA_BANDS[1:-1]]
        names.append(f"edm_sigma_from_{edm.SIGMA_BANDS[-2]:g}")
        return {"loss": self.loss, "edm": self.edm, **dict(zip(names, self.bands, strict=True))}


def require_finite(
    stats: Stats, step: int, micro_batches: list[data.Batch], errors_B: list[torch.Tensor]
) -> None:
    """Ends the run before a non-finite loss reaches the weights.

    Raises:
        UserError: names step, clips and noise levels.
    """
    if math.isfinite(stats.loss) and math.isfinite(stats.edm):
        return
    own = [
        f"{name} (sigma {sigma:.4g})"
        for batch, errors in zip(micro_batches, errors_B, strict=True)
        for name, sigma, error in zip(
            batch.names, batch.sigma_B.tolist(), errors.tolist(), strict=True
        )
        if not math.isfinite(error)
    ]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    culprits = ", ".join(name for part in gathered for name in part) or "the log-variance head"
    raise UserError(
        f"the loss is not finite: {culprits}",
        code=ExitCode.TRAINING,
        where=f"step {step + 1}",
        fix="look at these clips, or lower learning_rate; the last save is untouched",
    )


class Metrics:
    """metrics.jsonl and status.json of a run, written by rank 0."""

    def __init__(self, run: Run, start: int) -> None:
        self.run = run
        if dist.get_rank() == 0:
            kept = _rows_until(run.metrics, start)
            layout.write_text(run.metrics, "".join(kept))

    def write(self, row: dict[str, Any]) -> None:
        """Appends one step."""
        if dist.get_rank() == 0:
            with layout.disk_errors(self.run.metrics), self.run.metrics.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            layout.write_json(self.run.status, {**row, "time": time.time(), "pid": os.getpid()})


def _rows_until(path: Path, step: int) -> list[str]:
    """The lines of steps that the resume state knows; a line cut by a kill ends the list."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    return kept


def _request_stop(number: int, _frame: FrameType | None) -> None:
    global _stop_code  # noqa: PLW0603
    _stop_code = int(ExitCode.SIGTERM if number == signal.SIGTERM else ExitCode.SIGINT)


def run_rank(r: Recipe) -> dict[str, Any]:
    """The figures of the run's result, after training as the rank that the environment names.

    Raises:
        UserError: what ended the run on this rank.
    """
    signal.signal(signal.SIGINT, _request_stop)
    signal.signal(signal.SIGTERM, _request_stop)
    run = Run(r.run_dir.absolute())
    device = _join_world()
    if dist.get_rank():
        console.mute()
    fix = "use more GPUs, activation_checkpointing: all, or fewer frames"
    with console.log_file(run.log), gpu_memory_errors(fix):
        outcome = train(r, device)
    if dist.get_rank() == 0:
        layout.write_json(run.result, outcome)
    dist.destroy_process_group()
    return outcome


def _join_world() -> torch.device:
    # DeepSpeed calls collectives by the names that torch 2.13 began to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl")
        return device
    # Its shared-memory all-reduce needs a compiler and over a minute to build; gloo serves a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    return torch.device("cpu")


def main(resolved: str) -> int:
    """Runs one rank that torchrun started; the exit code of its process."""
    die_with_parent()
    rank = int(os.environ["RANK"])

    def post_bug(kind: Any, error: BaseException, trace: Any) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        mailbox.post({"rank": rank, "traceback": text[-mailbox.MAX_CHARACTERS :]})

    sys.excepthook = post_bug
    try:
        run_rank(recipe.load(resolved).recipe)
    except UserError as error:
        mailbox.post({"rank": rank, "code": int(error.code), "error": str(error)})
        return int(error.code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
