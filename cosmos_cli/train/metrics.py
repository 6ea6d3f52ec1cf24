"""Reduce the statistics of a training step over all ranks, write them, and stop on NaN."""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cosmos_cli import console, files
from cosmos_cli.model import edm
from cosmos_cli.paths import Run
from cosmos_cli.recipe import plan
from cosmos_cli.train import data, page, status
from cosmos_cli.train.engine import gpu_model

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


class Stats:
    """The loss and EDM error of a step over all ranks, by noise band, and requests to any rank.

    `edm` is the mean over all samples. `bands` holds the mean of each noise band, or None.
    """

    def __init__(
        self, totals: list[float], asked: list[int], edges: tuple[float, ...] = edm.SIGMA_BANDS
    ) -> None:
        self.edges, bands = edges, len(edges) - 1
        self.stop_code, self.save_asked, self.sample_asked = asked
        loss, micro_batches = totals[0], totals[1]
        sums, counts = totals[2 : 2 + bands], totals[2 + bands :]
        self.loss = loss / micro_batches
        self.edm = sum(sums) / sum(counts)
        self.bands = [s / c if c else None for s, c in zip(sums, counts, strict=True)]

    @classmethod
    def over_ranks(
        cls,
        losses: list[torch.Tensor],
        errors_B: list[torch.Tensor],
        sigmas_B: list[torch.Tensor],
        asked: tuple[int, bool, bool],
        sigma_scale: float = 1.0,
    ) -> Stats:
        """Reduce every rank's losses, errors and requests. The largest stop code wins.

        `sigma_scale` is that of the model's spec, and moves the noise bands.
        """
        edges = tuple(sigma_scale * edge for edge in edm.SIGMA_BANDS)
        errors = torch.cat(errors_B).double()
        sigmas, device = torch.cat(sigmas_B).to(errors.device), errors.device
        inside = [(sigmas >= low) & (sigmas < high) for low, high in pairwise(edges)]
        asked_of_any = torch.tensor(asked, dtype=torch.int64, device=device)
        dist.all_reduce(asked_of_any, dist.ReduceOp.MAX)
        sums = torch.stack(
            [
                torch.stack(losses).double().sum(),
                torch.tensor(float(len(losses)), dtype=torch.float64, device=device),
                *[errors[band].sum() for band in inside],
                *[band.sum().double() for band in inside],
            ]
        )
        dist.all_reduce(sums)
        return cls(sums.tolist(), asked_of_any.tolist(), edges)

    def row(self) -> dict[str, Any]:
        """Return the figures for metrics.jsonl. A noise band without a sample is null."""
        names = [f"edm_sigma_below_{high:g}" for high in self.edges[1:-1]]
        names.append(f"edm_sigma_from_{self.edges[-2]:g}")
        return {"loss": self.loss, "edm": self.edm, **dict(zip(names, self.bands, strict=True))}


class Metrics:
    """Writes metrics.jsonl, status.json and report.html of a run. Only rank 0 writes."""

    def __init__(self, run: Run, r: Recipe, start: int, device: torch.device) -> None:
        self.run = run
        self.compared = False
        self.saved = start
        planned = plan.plan(r, dist.get_world_size(), gpu_model(device))
        self.status = {
            "step": start,
            "max_steps": max(start, r.max_steps),
            "from": start,
            "saved_step": status.saved_step(run),
            "started": time.time(),
            "planned_memory_gb": round(planned.total_gb, 3),
        }
        if dist.get_rank() == 0:
            # Drop rows that are newer than the resume state, and the held-out error at its step:
            # that one is measured again.
            kept = (
                row
                for row in status.rows(run)
                if row["step"] < start or (row["step"] == start and status.HELD_OUT not in row)
            )
            files.write_text(run.metrics, "".join(f"{json.dumps(row)}\n" for row in kept))
            status.note(run, self.status)

    def write(self, row: dict[str, Any]) -> None:
        """Append the row of one step, and report peak GPU memory against the plan once."""
        # Skip the first step: AdamW allocates its moments after that step's peak, so its peak is
        # too low.
        if not self.compared and "peak_memory_gb" in row and row["step"] > self.status["from"] + 1:
            self.compared = True
            console.say(
                f"peak memory {row['peak_memory_gb']:.1f} GB on a GPU, "
                f"planned {self.status['planned_memory_gb']:.1f} GB"
            )
        self.status |= row
        if dist.get_rank() == 0:
            with files.disk_errors(self.run.metrics), self.run.metrics.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            status.note(self.run, self.status)

    def write_saved(self, step: int) -> None:
        """Record in status.json that the save of a step is complete, and write report.html.

        Nothing is written if it is no newer than in the last call.
        """
        if step <= self.saved:
            return
        self.saved = step
        # A stop saves a step that log_every_steps may leave out.
        self.status["step"] = max(step, self.status["step"])
        self.status["saved_step"] = max(step, self.status["saved_step"])
        if dist.get_rank() == 0:
            status.note(self.run, self.status)
            page.write_page(self.run)

    def write_held_out(self, step: int, errors: dict[str, float]) -> None:
        """Append the held-out errors of a step."""
        self.write({"step": step, **errors})
        console.say(f"step {step}: held-out error {errors[status.HELD_OUT]:.4f} (lower is better)")

    def write_samples(self, step: int, distances: dict[str, float]) -> None:
        """Append the distances of a step's samples to the training clips, if there are samples."""
        if distances:
            self.write({"step": step, **distances})


def words(row: dict[str, Any]) -> str:
    """Return the figures that the progress line shows for a step."""
    share = f", {row['mfu']:.0%} MFU" if "mfu" in row else ""
    return f"loss {row['loss']:.4f}, edm {row['edm']:.4f}{share}"


def gpu_row(r: Recipe, device: torch.device, seconds: float) -> dict[str, float]:
    """Return this GPU's peak memory so far (GB), and the model FLOPs utilisation of a step.

    Empty on a CPU. `mfu` is present only for GPUs whose peak rate is known.
    """
    if device.type == "cpu":
        return {}
    row = {"peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 3)}
    if gpu := gpu_model(device):
        rate = plan.model_tflop(r) / seconds / dist.get_world_size()
        row["mfu"] = round(rate / gpu.tflops, 4)
    return row


def require_finite_loss(
    stats: Stats, step: int, micro_batches: list[data.Batch], errors_B: list[torch.Tensor]
) -> None:
    """Stop the run before a non-finite loss reaches the weights.

    Raises:
        UserError: it names the step, the clips and their noise levels.
    """
    if math.isfinite(stats.loss) and math.isfinite(stats.edm):
        return
    errors = torch.cat(errors_B).tolist()
    samples = zip(_samples(micro_batches), errors, strict=True)
    offending = [name for name, error in samples if not math.isfinite(error)]
    raise data.not_finite_error("loss", f"step {step + 1}", offending)


def require_finite_gradient(norm: float, step: int, micro_batches: list[data.Batch]) -> None:
    """Stop the run before it saves weights that a non-finite gradient has updated.

    Raises:
        UserError: it names the step, the clips and their noise levels.
    """
    # DeepSpeed reports an infinite or NaN norm as -1.
    if math.isfinite(norm) and norm >= 0:
        return
    raise data.not_finite_error("gradient", f"step {step + 1}", _samples(micro_batches))


def _samples(micro_batches: list[data.Batch]) -> list[str]:
    return [sample for batch in micro_batches for sample in batch.samples]
