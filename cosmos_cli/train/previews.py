"""Pictures of what the model under training makes, within a small share of the run's time.

A preview is cheap: what one step of the denoiser makes of a few noised clips. Samples are whole
videos of the same clips' captions by generate's own solver, steered away from no text, since the
text encoder takes no part in training; how near they are to training clips is measured.

The network is that inside the DeepSpeed engine. ZeRO-3 gathers its weights in every forward pass,
so all ranks make as many: those without work of their own repeat the last.
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
from cosmos_cli.model import edm, sampler, video
from cosmos_cli.model.device import gpu_memory_errors, has_room, is_out_of_memory
from cosmos_cli.model.tokenizer import Tokenizer
from cosmos_cli.paths import Dataset, Run
from cosmos_cli.prep import latent_files
from cosmos_cli.recipe import plan
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.spec import PREVIEW_SIGMAS
from cosmos_cli.train import nearest
from cosmos_cli.train.data import Clips
from cosmos_cli.train.heldout import HeldOut

# A preview shows the last frame that so many frames of the latent decode to.
LATENT_FRAMES = 2
CELL_PIXELS = 200
SHEET_COLUMNS = 4
# The key that turns each kind off.
OFF = {"previews": "preview_every_steps", "samples": "sample_every_saves"}


class _Stopping(Exception):
    """The run is to end, in all ranks alike."""


class _Skipped(Exception):
    """A picture is left out, in all ranks alike; why."""


class Pictures:
    """Writes previews and samples into the folder of a run; every rank must call it alike.

    A picture that does not fit the memory of any one rank is left out by all, with one warning,
    and the training continues. Where a forward pass exchanges weights or tokens between ranks, one
    that fails on a single rank would leave the others waiting; so all ranks first agree that each
    has room for it.
    """

    def __init__(
        self, r: Recipe, run: Run, clips: Clips, shown: Clips, stopping: Callable[[], bool]
    ) -> None:
        """Of some of the clips `shown`; samples are compared with `clips`, those trained on.

        `stopping` says in all ranks alike whether the run is to end, which waits for no sample.
        """
        self.r, self.run, self.clips, self.stopping = r, run, clips, stopping
        self.shown = HeldOut(shown, r.preview_clips, PREVIEW_SIGMAS)
        self.allowance = Allowance(r.preview_share)
        self.warned: set[str] = set()

    def make(self, engine: Any, step: int, asked: bool) -> dict[str, float]:
        """Makes what is due after a step, or asked for; the figures of the samples, if any."""
        r, figures = self.r, {}
        previews = _due(step, r.preview_every_steps, r.max_steps)
        samples = _due(step, r.sample_every_saves * r.save_every_steps, r.max_steps)
        # A run that goes on may have made those of its first step already.
        previews = previews and not self.run.preview(step).exists()
        samples = samples and not self.run.sample(step, 0).with_suffix(".jpg").exists()
        if previews and self.allowance.grants("previews", step, engine.device):
            self._attempt("previews", engine, step, self._preview)
        if asked or (samples and self.allowance.grants("samples", step, engine.device)):
            figures = self._attempt("samples", engine, step, self._sample)
        return figures

    def _attempt(
        self, kind: str, engine: Any, step: int, work: Callable[[Any, int], dict[str, float]]
    ) -> dict[str, float]:
        """Make what is due, or leave it out with a warning, the first time for each kind."""
        with gpu_memory_errors(f"set {OFF[kind]}: 0, which makes no {kind}"):
            try:
                with self.allowance.spending(kind, step):
                    return work(engine, step)
            except _Skipped as skipped:
                self._warn(kind, engine, step, skipped)
                return {}
            finally:
                if engine.device.type == "cuda":
                    # The next step finds the memory that it had.
                    torch.cuda.empty_cache()

    def _warn(self, kind: str, engine: Any, step: int, why: object) -> None:
        if kind in self.warned:
            return
        self.warned.add(kind)
        room = ", --set offload=optimizer leaves more room" if engine.device.type == "cuda" else ""
        console.warn(
            f"step {step}: {kind} are left out, and so are later ones that fail alike: {why}; "
            f"training continues, --set {OFF[kind]}=0 makes none{room}"
        )

    def _require_room(self, engine: Any) -> None:
        """Leave the picture out unless a forward pass fits every rank; every rank must call it."""
        needed = plan.forward_bytes(self.r, dist.get_world_size())
        fits = has_room(engine.device, needed)
        why = f"a forward pass needs {console.size(needed)} of GPU memory"
        _require([] if fits else [why], engine.device)

    def _denoise(self, net: Any, missing: list[str], *inputs: Tensor) -> Tensor:
        """Return the denoiser's estimate; xt instead once memory is missing on this rank.

        A rank that failed so still comes to every operation that the others wait in. Within a
        forward pass there are none below ZeRO-3, and only there a failure can be survived.
        """
        if self.r.zero_stage == 3 or net.sequence.size > 1:
            return edm.denoise(net, *inputs, self.r.spec.sigma_data)
        if not missing:
            with _spared(missing):
                return edm.denoise(net, *inputs, self.r.spec.sigma_data)
        return inputs[0]

    @torch.no_grad()
    def _preview(self, engine: Any, step: int) -> dict[str, float]:
        """Writes a row for each clip: a frame of it, and of the estimates at each noise level."""
        self._require_room(engine)
        net, device = engine.module.net, engine.device
        dtype, missing = next(net.parameters()).dtype, list[str]()

        def estimate(i: int) -> Tensor:
            x0, sigma_B, noise, text_emb, fps_B = self.shown.batch(i).to(device)
            xt = x0 + sigma_B.view(-1, 1, 1, 1, 1) * noise
            denoised = self._denoise(net, missing, xt, sigma_B, text_emb.to(dtype), fps_B)
            return denoised[:, :, :LATENT_FRAMES]

        estimates = _by_all_ranks(estimate, len(self.shown.samples), net.sequence.size)
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
                video.contact_sheet(frames, *size).save(temporary, quality=90)

    @torch.no_grad()
    def _sample(self, engine: Any, step: int) -> dict[str, float]:
        """Writes a video of each clip's caption; their distance to the nearest training clips."""
        net, device, chosen = engine.module.net, engine.device, self.shown.chosen
        missing: list[str] = []
        self._require_room(engine)
        try:
            x0 = _by_all_ranks(
                lambda i: self._draw(net, device, i, missing), len(chosen), net.sequence.size
            )
        except _Stopping:
            console.say(f"step {step}: no samples, the run is stopping")
            return {}
        _require(missing, device)
        rank, world = dist.get_rank(), dist.get_world_size()
        with _spared(missing), self._decoder(device) as decode:
            for i in range(rank, len(chosen), world):
                self._write_sample(self.run.sample(step, i), decode(x0[i]))
        if why := _of_any(missing, device):
            self._warn("samples", engine, step, why)
            missing.clear()
        if rank == 0:
            files.write_json(self.run.sample_prompts, [self._caption(clip) for clip in chosen])
        if len(self.clips) < 2:
            return {}
        latents = [latent[0].cpu() for latent in x0]
        with _spared(missing):
            least = torch.cat(nearest.distances(latents, self.clips, rank, world)).to(device)
        _require(missing, device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        made, apart = least[: len(latents)].min().item(), least[len(latents) :].median().item()
        console.say(
            f"step {step}: the nearest training clip of a sample is {made:.3f} away; "
            f"such clips are {apart:.3f} apart"
        )
        return {"nearest_clip": made, "clips_apart": apart}

    def _draw(self, net: Any, device: torch.device, i: int, missing: list[str]) -> Tensor:
        """The latent of one sample, (1, C, T, H, W)."""
        r = self.r
        fps_B = torch.tensor([r.fps], device=device)
        cond = self.shown.clips.read(self.shown.chosen[i])[1][None]
        cond = cond.to(device, next(net.parameters()).dtype)

        def towards(xt: Tensor, sigma: float, text_emb: Tensor) -> Tensor:
            sigma_B = torch.full((1,), sigma, device=device)
            return self._denoise(net, missing, xt, sigma_B, text_emb, fps_B)

        def denoiser(xt: Tensor, sigma: float) -> Tensor:
            estimate = towards(xt, sigma, cond)
            if r.guidance == 0:
                return estimate
            return sampler.guided(estimate, towards(xt, sigma, torch.zeros_like(cond)), r.guidance)

        def look_up(_step: int) -> None:
            if self.stopping():
                raise _Stopping

        shape = (1, *r.spec.latent_shape(r.num_frames, r.height, r.width))
        noise = sampler.start_noise(r.sampling_seed + i, shape).to(device)
        sigmas = r.spec.sigma_min, r.spec.sigma_max
        return sampler.solve(r.sampler, r.num_steps, sigmas, denoiser, noise, look_up)

    def _write_sample(self, path: Path, pixels: Tensor) -> None:
        with files.atomic_file(path) as temporary:
            video.write_mp4(temporary, pixels, self.r.fps, self.r.video_crf)
        with files.atomic_file(path.with_suffix(".jpg")) as temporary:
            sheet = video.contact_sheet(pixels, SHEET_COLUMNS, 1, CELL_PIXELS)
            sheet.save(temporary, quality=90)

    def _caption(self, clip: int) -> str:
        metas = Dataset.at(self.r.dataset_dir, self.r.videos_dir).metas
        name = Path(self.shown.clips.clips[clip]["text"]).stem
        try:
            return files.read_text(metas / f"{name}.txt", files.CAPTION).strip()
        except UserError:
            return "(its caption is gone)"

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        try:
            return latent_files.load_tokenizer(self.r, "cpu", dtype)
        except UserError as error:
            # It was there when the run began.
            raise _Skipped(str(error)) from error

    @contextmanager
    def _decoder(self, device: torch.device) -> Iterator[Callable[[Tensor], Tensor]]:
        """Decodes a latent (1, C, T, H, W) to pixels, uint8 CTHW on the CPU."""
        tokenizer = self._tokenizer
        dtype = next(tokenizer.parameters()).dtype
        try:
            tokenizer.to(device)
            yield lambda x0: video.to_uint8(tokenizer.decode(x0.to(device, dtype))[0]).cpu()
        finally:
            tokenizer.cpu()


class Allowance:
    """Keeps pictures to a share of a run's time. Rank 0's clock decides for all ranks."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.began = time.monotonic()
        self.spent = 0.0
        self.cost: dict[str, float] = {}
        self.told: set[str] = set()

    def grants(self, kind: str, step: int, device: torch.device) -> bool:
        """Whether there is time for one more of a kind; always for the first."""
        cost = self.cost.get(kind, 0.0)
        with_it = time.monotonic() - self.began + cost
        missing = self.spent + cost - self.share * with_it
        granted = torch.tensor(kind not in self.cost or missing <= 0, device=device)
        dist.broadcast(granted, 0)
        if not granted and kind not in self.told:
            self.told.add(kind)
            console.say(
                f"step {step}: {kind} wait until they take {self.share:.0%} of the time at most, "
                f"{console.duration(missing / self.share)} from now (preview_share)"
            )
        return bool(granted)

    @contextmanager
    def spending(self, kind: str, step: int) -> Iterator[None]:
        """Counts the time of what is made meanwhile, and says it."""
        began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            self.spent += now - began
            self.cost[kind] = now - began
        share = f"; pictures took {self.spent / (now - self.began):.1%} of the time" if step else ""
        console.say(f"step {step}: {kind} in {now - began:.1f} s{share}")


def _due(step: int, every: int, last: int) -> bool:
    """Whether a step is one of those with pictures: every so many, 0 for none, and the last."""
    return every > 0 and (step % every == 0 or step == last)


@contextmanager
def _spared(missing: list[str]) -> Iterator[None]:
    """Add to `missing` what ended the block for want of memory or of the tokenizer, and go on."""
    try:
        yield
    except _Skipped as skipped:
        missing.append(str(skipped))
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        missing.append(str(error).partition("\n")[0] or "memory ran out")


def _of_any(missing: list[str], device: torch.device) -> str:
    """Return what any rank is missing, "" for nothing; every rank must call it."""
    if missing and device.type == "cuda":
        torch.cuda.empty_cache()
    rank = torch.tensor(dist.get_rank() + 1 if missing else 0, device=device)
    dist.all_reduce(rank, dist.ReduceOp.MAX)
    if not rank:
        return ""
    return missing[0] if missing else f"they do not fit the memory of rank {int(rank) - 1}"


def _require(missing: list[str], device: torch.device) -> None:
    """Leave the picture out in all ranks if any rank is missing something; every rank must call it.

    Raises:
        _Skipped: why.
    """
    if why := _of_any(missing, device):
        raise _Skipped(why)


def _by_all_ranks(work: Callable[[int], Tensor], count: int, team: int) -> list[Tensor]:
    """work(0) to work(count - 1), each by `team` ranks that share a clip; in all ranks the same."""
    rank, world = dist.get_rank(), dist.get_world_size()
    results: list[Tensor] = []
    for first in range(0, count, world // team):
        own = work(min(first + rank // team, count - 1))
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own.contiguous())
        results += parts[::team]
    return results[:count]
