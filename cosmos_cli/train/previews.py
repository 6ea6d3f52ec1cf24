"""Make previews and samples during training, within a small share of the run's time.

A preview is cheap: it shows one denoising step on a few noised clips. A sample is a whole video,
generated from the caption of one of these clips by the solver of `cosmos generate`. The
unconditional pass of guidance uses an all-zero text embedding, because training does not load the
text encoder. The distance of the samples to the training clips is measured.

The network is the one inside the DeepSpeed engine. ZeRO-3 gathers its weights in every forward
pass, so all ranks must run equally many passes: a rank without work repeats the last item.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_cli import console, files
from cosmos_cli.errors import UserError
from cosmos_cli.model import cond_frames, edm, mp4, rgb, sampler
from cosmos_cli.model.cond_frames import CondFrames
from cosmos_cli.model.device import gpu_memory_errors, has_room, is_out_of_memory
from cosmos_cli.model.tokenizer import Tokenizer, load_tokenizer
from cosmos_cli.paths import Run
from cosmos_cli.recipe import advice, plan
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.spec import PREVIEW_SIGMAS
from cosmos_cli.train import nearest
from cosmos_cli.train.data import Clips
from cosmos_cli.train.heldout import HeldOut

# The latent frames of a clip that a Video2World model is given.
GIVEN = 1
# A preview decodes this number of latent frames and shows the last frame of the result.
LATENT_FRAMES = 2
CELL_PIXELS = 200
SHEET_COLUMNS = 4
# The recipe key that turns each kind off when it is 0.
OFF = {"previews": "preview_every_steps", "samples": "sample_every_saves"}


class _Stopping(Exception):
    """Raised on all ranks when the run is to stop."""


class _Skipped(Exception):
    """Raised on all ranks when a picture is left out. The message says why."""


class Previews:
    """Writes previews and samples into the folder of a run; every rank must make the same calls.

    If a picture does not fit the memory of any one rank, all ranks leave it out with one warning,
    and training continues. If a forward pass exchanges weights or tokens between ranks, a failure
    on one rank would leave the others waiting. So all ranks first agree that each has room for it.
    """

    def __init__(
        self, r: Recipe, run: Run, clips: Clips, shown: Clips, stop_code: Callable[[], int]
    ) -> None:
        """Choose some of the clips in `shown`. Samples are compared with the training set, `clips`.

        `stop_code` returns the same on all ranks: not 0 if the run is to stop. Unfinished samples
        are then abandoned.
        """
        self.r, self.run, self.clips, self.stop_code = r, run, clips, stop_code
        self.shown = HeldOut(shown, r.preview_clips, PREVIEW_SIGMAS, (GIVEN,))
        self.budget = TimeBudget(r.preview_share)
        self.warned: set[str] = set()

    def make(self, engine: Any, step: int, asked: bool) -> dict[str, float]:
        """Make pictures that are due after a step, or `asked` for. Return the samples' figures."""
        r, figures = self.r, {}
        previews = _due(step, r.preview_every_steps, r.max_steps)
        samples = _due(step, r.sample_every_saves * r.save_every_steps, r.max_steps)
        # A resumed run may have made the pictures of its first step already.
        previews = previews and not self.run.preview(step).exists()
        shown = (self.run.sample(step, i) for i in range(len(self.shown.chosen)))
        samples = samples and not all(path.with_suffix(".jpg").exists() for path in shown)
        if previews and self.budget.allows("previews", step, engine.device):
            self._attempt("previews", engine, step, self._preview)
        if asked or (samples and self.budget.allows("samples", step, engine.device)):
            figures = self._attempt("samples", engine, step, self._sample)
        return figures

    def _attempt(
        self, kind: str, engine: Any, step: int, work: Callable[[Any, int], dict[str, float]]
    ) -> dict[str, float]:
        """Make the pictures of a kind. If they are left out, warn once per kind and return {}."""
        with gpu_memory_errors(f"turn {kind} off with `--set {OFF[kind]}=0`"):
            try:
                with self.budget.timed(kind, step):
                    return work(engine, step)
            except _Skipped as skipped:
                self._warn(kind, engine, step, skipped)
                return {}
            finally:
                if engine.device.type == "cuda":
                    # Give the cached memory back, so the next training step has as much as before.
                    torch.cuda.empty_cache()

    def _warn(self, kind: str, engine: Any, step: int, why: object) -> None:
        if kind in self.warned:
            return
        self.warned.add(kind)
        room = f", or {advice.relief(self.r, dist.get_world_size())}"
        console.warn(
            f"step {step}: {kind} are left out, now and whenever they fail again: {why}; "
            f"training continues; turn them off with `--set {OFF[kind]}=0`"
            f"{room if engine.device.type == 'cuda' else ''}"
        )

    def _require_room(self, engine: Any) -> None:
        """Raise _Skipped unless a forward pass fits on every rank; every rank must call this."""
        needed = plan.forward_bytes(self.r, dist.get_world_size())
        fits = has_room(engine.device, needed)
        why = f"a forward pass needs {console.size(needed)} of GPU memory"
        _require([] if fits else [why], engine.device)

    def _denoise(
        self, net: Any, missing: list[str], frames: CondFrames | None, *inputs: Tensor
    ) -> Tensor:
        """Return the denoiser's estimate, or xt once this rank has run out of memory.

        A rank that ran out of memory must still join every collective operation, or the others
        wait for it. Without ZeRO-3 and sequence parallelism a forward pass has no collectives, so
        only then can this rank survive the failure.
        """
        sigma_data = self.r.spec.sigma_data
        told = frames.shown_to(net, sigma_data) if frames else net

        def estimate() -> Tensor:
            denoised = edm.denoise(told, *inputs, sigma_data)
            return frames.restore(denoised) if frames else denoised

        if self.r.zero_stage == 3 or net.sequence.size > 1:
            return estimate()
        if not missing:
            with _spared(missing):
                return estimate()
        return inputs[0]

    @torch.no_grad()
    def _preview(self, engine: Any, step: int) -> dict[str, float]:
        """Write a sheet with a row for each clip: a frame of it, and its estimate at each noise."""
        self._require_room(engine)
        net, device = engine.module.net, engine.device
        dtype, missing = next(net.parameters()).dtype, list[str]()

        def estimate(i: int) -> Tensor:
            x0, sigma_B, noise, text_emb, fps_B, *given = self.shown.batch(i).to(device)
            frames: CondFrames | None = given[0] if given else None
            xt = x0 + sigma_B.view(-1, 1, 1, 1, 1) * noise
            inputs = (xt, sigma_B, text_emb.to(dtype), fps_B)
            denoised = self._denoise(net, missing, frames, *inputs)
            return denoised[:, :, :LATENT_FRAMES]

        estimates = _split_over_ranks(estimate, len(self.shown.samples), net.sequence.size)
        _require(missing, device)
        if dist.get_rank() == 0:
            with _spared(missing):
                self._write_preview(step, iter(estimates), device)
        _require(missing, device)
        return {}

    def _write_preview(self, step: int, estimates: Iterator[Tensor], device: torch.device) -> None:
        cells = []
        for clip in self.shown.chosen:
            cells.append(self.shown.clips.latent(clip)[None, :, :LATENT_FRAMES])
            cells += [next(estimates) for _ in PREVIEW_SIGMAS]
        with self._decoder(device) as decode:
            frames = torch.cat([decode(cell)[:, -1:] for cell in cells], dim=1)
            size = (1 + len(PREVIEW_SIGMAS), len(self.shown.chosen), CELL_PIXELS)
            with files.atomic_file(self.run.preview(step)) as temporary:
                rgb.contact_sheet(frames, *size).save(temporary, quality=90)

    @torch.no_grad()
    def _sample(self, engine: Any, step: int) -> dict[str, float]:
        """Write a video of each clip's caption. Return the distances to the training clips."""
        net, device, chosen = engine.module.net, engine.device, self.shown.chosen
        missing: list[str] = []
        self._require_room(engine)
        try:
            x0 = _split_over_ranks(
                lambda i: self._generate(net, device, i, missing), len(chosen), net.sequence.size
            )
        except _Stopping:
            console.say(f"step {step}: no samples, the run is stopping")
            return {}
        _require(missing, device)
        rank, world = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            # Before the videos: the page of a run shows no sample without its prompt.
            captions = [self._caption(clip) for clip in chosen]
            files.write_json(self.run.sample_prompts(step), captions)
        with _spared(missing), self._decoder(device) as decode:
            for i in range(rank, len(chosen), world):
                self._write_sample(self.run.sample(step, i), decode(x0[i]))
        if why := _failure_of_any(missing, device):
            self._warn("samples", engine, step, why)
            missing.clear()
        if len(self.clips) < 2:
            return {}
        latents = [latent[0].cpu() for latent in x0]
        with _spared(missing):
            minima = torch.cat(nearest.distances(latents, self.clips, rank, world)).to(device)
        _require(missing, device)
        dist.all_reduce(minima, dist.ReduceOp.MIN)
        closest = minima[: len(latents)].min().item()
        typical = minima[len(latents) :].median().item()
        console.say(
            f"step {step}: samples compared with training clips: nearest {closest:.3f} "
            f"(typical between clips {typical:.3f}; far below means memorised)"
        )
        return {"nearest_clip": closest, "clips_apart": typical}

    def _generate(self, net: Any, device: torch.device, i: int, missing: list[str]) -> Tensor:
        """Return the latent of one sample, (1, C, T, H, W)."""
        r = self.r
        fps_B = torch.tensor([r.fps], device=device)
        x0, cond, _ = self.shown.clips.read(self.shown.chosen[i])
        cond = cond[None].to(device, next(net.parameters()).dtype)
        text_embs = [cond, torch.zeros_like(cond)] if r.guidance else [cond]
        shape = (1, *r.latent_shape)
        given: CondFrames | None = None
        if r.spec.takes_frames:
            first = x0[None, :, :GIVEN].to(device)
            given = cond_frames.for_sampling(first, shape[2], [r.sampling_seed + i])

        def passes(xt: Tensor, sigma_B: Tensor) -> list[Tensor]:
            frames = given.at(sigma_B) if given else None
            used = text_embs if sampler.is_guided(r, sigma_B.log() / 4) else text_embs[:1]
            inputs = [(xt, sigma_B, text, fps_B) for text in used]
            return [self._denoise(net, missing, frames, *own) for own in inputs]

        began, first = time.monotonic(), i == 0 and "samples" not in self.budget.cost

        def stop_if_asked(done: int) -> None:
            if self.stop_code():
                raise _Stopping
            if first and done == 0:
                groups = dist.get_world_size() // net.sequence.size
                rounds = -(-len(self.shown.chosen) // groups)
                seconds = (time.monotonic() - began) * r.evaluations * rounds
                console.say(
                    f"{len(self.shown.chosen)} sample videos take about "
                    f"{console.duration(seconds)}; `--set sample_every_saves=0` makes none"
                )

        noise = sampler.start_noise(r.sampling_seed + i, shape).to(device)
        return sampler.sample(sampler.guide(passes, r.guidance), noise, r, stop_if_asked)

    def _write_sample(self, path: Path, pixels: Tensor) -> None:
        with files.atomic_file(path) as temporary:
            mp4.write_mp4(temporary, pixels, self.r.fps, self.r.video_crf)
        with files.atomic_file(path.with_suffix(".jpg")) as temporary:
            sheet = rgb.contact_sheet(pixels, SHEET_COLUMNS, 1, CELL_PIXELS)
            sheet.save(temporary, quality=90)

    def _caption(self, clip: int) -> str:
        metas = self.r.dataset.metas
        name = Path(self.shown.clips.clips[clip]["text"]).stem
        try:
            return files.read_text(metas / f"{name}.txt", files.CAPTION).strip()
        except UserError:
            return "(its caption file is missing)"

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        try:
            return load_tokenizer(self.r.model_files.tokenizer, self.r.spec, "cpu", dtype)
        except UserError as error:
            # The preflight found the tokenizer, so it was lost since. Training does not need it.
            raise _Skipped(str(error)) from error

    @contextmanager
    def _decoder(self, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from a latent (1, C, T, H, W) to pixels, uint8 CTHW on the CPU."""
        tokenizer = self._tokenizer
        dtype = next(tokenizer.parameters()).dtype
        try:
            tokenizer.to(device)
            yield lambda x0: rgb.to_uint8(tokenizer.decode(x0.to(device, dtype))[0]).cpu()
        finally:
            tokenizer.cpu()


class TimeBudget:
    """Limits pictures to a share of a run's time. Rank 0's clock decides for all ranks."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.began = time.monotonic()
        self.spent = 0.0
        self.cost: dict[str, float] = {}
        self.announced: set[str] = set()

    def allows(self, kind: str, step: int, device: torch.device) -> bool:
        """True if there is time for one more picture of a kind. The first is always allowed."""
        cost = self.cost.get(kind, 0.0)
        elapsed = time.monotonic() - self.began + cost
        excess = self.spent + cost - self.share * elapsed
        allowed = torch.tensor(kind not in self.cost or excess <= 0, device=device)
        dist.broadcast(allowed, 0)
        if not allowed and kind not in self.announced:
            self.announced.add(kind)
            console.say(
                f"step {step}: {kind} are skipped for {console.duration(excess / self.share)}, "
                f"to stay within {self.share:.0%} of the time (preview_share)"
            )
        return bool(allowed)

    @contextmanager
    def timed(self, kind: str, step: int) -> Iterator[None]:
        """Add the time that the block takes to the budget, and report it."""
        began = time.monotonic()
        if kind not in self.cost:
            console.say(f"step {step}: making {kind}")
        try:
            yield
        finally:
            now = time.monotonic()
            self.spent += now - began
            self.cost[kind] = now - began
        share = f"; pictures took {self.spent / (now - self.began):.1%} of the time" if step else ""
        console.say(f"step {step}: {kind} in {now - began:.1f} s{share}")


def _due(step: int, every: int, last: int) -> bool:
    """True if pictures are due at a step: every `every` steps and at the last; 0 is never."""
    return every > 0 and (step % every == 0 or step == last)


@contextmanager
def _spared(missing: list[str]) -> Iterator[None]:
    """Catch a lack of memory or of the tokenizer in the block, and add its message to `missing`."""
    try:
        yield
    except _Skipped as skipped:
        missing.append(str(skipped))
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        missing.append(str(error).partition("\n")[0] or "memory ran out")


def _failure_of_any(missing: list[str], device: torch.device) -> str:
    """Return why any rank failed, or "" if none did; every rank must call this."""
    if missing and device.type == "cuda":
        torch.cuda.empty_cache()
    rank = torch.tensor(dist.get_rank() + 1 if missing else 0, device=device)
    dist.all_reduce(rank, dist.ReduceOp.MAX)
    if not rank:
        return ""
    return missing[0] if missing else f"they do not fit the memory of rank {int(rank) - 1}"


def _require(missing: list[str], device: torch.device) -> None:
    """Leave the picture out on all ranks if it failed on any rank; every rank must call this.

    Raises:
        _Skipped: any rank's `missing` is not empty.
    """
    if why := _failure_of_any(missing, device):
        raise _Skipped(why)


def _split_over_ranks(work: Callable[[int], Tensor], count: int, group_size: int) -> list[Tensor]:
    """Return work(0) to work(count - 1) on all ranks, split over sequence-parallel groups."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results: list[Tensor] = []
    for first in range(0, count, world // group_size):
        own = work(min(first + rank // group_size, count - 1))
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own.contiguous())
        results += parts[::group_size]
    return results[:count]
