"""Write two videos of one prompt and seed side by side: a labelled mp4 and an HTML page."""

from __future__ import annotations

import os
from functools import partial

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cosmos_cli import files, html
from cosmos_cli.generate import outputs
from cosmos_cli.generate.jobs import Job
from cosmos_cli.model import rgb, video

LABEL_SHARE = 0.08


def compare(base: Job, tuned: Job, joined: Job) -> None:
    """Write the mp4, its sidecar and contact sheet, and a page with all three videos.

    Raises:
        UserError: a file cannot be written.
    """
    sides = {"base": base, "post-trained": tuned}
    labelled = [
        torch.cat([_label(name, job), video.read_frames(job.path, range(job.r.num_frames))], dim=2)
        for name, job in sides.items()
    ]
    pixels = torch.cat(labelled, dim=3)
    about = {
        "prompt": joined.prompt,
        "seed": joined.r.sampling_seed,
        "key": joined.key,
        "compared": {name: files.read_json(job.files[0]) for name, job in sides.items()},
    }
    files.write_text(joined.path.with_suffix(".html"), _page(sides, joined))
    sheet = rgb.contact_sheet(pixels, columns=2, rows=4, width=640)
    save = partial(outputs.write_video, joined, pixels)
    outputs.write_outputs(joined, joined.prompt, save, sheet, about)


def _page(sides: dict[str, Job], joined: Job) -> str:
    folder = joined.path.parent
    facts = [
        (
            name,
            html.link(os.path.relpath(job.path, folder), job.path.name),
            " + ".join(str(used.path) for used in (job.weights, *job.weights.loras)),
            job.weights.identity,
        )
        for name, job in sides.items()
    ]
    r = joined.r
    note = (
        f"Seed {r.sampling_seed}, {r.num_steps} steps, guidance {r.guidance:g}, {r.num_frames} "
        f"frames of {r.width}x{r.height} at {r.fps:g} fps. Only the weights differ."
    )
    return html.page(
        joined.prompt,
        [
            ("Side by side", html.row(*(html.media(j.path, n) for n, j in sides.items()))),
            ("Files", html.table(facts, ("", "video", "weights", "sha256 of the weights"))),
        ],
        note,
    )


def _label(name: str, job: Job) -> Tensor:
    """Return a strip that names the model, to put above each frame, uint8 CTHW."""
    r = job.r
    height = max(16, round(r.height * LABEL_SHARE / 2) * 2)
    strip = Image.new("RGB", (r.width, height), "black")
    text = f"{name} {job.weights.identity[:8]}"
    ImageDraw.Draw(strip).text(
        (height // 4, height // 2), text, "white", ImageFont.load_default(height * 0.6), "lm"
    )
    pixels = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8)
    return (
        pixels.view(height, r.width, 3).permute(2, 0, 1)[:, None].expand(-1, r.num_frames, -1, -1)
    )
