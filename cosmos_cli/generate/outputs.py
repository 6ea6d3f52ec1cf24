"""Write the files of a finished job: the video, its sidecar, its prompt and a contact sheet."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from cosmos_cli import __version__, files, hashes
from cosmos_cli.generate.guards import guardrail
from cosmos_cli.generate.jobs import Job
from cosmos_cli.generate.text_models import negative_prompt
from cosmos_cli.model import mp4


def write_video(job: Job, pixels: Tensor, path: Path) -> None:
    """Write the mp4 of a job."""
    mp4.write_mp4(path, pixels, job.r.fps, job.r.video_crf)


def write_outputs(
    job: Job, words: str, save: Callable[[Path], None], sheet: Image, about: dict[str, Any]
) -> None:
    """Write the files of a job, the sidecar first and the mp4, which `save` writes, last.

    The sidecar marks the files as ours if the process is killed halfway.

    Raises:
        UserError: a file cannot be written.
    """
    sidecar, prompt, picture, path = job.files
    with files.atomic_file(path) as temporary:
        save(temporary)
        files.write_json(sidecar, {**about, "mp4_sha256": hashes.sha256_file(temporary)})
        files.write_text(prompt, words + "\n")
        with files.atomic_file(picture) as image:
            sheet.save(image, quality=90)


def provenance(job: Job, words: str) -> dict[str, Any]:
    """Return what a video was made from; `words` is the prompt that was encoded."""
    return {
        "prompt": job.prompt,
        "upsampled_prompt": None if words == job.prompt else words,
        "guardrails": guardrail.guard_names(job.r),
        "seed": job.r.sampling_seed,
        "passes": {
            "evaluated": job.segments * job.r.passes,
            "exact": job.segments * job.r.exact_passes,
        },
        "key": job.key,
        "model": job.r.model,
        "weights": {"path": str(job.weights.path), "sha256": job.weights.sha256},
        "loras": [{**asdict(used), "path": str(used.path)} for used in job.weights.loras],
        "input": {**asdict(job.given), "path": str(job.given.path)} if job.given else None,
        "negative_prompt": negative_prompt(job.r),
        "recipe": json.loads(job.r.model_dump_json()),
        "versions": {
            "cosmos": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
