"""Encode the clips of a dataset into latents, which are kept as long as their inputs are equal."""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_cli import console, gpus, hashes
from cosmos_cli.model import rgb, video, weights
from cosmos_cli.model.device import default_dtype, why_not_compiled
from cosmos_cli.model.tokenizer import load_tokenizer
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import checks, clip_statistics, damage, latent_files
from cosmos_cli.prep.checks import Check, Checks
from cosmos_cli.prep.processes import process_count
from cosmos_cli.prep.reading import Reader
from cosmos_cli.prep.sources import Source
from cosmos_cli.prep.work_sharing import Workers
from cosmos_cli.ranks import under_launcher
from cosmos_cli.recipe.keys import Recipe

# From this many clips on, compiling the tokenizer's blocks pays for itself. It takes half a minute;
# then a clip of 121 frames of 704x1280 takes 0.12 s on an H200 instead of 0.22 s.
WORTH_COMPILING = 300
# Clips that are decoded while another one is encoded. Each takes 0.33 GB at 121 frames of 704x1280.
READ_AHEAD = 2
# Free memory is returned to the system after this many videos. That takes milliseconds.
TRIM_EVERY_VIDEOS = 50


@dataclass
class _Begun:
    """A video that this process has taken (`ours`), or that another process has.

    `keys` holds the hash that the latent of each clip should have. `abouts` holds the metadata of
    each latent that has it, {} for the others. `check` is None if all of them were checked before.
    """

    number: int
    source: Source
    ours: bool = True
    keys: dict[video.Clip, str] = field(default_factory=dict)
    abouts: dict[video.Clip, dict[str, Any]] = field(default_factory=dict)
    check: Check | None = None


class Latents:
    """Encodes the clips of a dataset, video by video, and collects their rows of the manifest."""

    def __init__(self, r: Recipe, dataset: Dataset, videos: list[Source], device: str) -> None:
        self.recipe, self.dataset = r, dataset
        self.dtype = default_dtype(device)
        self.tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, self.dtype)
        # The device is named with its index, because each thread has its own current device.
        self.device = next(self.tokenizer.parameters()).device
        # Count the clips that are already encoded too: a resumed run must write the same bits.
        clips = sum(len(source.clips) for source in videos if not source.reason)
        worth_it = device != "cpu" and clips >= WORTH_COMPILING
        if r.compile == "on" or (r.compile == "auto" and worth_it):
            if reason := why_not_compiled(torch.device(device)):
                lost = "encoding a clip takes twice as long"
                console.warn(f"nothing is compiled here, so {lost}: {reason}")
            else:
                self.tokenizer.compile_blocks()
        identity = hashes.sha256_path(r.model_files.tokenizer)
        settings = {key: getattr(r, key) for key in ("height", "width", "num_frames", "resize")}
        self.settings = (json.dumps(settings), identity)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.statistics: dict[str, list[clip_statistics.ClipStatistics]] = {}
        self._digests: dict[Path, str] = {}
        self._warned = False

    def digest(self, source: Source) -> str:
        """Return the SHA-256 of a video's file, "" for a rejected video."""
        if source.reason:
            return ""
        if source.path not in self._digests:
            self._digests[source.path] = hashes.sha256_file(source.path)
        return self._digests[source.path]

    def make(self, videos: list[Source], workers: Workers) -> None:
        """Encode every video that is not done and that no other process works on."""
        todo = [(i, v) for i, v in enumerate(videos) if not v.reason and v.name not in self.rows]
        if not todo:
            return
        # Under a launcher, there is one process for each GPU.
        visible = max(len(gpus.gpu_names()), 1)
        sharing = visible if under_launcher() else process_count(self.recipe, len(todo))
        ahead = min(len(os.sched_getaffinity(0)) // sharing // checks.CORES_PER_CHECK, READ_AHEAD)
        total = sum(len(source.clips) for _, source in todo)
        with (
            console.progress("encode", total, "clips") as bar,
            checks.running(len(todo), sharing) as checking,
            Reader(self._pixels, ahead, self.device) as reader,
        ):
            begun = (self._begin(i, source, workers, checking, reader) for i, source in todo)
            for one in checking.delayed(begun):
                # A rejected video loses its clips.
                clips = len(one.source.clips)
                if one.ours:
                    self._make_one(one, reader)
                    workers.release(one.number)
                bar.advance(one.source.name, clips)
                if one.number % TRIM_EVERY_VIDEOS == 0:
                    _trim_memory()

    def _begin(
        self, number: int, source: Source, workers: Workers, checking: Checks, reader: Reader
    ) -> _Begun:
        """Take a video, unless another process has it, and begin to look for damage in it."""
        if not workers.take(number):
            return _Begun(number, source, ours=False)
        keys = {
            clip: hashes.sha256_text(self.digest(source), json.dumps(asdict(clip)), *self.settings)
            for clip in source.clips
        }
        abouts = {}
        for clip, key in keys.items():
            about = latent_files.read_about(self._path(source, clip))
            abouts[clip] = about if about.get("key") == key else {}
        reader.plan(source.path, (clip for clip, about in abouts.items() if not about))
        begun = _Begun(number, source, keys=keys, abouts=abouts)
        if not all(about.get("checked") for about in abouts.values()):
            begun.check = checking.begin(source.path, source.clips)
        return begun

    def _make_one(self, begun: _Begun, reader: Reader) -> None:
        source = begun.source
        try:
            abouts = {
                clip: self._kept(source, clip, begun.abouts[clip], reader) for clip in begun.keys
            }
            if begun.check:
                self._refuse_damage(source, begun.check)
            for clip, key in begun.keys.items():
                if not abouts[clip]:
                    abouts[clip] = self._encode(source, clip, key, reader.get(source.path, clip))
        except video.VideoError as error:
            source.reject(str(error))
            return
        self.rows[source.name] = [self._row(source, clip) for clip in source.clips]
        self.statistics[source.name] = [
            clip_statistics.ClipStatistics(*abouts[c]["look"]) for c in source.clips
        ]

    def _kept(
        self, source: Source, clip: video.Clip, about: dict[str, Any], reader: Reader
    ) -> dict[str, Any]:
        """Return the metadata of a clip's latent, {} if the clip must be encoded.

        Earlier versions did not check the decoded frames for damage. Their latents are kept if the
        clip still has the same cut and the same motion.
        """
        if about and not about.get("checked"):
            now = clip_statistics.measure_clip(reader.get(source.path, clip))
            then = clip_statistics.ClipStatistics(*about["look"])
            if now.cut != then.cut or abs(now.motion - then.motion) > 1e-3 * (1 + then.motion):
                return {}
        return about

    def _refuse_damage(self, source: Source, check: Check) -> None:
        """Refuse a video if any of its clips shows damaged frames.

        One damaged clip rejects the whole video: the other clips may have damage that no decoder
        reports.

        Raises:
            VideoError: there is damage; the message names the times.
        """
        assert source.info
        if source.info.codec == "hevc" and not damage.checks_hevc() and not self._warned:
            console.warn(
                "without libde265, most damage in HEVC videos goes unnoticed; "
                "run `apt-get install libde265-0`"
            )
            self._warned = True
        if spans := check():
            more = f" and {len(spans) - 3} more times" if len(spans) > 3 else ""
            times = ", ".join(f"{a:.2f} to {b:.2f} s" for a, b in spans[:3]) + more
            raise video.VideoError(
                f"damaged from {times}: replace the video, or cut these times out"
            )

    def _path(self, source: Source, clip: video.Clip) -> Path:
        return self.dataset.latents / source.latent_name(clip)

    def _pixels(self, path: Path, clip: video.Clip) -> Tensor:
        r = self.recipe
        return video.read_clip(path, clip, r.height, r.width, r.resize, str(self.device))

    @torch.inference_mode()
    def _encode(self, source: Source, clip: video.Clip, key: str, pixels: Tensor) -> dict[str, Any]:
        """Encode a clip, write its latent and return the metadata in the file."""
        x0 = self.tokenizer.encode(rgb.to_model(pixels)[None].to(self.dtype))[0]
        about = {
            "key": key,
            "fps": clip.fps,
            "video": source.name,
            "caption": source.stem,
            "look": clip_statistics.measure_clip(pixels),
            # The frames were decoded without a report of damage. Earlier versions lack this entry.
            "checked": True,
        }
        latent = x0.to("cpu", torch.bfloat16)
        path = self._path(source, clip)
        weights.write_safetensors(path, {"latent": latent}, {"about": json.dumps(about)})
        return about

    def _row(self, source: Source, clip: video.Clip) -> dict[str, Any]:
        root, path = self.dataset.root, self._path(source, clip)
        return {
            "latent": str(path.relative_to(root)),
            "sha256": hashes.sha256_file(path),
            "text": str((self.dataset.embeddings / f"{source.stem}.pickle").relative_to(root)),
            "video": source.name,
            "first_frame": clip.start,
            "fps": clip.fps,
        }


def _trim_memory() -> None:
    """Return free memory to the system.

    Trap: the objects that are kept for each video lie between the tensors of its frames. So glibc's
    heap grows by half a megabyte a video, although nearly all of it is free.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
