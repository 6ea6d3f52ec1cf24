"""Write two videos of one prompt and seed side by side: a labelled mp4 and an HTML page."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cosmos_cli import files, html
from cosmos_cli.generate import outputs
from cosmos_cli.generate.jobs import Job
from cosmos_cli.gpus import best_device
from cosmos_cli.model import rgb, video
from cosmos_cli.model.device import default_dtype
from cosmos_cli.model.tokenizer import load_tokenizer
from cosmos_cli.recipe.keys import Recipe

LABEL_SHARE = 0.08


def write_comparison(sides: dict[str, Job], joined: Job) -> None:
    """Write the mp4, its sidecar and contact sheet, and a page with all three videos.

    `sides` maps the name of each side to its finished job. The files of `joined` are written. If
    one side is the exact video, also measure how far the other is from it.

    Raises:
        UserError: a file cannot be written.
    """
    videos = {
        name: video.read_frames(job.path, range(job.r.num_frames)) for name, job in sides.items()
    }
    labels = {
        name: f"{job.r.passes} passes" if "exact" in sides else job.weights.identity[:8]
        for name, job in sides.items()
    }
    labelled = [
        torch.cat([_label(f"{name} {labels[name]}", job.r), videos[name]], dim=2)
        for name, job in sides.items()
    ]
    pixels = torch.cat(labelled, dim=3)
    about = {
        "prompt": joined.prompt,
        "seed": joined.r.sampling_seed,
        "key": joined.key,
        "compared": {name: files.read_json(job.files[0]) for name, job in sides.items()},
    }
    if "exact" in sides:
        about["difference"] = difference(joined, *videos.values())
    files.write_text(joined.path.with_suffix(".html"), _page(sides, joined, about))
    sheet = rgb.contact_sheet(pixels, columns=2, rows=4, width=640)
    save = partial(outputs.write_video, joined, pixels)
    outputs.write_outputs(joined, joined.prompt, save, sheet, about)


@torch.inference_mode()
def difference(job: Job, exact: Tensor, other: Tensor) -> dict[str, float]:
    """Return the PSNR in dB, SSIM and latent distance between two videos, uint8 CTHW.

    The latent distance is |a - b| / |b| of the latents that the tokenizer makes of the videos,
    where b is the exact one.
    """
    device = best_device()
    dtype = default_dtype(device)
    tokenizer = load_tokenizer(job.r.model_files.tokenizer, job.r.spec, device, dtype)
    a, b = (
        tokenizer.encode(rgb.to_model(pixels)[None].to(device, dtype)).float()
        for pixels in (other, exact)
    )
    return {
        "psnr_db": round(rgb.psnr(other, exact), 2),
        "ssim": round(rgb.ssim(other, exact), 4),
        "latent_distance": round(((a - b).norm() / b.norm()).item(), 4),
    }


def in_words(found: dict[str, float]) -> str:
    """Return what `difference` found as text."""
    return (
        f"PSNR {found['psnr_db']:.1f} dB, SSIM {found['ssim']:.3f}, latent distance "
        f"{found['latent_distance']:.3f}"
    )


def _page(sides: dict[str, Job], joined: Job, about: dict[str, Any]) -> str:
    folder = joined.path.parent
    facts = [
        (
            name,
            html.link(os.path.relpath(job.path, folder), job.path.name),
            f"{job.r.passes} passes",
            " + ".join(str(used.path) for used in (job.weights, *job.weights.loras)),
            job.weights.identity,
        )
        for name, job in sides.items()
    ]
    r, differ = joined.r, "Only the weights differ."
    sections = [("Side by side", html.row(*(html.media(j.path, n) for n, j in sides.items())))]
    if "difference" in about:
        differ = "Only the sampling differs."
        sections.append(("Difference from the exact video", html.text(
            f"{in_words(about['difference'])}. PSNR is 99 and SSIM is 1 for equal videos. The "
            "latent distance is relative, between the tokenizer's latents of both videos. A "
            "video can be as good as the exact one and still show another scene."
        )))  # fmt: skip
    head = ("", "video", "denoiser", "weights", "sha256 of the weights")
    sections.append(("Files", html.table(facts, head)))
    note = (
        f"Seed {r.sampling_seed}, guidance {r.guidance:g}, {r.num_frames} "
        f"frames of {r.width}x{r.height} at {r.fps:g} fps. {differ}"
    )
    return html.page(joined.prompt, sections, note)


def _label(text: str, r: Recipe) -> Tensor:
    """Return a strip with a text, to put above each frame, uint8 CTHW."""
    height = max(16, round(r.height * LABEL_SHARE / 2) * 2)
    strip = Image.new("RGB", (r.width, height), "black")
    ImageDraw.Draw(strip).text(
        (height // 4, height // 2), text, "white", ImageFont.load_default(height * 0.6), "lm"
    )
    pixels = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
    return (
        pixels.view(height, r.width, 3).permute(2, 0, 1)[:, None].expand(-1, r.num_frames, -1, -1)
    )
