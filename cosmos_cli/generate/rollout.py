"""Continue a video segment by segment, each from the last frames of the one before.

Every finished segment is on disk, so an interrupted rollout resumes after it.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosmos_cli import console, files, hashes, locks
from cosmos_cli.errors import UserError
from cosmos_cli.generate import outputs
from cosmos_cli.generate.jobs import Job
from cosmos_cli.model import mp4, rgb, video, video_scores, weights
from cosmos_cli.spec import GIVEN_FRAMES

if TYPE_CHECKING:
    from PIL.Image import Image

    from cosmos_cli.generate.phases import Pipeline
    from cosmos_cli.generate.text_models import Conditioning

OVERLAP = GIVEN_FRAMES[-1]
MAX_SEED = 2**32
SHEET_FRAMES, SHEET_WIDTH = 8, 320
# Facts of a segment that hold for the whole video.
SAME = ("attention", "fp8", "compiled", "streamed_blocks")


def make(pipeline: Pipeline, job: Job, text_emb: Conditioning, given: Tensor | None) -> None:
    """Generate the segments of a job and join them to one mp4; `given` starts the first.

    Each segment continues pixels of the one before as they were before any face was pixelated.

    Raises:
        UserError: a segment is not finite or blocked, a file cannot be written, or another command
            makes the same video.
    """
    with locks.writing(job.path, f".{job.path.stem}.segments.lock", "cosmos generate"):
        _make(pipeline, job, text_emb, given)


def _make(pipeline: Pipeline, job: Job, text_emb: Conditioning, given: Tensor | None) -> None:
    began, parts = time.monotonic(), Parts(job)
    if parts.rows:
        console.say(f"{len(parts.rows)} of {job.segments} segments were generated before")
        given = parts.last_frames()
    for number in range(len(parts.rows), job.segments):
        made = pipeline.segment(segment_job(job, number), text_emb, given)
        assert made, "a rollout runs in one process"
        pixels, about = made
        given = pixels[:, -OVERLAP:].clone()
        new = pixels[:, OVERLAP:] if number else pixels
        about["blurred_faces"] = pipeline.blur(new)
        parts.add(new, given, {**about, **drift_figures(new)})
    faces = [row["blurred_faces"] for row in parts.rows]
    about = {
        **{key: parts.rows[-1][key] for key in SAME},
        **outputs.provenance(job, text_emb.prompt),
        "blurred_faces": None if None in faces else sum(faces),
        "segments": parts.rows,
        "seconds": round(time.monotonic() - began, 2),
    }
    save = partial(mp4.join_mp4, parts.videos)
    outputs.write_outputs(job, text_emb.prompt, save, parts.sheet(), about)
    parts.remove()


def segment_job(job: Job, number: int) -> Job:
    """Return the job of one segment: the first has the seed of the whole, each other the next."""
    seed = (job.r.sampling_seed + number) % MAX_SEED
    # Messages and the progress name the stem; the progress shows its beginning.
    name = f"segment {number + 1} of {job.segments} of {job.path.stem}.mp4"
    path = job.path.with_name(name)
    return replace(job, r=job.r.model_copy(update={"sampling_seed": seed}), path=path, segments=1)


def drift_figures(pixels_CTHW: Tensor) -> dict[str, float]:
    """Return the figures that show drift: sharpness, brightness and saturation."""
    y_THW = video_scores.luminance(pixels_CTHW)
    return {
        "sharpness": video_scores.sharpness(y_THW),
        "brightness": float(y_THW.mean()),
        "saturation": video_scores.saturation(pixels_CTHW),
    }


class Parts:
    """The finished segments of a job, in a hidden folder next to its video."""

    def __init__(self, job: Job) -> None:
        """Keep the segments that an interrupted command finished, if the job is still the same."""
        self.job = job
        self.folder = job.path.with_name(f".{job.path.stem}.segments")
        self.state = self.folder / "state.json"
        self.rows: list[dict[str, Any]] = []
        with files.disk_errors(self.folder):
            self.rows = self._finished()
            if not self.rows and self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)

    def _finished(self) -> list[dict[str, Any]]:
        try:
            state = files.read_json(self.state)
        except UserError:
            return []
        if not isinstance(state, dict) or not {"key", "segments"} <= state.keys():
            return []
        if state["key"] != self.job.key or not self._frames(len(state["segments"])).is_file():
            return []
        names = [self._video(i) for i in range(len(state["segments"]))]
        rows: list[dict[str, Any]] = state["segments"]
        whole = all(
            path.is_file() and hashes.sha256_file(path) == row["sha256"]
            for path, row in zip(names, rows, strict=True)
        )
        return rows if whole else []

    def _video(self, number: int) -> Path:
        return self.folder / f"{number:04d}.mp4"

    def _frames(self, count: int) -> Path:
        """Return the file of the last frames of the first `count` segments."""
        return self.folder / f"after_{count:04d}.safetensors"

    @property
    def videos(self) -> list[Path]:
        """The mp4 of each finished segment, without the frames that it shares with the last."""
        return [self._video(number) for number in range(len(self.rows))]

    def add(self, pixels: Tensor, last: Tensor, about: dict[str, Any]) -> None:
        """Write a segment and the frames that the next one continues, uint8 CTHW."""
        path, count = self._video(len(self.rows)), len(self.rows) + 1
        with files.atomic_file(path) as temporary:
            outputs.write_video(self.job, pixels, temporary)
        weights.write_safetensors(self._frames(count), {"frames": last})
        row = {**about, "frames": pixels.shape[1], "sha256": hashes.sha256_file(path)}
        self.rows.append(row)
        files.write_json(self.state, {"key": self.job.key, "segments": self.rows})
        with files.disk_errors(self.folder):
            self._frames(count - 1).unlink(missing_ok=True)

    def last_frames(self) -> Tensor:
        """Return the frames that the next segment continues, uint8 CTHW."""
        return weights.read_safetensors(self._frames(len(self.rows)))["frames"]

    def sheet(self) -> Image:
        """Return a contact sheet of all segments."""
        count = max(2, -(-SHEET_FRAMES // len(self.rows)))
        small = [
            video.read_small(path, video.probe(path), count, SHEET_WIDTH) for path in self.videos
        ]
        return rgb.contact_sheet(torch.cat(small, dim=1))

    def remove(self) -> None:
        """Delete the segments."""
        with files.disk_errors(self.folder):
            shutil.rmtree(self.folder)
