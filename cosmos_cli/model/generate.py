"""Prompt -> video: text encoder, denoiser and decoder in turn, each loaded once for all prompts."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_cli import __version__, console, layout
from cosmos_cli.keys import Recipe
from cosmos_cli.model import edm, prep, sampler, text, video, weights
from cosmos_cli.model.dit import DiT


@dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    seed: int
    path: Path


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of a job, each (M, D): of its prompt and of what to steer away from."""

    cond: Tensor
    uncond: Tensor


def generate(r: Recipe, base: Path, jobs: list[Job], device: str) -> Iterator[Job]:
    """Writes the mp4, sidecar and contact sheet of each job; yields it when all three are there.

    Args:
        r: the recipe, its sampling keys and sizes.
        base: the denoiser's weights.
        jobs: what to make.
        device: cpu or cuda.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.inference_mode():
        started = time.monotonic()
        conditionings = _encode_prompts(r, jobs, device, dtype)
        net = load_denoiser(r, base, device, dtype)
        tokenizer = prep.load_tokenizer(r, device, dtype)
        about = _provenance(r, base)
        console.say(f"models loaded in {console.duration(time.monotonic() - started)}")
        for number, job in enumerate(jobs):
            began = time.monotonic()
            x0 = sample(r, net, conditionings[job.prompt], job.seed, f"video {number + 1}")
            pixels = video.to_uint8(tokenizer.decode(x0.to(dtype))[0]).cpu()
            _write(r, job, pixels, {**about, "seconds": round(time.monotonic() - began, 2)})
            yield job


def load_denoiser(r: Recipe, base: Path, device: str, dtype: torch.dtype) -> DiT:
    """The denoiser with the weights of a model file, on `device` in `dtype`."""
    with torch.device("meta"):
        net = DiT(r.spec.dit)
    state = weights.load_dit_state(base)
    state = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    net = net.to(dtype).to_empty(device=device)
    weights.load_strict(net, state, base)
    return net.eval()


def sample(r: Recipe, net: DiT, text_emb: Conditioning, seed: int, label: str) -> Tensor:
    """The denoised latent x0 (1, C, T, H, W), fp32, of one video."""
    spec = r.spec
    device = next(net.parameters()).device
    fps_B = torch.tensor([r.fps], device=device)
    cond, uncond = text_emb.cond[None].to(device), text_emb.uncond[None].to(device)

    def denoiser(xt: Tensor, sigma: float) -> Tensor:
        sigma_B = torch.tensor([sigma], device=device)
        towards = edm.denoise(net, xt, sigma_B, cond, fps_B, spec.sigma_data)
        if r.guidance == 0:
            return towards
        away = edm.denoise(net, xt, sigma_B, uncond, fps_B, spec.sigma_data)
        return sampler.guided(towards, away, r.guidance)

    noise = sampler.start_noise(seed, (1, *spec.latent_shape(r.num_frames, r.height, r.width)))
    if r.sampler == "euler":
        solve, sigmas = (
            sampler.euler,
            sampler.euler_sigmas(r.num_steps, spec.sigma_min, spec.sigma_max),
        )
        evaluations = r.num_steps
    else:
        solve, sigmas = sampler.res, sampler.res_sigmas(r.num_steps, spec.sigma_max)
        evaluations = r.num_steps + 1
    with console.progress(label, evaluations, "steps") as bar:
        return solve(denoiser, noise.to(device), sigmas, lambda _: bar.advance())


def negative_prompt(r: Recipe) -> str:
    """The text to steer away from: the recipe's, else the released model's default, else none."""
    if r.negative_prompt is not None:
        return r.negative_prompt
    if r.spec.embedded:
        return ""
    path = Path(__file__).with_name("negative_prompt.txt")
    # The default of nvidia-cosmos/cosmos-predict1 (Apache-2.0), `inference_utils.py`.
    return path.read_text(encoding="utf-8").strip()


def _encode_prompts(
    r: Recipe, jobs: list[Job], device: str, dtype: torch.dtype
) -> dict[str, Conditioning]:
    """The conditioning of each distinct prompt; the encoder is gone from memory afterwards."""
    away = negative_prompt(r)
    prompts = list(dict.fromkeys(job.prompt for job in jobs))
    folder = layout.model_files(r.spec, r.checkpoints_dir).text_encoder
    encoder = text.TextEncoder(folder, r.spec.text, device, dtype)
    # One at a time, as the reference does: padding to a longer neighbour would move the last bits,
    # and a video must not depend on the batch it was made in.
    embedded = {p: text.pad(encoder.encode([p])[0].float(), r.spec.text) for p in prompts}
    none = torch.zeros(r.spec.text.tokens, r.spec.text.channels)
    uncond = text.pad(encoder.encode([away])[0].float(), r.spec.text) if away else none
    del encoder
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
    return {prompt: Conditioning(embedded[prompt], uncond) for prompt in prompts}


def _provenance(r: Recipe, base: Path) -> dict[str, Any]:
    return {
        "model": r.model,
        "weights": {"path": str(base), "sha256": layout.sha256_path(base)},
        "negative_prompt": negative_prompt(r),
        "recipe": json.loads(r.model_dump_json()),
        "versions": {
            "cosmos": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def _write(r: Recipe, job: Job, pixels: Tensor, about: dict[str, Any]) -> None:
    """The mp4 comes last: where it is, its sidecar, prompt and sheet are."""
    with layout.atomic_file(job.path.with_suffix(".jpg")) as temporary:
        video.contact_sheet(pixels).save(temporary, quality=90)
    layout.write_text(job.path.with_suffix(".txt"), job.prompt + "\n")
    with layout.atomic_file(job.path) as temporary:
        video.write_mp4(temporary, pixels, r.fps, r.video_crf)
        digest = layout.sha256_file(temporary)
        sidecar = {"prompt": job.prompt, "seed": job.seed, "mp4_sha256": digest, **about}
        layout.write_json(job.path.with_suffix(".json"), sidecar)


def file_stem(prompt: str, seed: int) -> str:
    """A readable file name that differs between prompts that begin alike."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-")
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:6]
    return "-".join(filter(None, [slug, mark, f"seed{seed}"]))
