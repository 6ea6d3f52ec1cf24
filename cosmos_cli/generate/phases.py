"""Turn jobs into videos, phase by phase.

The networks are loaded one after another, each once for all jobs, or all are kept in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from cosmos_cli import console
from cosmos_cli.errors import UserError, asset_error
from cosmos_cli.generate import inputs, memory, outputs, precision, rollout
from cosmos_cli.generate.guards import guardrail
from cosmos_cli.generate.jobs import Job, Result, Weights
from cosmos_cli.generate.memory import Shared
from cosmos_cli.generate.text_models import Conditioning, TextModels, negative_prompt
from cosmos_cli.generate.video_models import Pair, VideoModels
from cosmos_cli.model import rgb
from cosmos_cli.recipe.keys import Recipe

T = TypeVar("T")


def generate(
    jobs: list[Job], device: str, pair: Pair | None = None, shared: Shared | None = None
) -> Iterator[Result]:
    """Generate the jobs; yield each result, in order, when its files are written or it has failed.

    All jobs must share a model and its sizes. Jobs with the same weights and precision must be
    adjacent. `shared` is where all processes of a command keep the weights that they stream.
    """
    r = jobs[0].r
    in_turn = r.memory != "together"
    # Refuse before anything is loaded. With --compare exact, jobs differ in precision.
    for own in {job.r.sampling_precision: job.r for job in jobs}.values():
        if in_turn:
            count = memory.streamed_blocks(own, device)
            memory.require_cpu_memory(own, count, device, shared)
        precision.fp8_parts(own)
    _say_networks(r, in_turn)
    pipeline = Pipeline(r, device, pair, shared, in_turn=in_turn)
    for part in [jobs] if in_turn else [[job] for job in jobs]:
        yield from pipeline.run(part)


def one_by_one(r: Recipe, weights: Weights, device: str) -> Callable[[Job], Result]:
    """Return a function that generates one job.

    `memory: auto` keeps all networks in memory on a CPU, and on a GPU if they fit. A batch loads
    each network once either way.
    """
    precision.fp8_parts(r)
    together = r.memory in ("auto", "together")
    if r.memory == "auto" and device != "cpu":
        needed, (free, _) = memory.bytes_together(r), torch.cuda.mem_get_info()
        sizes = f"{console.size(needed)} of GPU memory, {console.size(free)} are free"
        console.say(f"all networks need {sizes}")
        together = needed < free
    if not together:
        return lambda job: next(generate([job], device))
    _say_networks(r, in_turn=False)
    pipeline = Pipeline(r, device, in_turn=False)
    pipeline.load(r, weights)
    return lambda job: next(pipeline.run([job]))


def _say_networks(r: Recipe, in_turn: bool) -> None:
    guarded = guardrail.has_all(r)
    names = [
        *(["prompt upsampler"] if r.upsampler != "off" else []),
        *(["Aegis"] if guarded else []),
        "text encoder",
        "denoiser and decoder" + (", frame filter and face blur" if guarded else ""),
    ]
    how = f"one at a time: {'; '.join(names)}" if in_turn else f"all in memory: {', '.join(names)}"
    console.say(f"networks, {how}")


def _in_fp8(parts: tuple[str, ...], device: str) -> str:
    emulated = ", emulated on this CPU" if device == "cpu" else ""
    return f"; in fp8: {' and '.join(parts)}{emulated}" if parts else ""


@contextmanager
def phase(name: str, device: str) -> Iterator[None]:
    """Report how long the enclosed code took, and its peak GPU memory."""
    began = time.monotonic()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    used = "" if device == "cpu" else f", peak {console.size(torch.cuda.max_memory_allocated())}"
    console.say(f"{name}: {console.duration(time.monotonic() - began)}{used}")


def each(
    jobs: Iterable[Job], step: Callable[[Job], T], failed: dict[Job, UserError]
) -> dict[Job, T]:
    """Run a step of each job and return what it made; a job that fails is added to `failed`.

    The other jobs continue. Load networks outside of `step`: a network that cannot be loaded must
    stop all jobs.
    """
    made = {}
    for job in jobs:
        try:
            made[job] = step(job)
        except UserError as error:
            failed[job] = error
    return made


class Pipeline:
    """Turn jobs into videos with networks that are in memory in turn or together.

    Args:
        r: the recipe, whose model and sizes all jobs share.
        device: cpu or cuda.
        pair: this rank's part in a video that several ranks share.
        shared: where several processes keep the weights that they stream.
        in_turn: free each network before the next is loaded.
    """

    def __init__(
        self,
        r: Recipe,
        device: str,
        pair: Pair | None = None,
        shared: Shared | None = None,
        *,
        in_turn: bool,
    ) -> None:
        self.r = r
        self.device = device
        self.pair = pair
        self.shared = shared
        self.in_turn = in_turn
        self.texts = TextModels(r, device)
        self.videos: VideoModels | None = None

    def run(self, jobs: list[Job]) -> Iterator[Result]:
        """Yield the result of each job, in order, when its files are written or it has failed.

        Raises:
            UserError: a network cannot be loaded.
        """
        prepared, failed = self.prepare(jobs)
        for job in jobs:
            if job in prepared:
                self.load(job.r, job.weights)
                each([job], lambda job: self._make(job, prepared[job]), failed)
            yield Result(job.prompt, job, failed.get(job), made=job not in failed)

    def prepare(self, jobs: list[Job]) -> tuple[dict[Job, Conditioning], dict[Job, UserError]]:
        """Return the conditioning of each job, and the error of each job that has none.

        Each model runs once per distinct text.
        """
        texts, failed = self.texts, dict[Job, UserError]()
        words = each(jobs, lambda job: texts.require_allowed(job.prompt), failed)
        if self.r.upsampler != "off":
            with phase("prompt upsampler", self.device):
                longer = {short: texts.upsample(short) for short in dict.fromkeys(words.values())}
            words = each(words, lambda job: texts.require_allowed(longer[words[job]]), failed)
            self._free("upsampler")
        if guardrail.has_all(self.r):
            with phase("Aegis", self.device):
                wanted = dict.fromkeys(one for job in words for one in (job.prompt, words[job]))
                reasons = {one: texts.aegis.reason(one) for one in wanted}
            words = each(
                words, lambda job: texts.require_safe(job.prompt, words[job], reasons), failed
            )
            self._free("aegis")
        with phase("text encoder", self.device):
            uncond = {job: negative_prompt(job.r) for job in words}
            wanted = dict.fromkeys(one for job in words for one in (words[job], uncond[job]))
            embeddings = {one: texts.embed(one) for one in wanted}
        prepared = each(
            words, lambda job: texts.conditioning(words[job], uncond[job], embeddings), failed
        )
        self._free("encoder")
        return prepared, failed

    def load(self, r: Recipe, weights: Weights) -> None:
        """Load the denoiser and the decoder, unless they are in memory in this precision."""
        if self.videos and self.videos.holds(r, weights):
            return
        # Free the memory of other weights first.
        self.videos = None
        with phase("loading denoiser and decoder", self.device):
            self.videos = VideoModels(r, weights, self.device, self.pair, self.shared)
        console.say(f"attention: {self.videos.attention}{_in_fp8(self.videos.fp8, self.device)}")

    def _free(self, model: str) -> None:
        if self.in_turn:
            self.texts.free(model)

    @torch.inference_mode()
    def _make(self, job: Job, text_emb: Conditioning) -> None:
        """Generate the video of a job and write its files.

        Raises:
            UserError: the input cannot be used, the video is not finite or blocked, or it cannot
                be written.
        """
        began = time.monotonic()
        given = self.read_input(job) if job.given else None
        if job.segments > 1:
            rollout.make(self, job, text_emb, given)
            return
        made = self.segment(job, text_emb, given)
        if made is None:
            return
        pixels, about = made
        about["blurred_faces"] = self.blur(pixels)
        about |= outputs.provenance(job, text_emb.prompt)
        about["seconds"] = round(time.monotonic() - began, 2)
        save = partial(outputs.write_video, job, pixels)
        outputs.write_outputs(job, text_emb.prompt, save, rgb.contact_sheet(pixels), about)

    def read_input(self, job: Job) -> Tensor:
        """Return the frames that a job continues, uint8 CTHW.

        Raises:
            UserError: the file cannot be used, or the frame filter blocks it.
        """
        assert job.given and self.videos
        pixels = inputs.read_given(job.given, job.r)
        frame_filter = self.videos.frame_filter
        if frame_filter and (reason := frame_filter.reason(pixels)):
            reason = f"in the input {job.given.path.name}, {reason}"
            raise guardrail.blocked("frame filter", reason, job.prompt)
        return pixels

    def segment(
        self, job: Job, text_emb: Conditioning, given: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """Return the pixels of a video, uint8 CTHW, and facts of how it was made.

        Return None on a rank that does not write the video. `given` are the frames that it
        continues.

        Raises:
            UserError: the video is not finite or blocked.
        """
        videos, name = self.videos, job.path.stem
        if given is not None:
            text_emb = replace(text_emb, frames=videos.encode(given))
        with phase(f"{name}: denoiser", self.device):
            x0, compiled = videos.sample(job, text_emb)
        if self.pair and not self.pair.writes:
            return None
        if not x0.isfinite().all():
            raise not_finite_video("denoiser's latent", job)
        with phase(f"{name}: decoder", self.device):
            pixels = videos.decode(x0)
        if pixels is None:
            raise not_finite_video("decoded video", job)
        if videos.frame_filter and (reason := videos.frame_filter.reason(pixels)):
            raise guardrail.blocked("frame filter", reason, job.prompt)
        return pixels, {
            "attention": videos.attention,
            "fp8": videos.fp8,
            "compiled": compiled,
            "streamed_blocks": videos.streamed,
        }

    def blur(self, pixels: Tensor) -> int | None:
        """Pixelate the faces of a video in place; return their number, None without this guard."""
        face_blur = self.videos.face_blur
        return face_blur.blur(pixels) if face_blur else None


def not_finite_video(what: str, job: Job) -> UserError:
    """Return the error of a video whose values overflowed although all weights are finite.

    Its code is ASSET: the weights, or a LoRA's strength, are too large for this prompt.
    """
    what = f"the {what} is not finite (NaN or infinity), so no video was written"
    fix = "use another checkpoint, or lower the strength of a LoRA: `--lora FILE:0.8`"
    return asset_error(job.path.stem, what, fix)
