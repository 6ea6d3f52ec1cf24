"""Videos and captions -> metas, text embeddings, cached latents and a manifest that names them all.

Every file appears whole or not at all and is kept while what it was made from stays the same, so
prep may be interrupted anywhere and run again.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cosmos_cli import console, layout, recipe
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.keys import Recipe
from cosmos_cli.layout import Dataset
from cosmos_cli.model import text, video, weights
from cosmos_cli.model.tokenizer import Tokenizer

# Recipe keys that decide the content of a prepared dataset.
SETTINGS = (
    "model", "num_frames", "height", "width", "fps", "fps_policy", "resize",
    "clip_stride_frames", "max_clips_per_video",
)  # fmt: skip
TEXT_BATCH = 16
MAX_CAPTION_BYTES = 1_000_000


@dataclass
class Source:
    """One video file and what prep decided about it."""

    path: Path
    info: video.VideoInfo | None = None
    clips: list[video.Clip] = field(default_factory=list)
    caption: str = ""
    caption_source: str = ""
    reason: str = ""

    @property
    def stem(self) -> str:
        """The name that caption, embedding and latents share."""
        return self.path.stem

    def latent_name(self, clip: video.Clip) -> str:
        """The file name of a clip's latent."""
        return f"{self.stem}.{clip.start:06d}.safetensors"

    def reject(self, reason: str) -> None:
        """Excludes the video; the first reason stays."""
        self.reason = self.reason or reason
        self.clips = []


def prepare(r: Recipe, device: str) -> dict[str, Any]:
    """Prepares the dataset of a recipe; its manifest.

    Raises:
        UserError: no video can be used, or one cannot and the recipe is strict.
    """
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    sources = inspect(r, dataset)
    require_usable(r, dataset, sources)
    _check_disk(r, dataset, sources)
    for folder in (dataset.root, dataset.metas, dataset.embeddings, dataset.latents):
        if folder.is_dir():
            layout.remove_stale(folder)

    if dataset.manifest.exists():
        # What follows may replace what it lists; train must not read the mixture.
        dataset.read_manifest()
        dataset.manifest.unlink()
    same_model = _known_captions(dataset).get("model", r.model) == r.model
    _write_captions(r, dataset, sources)
    _write_embeddings(r, dataset, sources, same_model, device)
    console.say(f"hashing {len(sources)} videos")
    hashes = {s.path.name: "" if s.reason else layout.sha256_file(s.path) for s in sources}
    clips = _write_latents(r, dataset, sources, hashes, device)
    require_usable(r, dataset, sources)

    manifest = {
        "settings": {key: getattr(r, key) for key in SETTINGS},
        "videos": [_row(source, hashes[source.path.name]) for source in sources],
        "clips": clips,
    }
    layout.write_text(dataset.root / "resolved.yaml", recipe.dump(r))
    layout.write_json(dataset.manifest, manifest)
    listed = {Path(clip["latent"]).name for clip in clips}
    for path in dataset.latents.glob("*.safetensors"):
        if path.name not in listed:
            path.unlink()
    return manifest


# --- verdicts -------------------------------------------------------------------------------------


def inspect(r: Recipe, dataset: Dataset) -> list[Source]:
    """Every video of the dataset with its clips and caption, or the reason why it has none."""
    known = _known_captions(dataset).get("videos", {})
    sources = [Source(path) for path in dataset.video_files()]
    stems: dict[str, Path] = {}
    with console.progress("inspect", len(sources), "videos") as bar:
        for source in sources:
            first = stems.setdefault(source.stem, source.path)
            if first is not source.path:
                source.reject(f"shares its name with {first.name}; rename one")
            elif not source.path.is_file():
                source.reject("not a file")
            else:
                _inspect_one(r, source)
                _caption(r, dataset, source, known.get(source.path.name, {}))
            bar.advance(source.path.name)
    return sources


def _inspect_one(r: Recipe, source: Source) -> None:
    try:
        source.info = video.probe(source.path)
        source.clips = video.select_clips(
            source.info,
            r.fps_policy,
            r.fps,
            r.num_frames,
            r.stride,
            r.max_clips_per_video,
        )
    except video.VideoError as error:
        source.reject(str(error))


def _caption(r: Recipe, dataset: Dataset, source: Source, known: dict[str, str]) -> None:
    """Takes the caption from metas, else from beside the video, else from the recipe.

    `known` is the caption of the last run and its source.
    """
    meta = dataset.metas / f"{source.stem}.txt"
    metas = _read_caption(meta, source)
    sidecar = _read_caption(source.path.with_suffix(".txt"), source)
    if known.get("caption") == metas and known.get("caption_source") != "metas":
        # Prep wrote this file from the sidecar or prompt of then; those of now hold.
        source.caption = sidecar or r.prompt or metas
    else:
        source.caption = metas or sidecar or r.prompt or ""
    origins = {"sidecar": sidecar, "prompt": r.prompt, "metas": source.caption}
    source.caption_source = next(o for o, text in origins.items() if text == source.caption)
    if not source.caption:
        source.reject(f"no caption: write {meta}, or set prompt")


def _read_caption(path: Path, source: Source) -> str:
    try:
        if path.stat().st_size > MAX_CAPTION_BYTES:
            source.reject(f"the caption {path.name} is larger than a megabyte")
            return ""
        # Editors on Windows put a mark in front.
        return path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        source.reject(f"the caption {path.name} is no readable UTF-8 text")
        return ""


def require_usable(r: Recipe, dataset: Dataset, sources: list[Source]) -> None:
    """Ends prep when nothing is left to train on.

    Raises:
        UserError: there is no video, none can be used, or the recipe is strict and one cannot.
    """
    rejected = [source for source in sources if source.reason]
    also = tuple(
        UserError(source.reason, code=ExitCode.DATASET, where=str(source.path))
        for source in rejected
    )
    if len(rejected) == len(sources):
        found = f"none of {len(sources)} videos can be used" if sources else "holds no videos"
        raise UserError(
            found,
            code=ExitCode.DATASET,
            where=str(dataset.videos),
            fix="see the reasons below" if sources else "put mp4 files there, or set videos_dir",
            also=also,
        )
    if rejected and r.strict:
        raise UserError(
            f"{len(rejected)} of {len(sources)} videos are rejected and the recipe is strict",
            code=ExitCode.DATASET,
            where=str(dataset.videos),
            fix="mend or remove them, or set strict to false",
            also=also,
        )


def verdicts(sources: list[Source]) -> str:
    """A table of all videos, as printed by --dry-run."""
    return verdict_table([_row(source, "") for source in sources])


def verdict_table(videos: list[dict[str, Any]]) -> str:
    """A table of the videos of a manifest."""
    rows = [
        (
            row["file"],
            row["verdict"],
            f"{row['frames']} at {row['fps']:.4g}" if row["frames"] else "-",
            f"{row['width']}x{row['height']}" if row["frames"] else "-",
            str(row["clips"]),
            " ".join((row["reason"] or row["caption"]).split())[:90],
        )
        for row in videos
    ]
    return console.table(rows, ("video", "verdict", "frames", "size", "clips", "caption or reason"))


def _row(source: Source, digest: str) -> dict[str, Any]:
    info = source.info or video.VideoInfo(0, 0.0, 0, 0, 0.0, "")
    facts = asdict(info)
    del facts["begin"]
    return {
        "file": source.path.name,
        "bytes": layout.size_of(source.path),
        "sha256": digest,
        "verdict": "rejected" if source.reason else "used",
        "reason": source.reason,
        **facts,
        "caption": source.caption,
        "caption_source": source.caption_source,
        "clips": len(source.clips),
    }


# --- files ----------------------------------------------------------------------------------------


def _known_captions(dataset: Dataset) -> dict[str, Any]:
    """The captions that the last run used, however it ended."""
    if not dataset.captions.exists():
        return {}
    known: dict[str, Any] = layout.read_json(dataset.captions)
    return known


def latent_bytes(r: Recipe) -> int:
    """Disk that one cached latent takes."""
    channels, t, h, w = r.spec.latent_shape(r.num_frames, r.height, r.width)
    return channels * t * h * w * 2


def _check_disk(r: Recipe, dataset: Dataset, sources: list[Source]) -> None:
    missing = sum(
        not (dataset.latents / source.latent_name(clip)).exists()
        for source in sources
        for clip in source.clips
    )
    layout.require_free(
        dataset.root,
        missing * latent_bytes(r) + r.min_free_disk_gb * 1e9,
        f"{missing} latents",
        "free some space, or set clip_stride_frames or max_clips_per_video",
    )


def _write_captions(r: Recipe, dataset: Dataset, sources: list[Source]) -> None:
    """Notes where every caption comes from, then writes those that are not yet in `metas`."""
    used = [source for source in sources if not source.reason]
    videos = {s.path.name: {"caption": s.caption, "caption_source": s.caption_source} for s in used}
    layout.write_json(dataset.captions, {"model": r.model, "videos": videos})
    for source in used:
        path = dataset.metas / f"{source.stem}.txt"
        if _read_caption(path, source) != source.caption:
            layout.write_text(path, source.caption + "\n")


def _write_embeddings(
    r: Recipe, dataset: Dataset, sources: list[Source], same_model: bool, device: str
) -> None:
    """Encodes each distinct caption once, similar lengths together."""
    missing: dict[str, list[Path]] = {}
    for source in sources:
        path = dataset.embeddings / f"{source.stem}.pickle"
        current = same_model and _embedding_is_current(r, dataset, source)
        if not source.reason and not current:
            missing.setdefault(source.caption, []).append(path)
    if not missing:
        return
    folder = layout.model_files(r.spec, r.checkpoints_dir).text_encoder
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    encoder = text.TextEncoder(folder, r.spec.text, device, dtype)
    captions = sorted(missing, key=len)
    with console.progress("embed", len(captions), "captions") as bar:
        for first in range(0, len(captions), TEXT_BATCH):
            batch = captions[first : first + TEXT_BATCH]
            for caption, embedding in zip(batch, encoder.encode(batch), strict=True):
                for path in missing[caption]:
                    with layout.atomic_file(path) as temporary:
                        text.write_pickle(temporary, embedding)
            bar.advance(count=len(batch))


def _embedding_is_current(r: Recipe, dataset: Dataset, source: Source) -> bool:
    """Whether the pickle on disk is younger than its caption; the reference's own counts too."""
    path = dataset.embeddings / f"{source.stem}.pickle"
    meta = dataset.metas / f"{source.stem}.txt"
    if source.reason or not path.exists() or path.stat().st_mtime_ns < meta.stat().st_mtime_ns:
        return False
    text.read_pickle(path, r.spec.text)
    return True


def _write_latents(
    r: Recipe, dataset: Dataset, sources: list[Source], hashes: dict[str, str], device: str
) -> list[dict[str, Any]]:
    """Encodes every clip whose latent is missing or was made from something else."""
    files = layout.model_files(r.spec, r.checkpoints_dir)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tokenizer = load_tokenizer(r, device, dtype)
    identity = layout.sha256_path(files.tokenizer)
    settings = {key: getattr(r, key) for key in ("height", "width", "num_frames", "resize")}
    clips: list[dict[str, Any]] = []
    with console.progress("encode", sum(len(s.clips) for s in sources), "clips") as bar:
        for source in sources:
            made = []
            for clip in source.clips:
                path = dataset.latents / source.latent_name(clip)
                key = layout.sha256_text(
                    hashes[source.path.name],
                    json.dumps(asdict(clip)),
                    json.dumps(settings),
                    identity,
                )
                try:
                    if _latent_key(path) != key:
                        _encode(r, tokenizer, source, clip, path, key)
                except video.VideoError as error:
                    source.reject(str(error))
                    break
                made.append(_clip_row(dataset, source, clip, path))
                bar.advance(source.path.name)
            clips += [] if source.reason else made
    return clips


def load_tokenizer(r: Recipe, device: str, dtype: torch.dtype) -> Tokenizer:
    """The video tokenizer of the recipe's model, ready to encode and decode."""
    path = layout.model_files(r.spec, r.checkpoints_dir).tokenizer
    tokenizer = Tokenizer(r.spec.tokenizer, r.spec.sigma_data)
    weights.load_strict(tokenizer, weights.load_tokenizer_state(path), path)
    return tokenizer.to(device=device, dtype=dtype).eval()


@torch.inference_mode()
def _encode(
    r: Recipe, tokenizer: Tokenizer, source: Source, clip: video.Clip, path: Path, key: str
) -> None:
    pixels = video.read_clip(source.path, clip, r.height, r.width, r.resize)
    parameter = next(tokenizer.parameters())
    x0 = tokenizer.encode(video.to_model(pixels)[None].to(parameter))[0]
    about = {"key": key, "fps": repr(clip.fps), "video": source.path.name, "caption": source.stem}
    with weights.writing(path), layout.atomic_file(path) as temporary:
        save_file({"latent": x0.to("cpu", torch.bfloat16).contiguous()}, temporary, metadata=about)


def _latent_key(path: Path) -> str | None:
    """What the latent on disk was made from, None when it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as stream:
            key: str | None = (stream.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return None
    return key


def _clip_row(dataset: Dataset, source: Source, clip: video.Clip, path: Path) -> dict[str, Any]:
    return {
        "latent": str(path.relative_to(dataset.root)),
        "sha256": layout.sha256_file(path),
        "text": str((dataset.embeddings / f"{source.stem}.pickle").relative_to(dataset.root)),
        "video": source.path.name,
        "first_frame": clip.start,
        "fps": clip.fps,
    }
