"""Turn videos and captions into metas, text embeddings, cached latents and a manifest of them.

Every file is written atomically and kept as long as its inputs stay the same, so prep can be killed
at any point and run again. Several processes can prepare one dataset at once: each takes the next
video that no other process works on, and the last one writes the manifest.
"""

from __future__ import annotations

import ctypes
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cosmos_cli import archives, console, files, paths
from cosmos_cli.console import Stopwatch
from cosmos_cli.model import rgb, text, video, weights
from cosmos_cli.model.device import why_not_compiled
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import (
    captioner,
    clip_statistics,
    damage,
    latent_files,
    page,
    sources,
    work_sharing,
)
from cosmos_cli.prep.sources import Source
from cosmos_cli.prep.work_sharing import Workers
from cosmos_cli.recipe import loading
from cosmos_cli.recipe.keys import Recipe

# The recipe keys that decide the content of a prepared dataset.
SETTINGS = (
    "model", "num_frames", "height", "width", "fps", "fps_policy", "resize", "camera",
    "clip_stride_frames", "max_clips_per_video", "holdout_share",
)  # fmt: skip
# From this many clips on, compiling the tokenizer's blocks pays for itself. It takes half a minute;
# then a clip of 121 frames of 704x1280 takes 0.13 s on an H200 instead of 0.37 s.
WORTH_COMPILING = 200
# Free memory is returned to the system after this many videos. That takes milliseconds.
TRIM_EVERY_VIDEOS = 50


def prepare(r: Recipe, device: str) -> dict[str, Any]:
    """Prepare the dataset of a recipe and return its manifest.

    Raises:
        UserError: no video is usable, or one is unusable and the recipe is strict.
    """
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    times = Stopwatch()
    with times("inspect"):
        videos = sources.inspect(r, dataset)
    sources.require_usable(r, dataset, videos)
    job = _job(r, videos)
    with times("describe"):
        captioner.describe(r, dataset, videos, job, device)
    with work_sharing.workers(dataset.lock, job) as workers:
        for source in sources.find_captions(r, dataset, videos):
            source.reject("no caption: its frames do not decode")
        notes = caption_notes(r, dataset, videos)
        for line in notes.lines(r):
            console.warn(line)
        sources.require_usable(r, dataset, videos)
        if workers.first:
            _check_disk(r, dataset, videos)
            _remove_stale(dataset)
            _remove_manifest(dataset)
            sources.adopt_embeddings(dataset, videos)
            sources.write_captions(r, dataset, videos)
            _check_embeddings(r, dataset, videos)
        workers.start()
        with times("embed"):
            _write_embeddings(r, dataset, videos, workers, device)
        clips = sum(len(source.clips) for source in videos if not source.reason)
        latents = Latents(r, dataset, clips, device)
        with times("encode"):
            latents.make(videos, workers)
        with times("wait for other processes"):
            finished = workers.wait_for_others()
        if not finished:
            # Another process may have been killed before it finished its videos.
            _write_embeddings(r, dataset, videos, workers, device)
            latents.make(videos, workers)
            _finish(r, latents, videos, notes, times)
            workers.finished()
        return dataset.read_manifest()


def _job(r: Recipe, videos: list[Source]) -> str:
    """Return a hash of all that decides the result.

    Processes with different hashes must not prepare the same dataset at once.
    """
    listed = [f"{v.name} {v.reason} {v.path} {files.stamp_of(v.path)}" for v in videos]
    return files.sha256_text(loading.dump(r), *listed)


def _remove_stale(dataset: Dataset) -> None:
    """Remove the temporary files of processes that were killed."""
    for folder in (dataset.root, dataset.metas, dataset.embeddings, dataset.latents):
        if folder.is_dir():
            files.remove_stale(folder)


def _remove_manifest(dataset: Dataset) -> None:
    """Remove the manifest, so that train reads no mixture of old and new if this run ends early."""
    if dataset.manifest.exists():
        dataset.read_manifest()
        dataset.manifest.unlink()


def _finish(
    r: Recipe, latents: Latents, videos: list[Source], notes: CaptionNotes, times: Stopwatch
) -> None:
    """Write the report, then the manifest, which marks the dataset as complete."""
    dataset = latents.dataset
    sources.require_usable(r, dataset, videos)
    rows = [sources.row(dataset, v, latents.digest(v)) for v in videos]
    # One file may hold many episodes, so the digest alone does not identify the content.
    content = {v.name: f"{latents.digest(v)} {v.span}" for v in videos if v.clips}
    held_out = choose_held_out(content, r.holdout_share)
    for row in rows:
        row["split"] = "heldout" if row["file"] in held_out else "train"
    manifest = {
        "settings": {key: getattr(r, key) for key in SETTINGS},
        "videos": rows,
        "clips": [clip for v in videos for clip in latents.rows.get(v.name, ())],
        **notes.figures(),
    }
    listed = {Path(clip["latent"]).name for clip in manifest["clips"]}
    for path in dataset.latents.glob("*.safetensors"):
        if path.name not in listed:
            path.unlink()
    files.write_text(dataset.root / "resolved.yaml", loading.dump(r))
    # Use the order of the videos, not the order in which this process encoded them.
    statistics = {
        v.name: latents.statistics[v.name] for v in videos if v.name in latents.statistics
    }
    findings = page.Findings(manifest, statistics, times.seconds, notes.lines(r))
    page.write(r, dataset, videos, findings, latents.tokenizer)
    # A process that was killed while this one waited may have left temporary files.
    _remove_stale(dataset)
    files.write_json(dataset.manifest, manifest)


def choose_held_out(content: Mapping[str, str], share: float) -> set[str]:
    """Return the names of the held-out videos: about `share` of all videos.

    With a `share` above 0, at least one video is held out, and at least one is left for training.
    Videos are taken in the order of the hashes of their names, so a dataset that grows keeps most
    of its held-out videos. Videos of the same `content` are held out
    together: otherwise a run would be measured on clips that it was trained on.
    """
    copies: dict[str, list[str]] = {}
    for name in sorted(content, key=files.sha256_text):
        copies.setdefault(content[name], []).append(name)
    wanted = max(round(share * len(content)), 1) if share else 0
    chosen: set[str] = set()
    for names in copies.values():
        if len(chosen) < wanted and len(chosen) + len(names) < len(content):
            chosen.update(names)
    return chosen


def latent_bytes(r: Recipe) -> int:
    """Return the size of one cached latent on disk in bytes."""
    channels, t, h, w = r.spec.latent_shape(r.num_frames, r.height, r.width)
    return channels * t * h * w * 2


def _check_disk(r: Recipe, dataset: Dataset, videos: list[Source]) -> None:
    missing = sum(
        not (dataset.latents / source.latent_name(clip)).exists()
        for source in videos
        for clip in source.clips
    )
    files.require_free(
        dataset.root,
        missing * latent_bytes(r) + r.min_free_disk_gb * 1e9,
        f"{missing} latents",
        "free some space, or make fewer clips: `--set max_clips_per_video=N` or "
        "`--set clip_stride_frames=N`",
    )


# --- warnings about captions ----------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionNotes:
    """The findings about captions that deserve a warning.

    Args:
        unused: kinds of files or rows that belong to no video, each with their names.
        cut: the number of tokens of each caption that the text encoder cuts, by video.
    """

    unused: list[tuple[str, list[str]]]
    cut: dict[str, int]

    def figures(self) -> dict[str, Any]:
        """Return the entries of the manifest, without empty ones."""
        figures = {"captions_unused": dict(self.unused), "captions_cut": self.cut}
        return {key: value for key, value in figures.items() if value}

    def lines(self, r: Recipe) -> list[str]:
        """Return one warning for each kind of finding."""
        lines = sources.unused_lines(self.unused)
        if self.cut:
            named = [f"{name} ({tokens} tokens)" for name, tokens in self.cut.items()]
            what = "1 caption is" if len(named) == 1 else f"{len(named)} captions are"
            lines.append(
                f"{what} longer than the {r.spec.text.tokens} tokens that the text encoder reads; "
                f"the rest is not used: {sources.shown(named)}"
            )
        return lines


def caption_notes(r: Recipe, dataset: Dataset, videos: list[Source]) -> CaptionNotes:
    """Collect the warnings about captions. Call it after `sources.find_captions`.

    Raises:
        UserError: captions_file, a folder or the text encoder's tokenizer cannot be read.
    """
    return CaptionNotes(sources.unused_files(r, dataset, videos), _cut_captions(r, dataset, videos))


def _cut_captions(r: Recipe, dataset: Dataset, videos: list[Source]) -> dict[str, int]:
    """Return the number of tokens of each caption that the text encoder cuts, by video."""
    most = r.spec.text.tokens
    used = [v for v in videos if not v.reason]
    # Every token but the first and the last takes at least one byte, so no shorter caption is cut.
    long = [v for v in used if len(unicodedata.normalize("NFKC", v.caption).encode()) + 2 > most]
    folder = paths.model_files(r.spec, r.checkpoints_dir).text_encoder
    if long and (folder / "config.json").is_file():
        tokens = text.TextEncoder(folder, r.spec.text, "cpu", torch.float32)
        cut = tokens.cut(v.caption for v in long)
        return {v.name: cut[v.caption] for v in long if v.caption in cut}
    # If all embeddings came with the dataset, the text encoder may be missing. Then a caption
    # counts as cut if its embedding has the full length.
    pickles = {v.name: dataset.embeddings / f"{v.stem}.pickle" for v in long}
    lengths = {
        name: len(text.read_pickle(path, r.spec.text))
        for name, path in pickles.items()
        if path.exists()
    }
    return {name: length for name, length in lengths.items() if length == most}


# --- embeddings -----------------------------------------------------------------------------------


def _write_embeddings(
    r: Recipe, dataset: Dataset, videos: list[Source], workers: Workers, device: str
) -> None:
    """Encode each distinct caption once, in batches of similar length.

    The batches are made of all captions, not only of those without an embedding. The last bits of
    an embedding depend on its batch, and a run that is killed and restarted must write the same.
    """
    pickles: dict[str, list[Path]] = {}
    for source in videos:
        if not source.reason:
            path = dataset.embeddings / f"{source.stem}.pickle"
            pickles.setdefault(source.caption, []).append(path)
    if not any(_stale(dataset, waiting) for waiting in pickles.values()):
        return
    folder = paths.model_files(r.spec, r.checkpoints_dir).text_encoder
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    encoder = text.TextEncoder(folder, r.spec.text, device, dtype)
    with console.progress("embed", len(pickles), "captions") as bar:
        for number, batch in enumerate(encoder.batches(list(pickles))):
            with workers.piece(len(videos) + number) as ours:
                stale = {c: _stale(dataset, pickles[c]) for c in batch} if ours else {}
                if any(stale.values()):
                    for caption, embedding in zip(batch, encoder.encode(batch), strict=True):
                        if not embedding.isfinite().all():
                            raise text.no_embedding(caption, folder)
                        for path in stale[caption]:
                            with files.atomic_file(path) as temporary:
                                text.write_pickle(temporary, embedding)
            bar.advance(count=len(batch))


def _stale(dataset: Dataset, pickles: list[Path]) -> list[Path]:
    """Return the pickles that are missing or older than their caption."""
    metas = [dataset.metas / f"{path.stem}.txt" for path in pickles]
    return [
        path
        for path, meta in zip(pickles, metas, strict=True)
        if not path.exists() or path.stat().st_mtime_ns < meta.stat().st_mtime_ns
    ]


def _check_embeddings(r: Recipe, dataset: Dataset, videos: list[Source]) -> None:
    """Read the embeddings that will be kept, including those that the reference wrote.

    Raises:
        UserError: a file is not an embedding.
    """
    for source in videos:
        path = dataset.embeddings / f"{source.stem}.pickle"
        if not source.reason and not _stale(dataset, [path]):
            text.read_pickle(path, r.spec.text)


# --- latents --------------------------------------------------------------------------------------


class Latents:
    """Encodes the clips of a dataset, video by video, and collects their rows of the manifest."""

    def __init__(self, r: Recipe, dataset: Dataset, clips: int, device: str) -> None:
        self.recipe, self.dataset = r, dataset
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.tokenizer = latent_files.load_tokenizer(r, device, dtype)
        # Count the clips that are already encoded too: a resumed run must write the same bits.
        worth_it = device != "cpu" and clips >= WORTH_COMPILING
        if r.compile == "on" or (r.compile == "auto" and worth_it):
            if reason := why_not_compiled(torch.device(device)):
                lost = "a clip takes three times as long"
                console.warn(f"nothing is compiled here, so {lost}: {reason}")
            else:
                self.tokenizer.compile_blocks()
        identity = files.sha256_path(paths.model_files(r.spec, r.checkpoints_dir).tokenizer)
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
            self._digests[source.path] = files.sha256_file(source.path)
        return self._digests[source.path]

    def make(self, videos: list[Source], workers: Workers) -> None:
        """Encode every video that is not done and that no other process works on."""
        todo = [(i, v) for i, v in enumerate(videos) if not v.reason and v.name not in self.rows]
        with console.progress("encode", sum(len(v.clips) for _, v in todo), "clips") as bar:
            for number, source in todo:
                count = len(source.clips)
                with workers.piece(number) as ours:
                    if ours:
                        self._make_one(source)
                bar.advance(source.name, count)
                if number % TRIM_EVERY_VIDEOS == 0:
                    _trim_memory()

    def _make_one(self, source: Source) -> None:
        keys = {
            clip: files.sha256_text(self.digest(source), json.dumps(asdict(clip)), *self.settings)
            for clip in source.clips
        }
        try:
            abouts = {clip: self._kept(source, clip, key) for clip, key in keys.items()}
            if not all(about.get("checked") for about in abouts.values()):
                self._refuse_damage(source)
            for clip, key in keys.items():
                abouts[clip] = abouts[clip] or self._encode(source, clip, key)
        except video.VideoError as error:
            source.reject(str(error))
            return
        self.rows[source.name] = [self._row(source, clip) for clip in source.clips]
        self.statistics[source.name] = [
            clip_statistics.ClipStatistics(*abouts[c]["look"]) for c in source.clips
        ]

    def _kept(self, source: Source, clip: video.Clip, key: str) -> dict[str, Any]:
        """Return the metadata of a clip's latent, {} if the clip must be encoded.

        Earlier versions did not check the decoded frames for damage. Their latents are kept if the
        clip still has the same cut and the same motion.
        """
        about = _about(self.dataset.latents / source.latent_name(clip))
        if about.get("key") != key:
            return {}
        if not about.get("checked"):
            now, then = (
                clip_statistics.measure(self._pixels(source, clip)),
                clip_statistics.ClipStatistics(*about["look"]),
            )
            if now.cut != then.cut or abs(now.motion - then.motion) > 1e-3 * (1 + then.motion):
                return {}
        return about

    def _refuse_damage(self, source: Source) -> None:
        """Refuse a video if any of its clips shows damaged frames.

        One damaged clip rejects the whole video: the other clips may have damage that no decoder
        reports.

        Raises:
            VideoError: there is damage; the message names the times.
        """
        assert source.info
        if source.info.codec == "hevc" and not damage.checks_hevc() and not self._warned:
            fix = "apt-get install libde265-0"
            console.warn(
                f"without libde265, most damage in HEVC videos goes unnoticed; run `{fix}`"
            )
            self._warned = True
        spans = damage.find(source.path, source.clips)
        if spans:
            more = f" and {len(spans) - 3} more times" if len(spans) > 3 else ""
            times = ", ".join(f"{a:.2f} to {b:.2f} s" for a, b in spans[:3]) + more
            raise video.VideoError(
                f"damaged from {times}: replace the video, or cut these times out"
            )

    def _pixels(self, source: Source, clip: video.Clip) -> torch.Tensor:
        r, device = self.recipe, next(self.tokenizer.parameters()).device.type
        return video.read_clip(source.path, clip, r.height, r.width, r.resize, device)

    @torch.inference_mode()
    def _encode(self, source: Source, clip: video.Clip, key: str) -> dict[str, Any]:
        """Encode a clip, write its latent and return the metadata in the file."""
        parameter, pixels = next(self.tokenizer.parameters()), self._pixels(source, clip)
        x0 = self.tokenizer.encode(rgb.to_model(pixels)[None].to(parameter))[0]
        about = {
            "key": key,
            "fps": clip.fps,
            "video": source.name,
            "caption": source.stem,
            "look": clip_statistics.measure(pixels),
            # The frames were decoded without a report of damage. Earlier versions lack this entry.
            "checked": True,
        }
        latent = x0.to("cpu", torch.bfloat16)
        path = self.dataset.latents / source.latent_name(clip)
        weights.write_safetensors(path, {"latent": latent}, {"about": json.dumps(about)})
        return about

    def _row(self, source: Source, clip: video.Clip) -> dict[str, Any]:
        root, path = self.dataset.root, self.dataset.latents / source.latent_name(clip)
        return {
            "latent": str(path.relative_to(root)),
            "sha256": files.sha256_file(path),
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


def _about(path: Path) -> dict[str, Any]:
    """Return the metadata in a latent's file, {} if the file is missing or damaged."""
    try:
        archives.check_safetensors(path)
        with safe_open(path, framework="pt") as stream:
            about: dict[str, Any] = json.loads((stream.metadata() or {}).get("about", "{}"))
    except (files.BadFile, OSError, SafetensorError):
        return {}
    return about
