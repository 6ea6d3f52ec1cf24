"""Turn videos and captions into metas, text embeddings, cached latents and a manifest of them.

Every file is written atomically and kept as long as its inputs stay the same, so prep can be killed
at any point and run again. Several processes can prepare one dataset at once: each takes the next
videos that no other process works on, and the last one writes the manifest. On a machine with
several GPUs, helper processes describe and encode videos on the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos_cli import console, files, hashes
from cosmos_cli.console import Stopwatch
from cosmos_cli.download.assets import require_networks
from cosmos_cli.model import text
from cosmos_cli.model.device import default_dtype
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import (
    caption_choice,
    caption_notes,
    captioner,
    embedding_files,
    holdout,
    latent_files,
    page,
    processes,
    sources,
    work_sharing,
)
from cosmos_cli.prep.latents import Latents
from cosmos_cli.prep.sources import Source
from cosmos_cli.prep.work_sharing import Workers
from cosmos_cli.recipe import loading
from cosmos_cli.recipe.keys import Recipe


def prepare(r: Recipe, device: str) -> dict[str, Any]:
    """Prepare the dataset of a recipe and return its manifest.

    Raises:
        UserError: no video is usable, or one is unusable and the recipe is strict.
    """
    dataset = r.dataset
    times = Stopwatch()
    with times("inspect"):
        videos = sources.inspect(r, dataset)
    for line in sources.remarks(r, videos):
        console.warn(line)
    sources.require_usable(r, dataset, videos)
    job = _job(r, videos)
    with times("describe"):
        captioner.describe_videos(r, dataset, videos, job, device)
    with work_sharing.workers(dataset.lock, job) as workers:
        for source in caption_choice.find_captions(r, dataset, videos):
            source.reject("no caption: its frames do not decode")
        notes = caption_notes.collect(r, dataset, videos)
        for line in notes.lines(r):
            console.warn(line)
        sources.require_usable(r, dataset, videos)
        if workers.first:
            _check_disk(r, dataset, videos)
            _remove_stale(dataset)
            if dataset.manifest.exists():
                # Otherwise train may read a mixture of old and new if this run ends early.
                dataset.read_manifest()
                dataset.manifest.unlink()
            caption_choice.adopt_embeddings(dataset, videos)
            caption_choice.write_captions(r, dataset, videos)
            _check_embeddings(r, dataset, videos)
        workers.start()
        pieces = sum(not source.reason for source in videos) if workers.can_share else 1
        with processes.helping(r, pieces, _help_to_encode, (r, dataset, videos, job)):
            with times("embed"):
                _write_embeddings(r, dataset, videos, workers, device)
            latents = Latents(r, dataset, videos, device)
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


def _help_to_encode(
    r: Recipe, dataset: Dataset, videos: list[Source], job: str, device: str
) -> None:
    """Encode videos in a helper process until another process works on each that is left.

    Captions are not shared: loading the text encoder takes longer than embedding a thousand.
    """
    with work_sharing.workers(dataset.lock, job) as workers:
        # If it is the first, `prepare` has ended.
        if not workers.first:
            Latents(r, dataset, videos, device).make(videos, workers)


def _job(r: Recipe, videos: list[Source]) -> str:
    """Return a hash of all that decides the result.

    Processes with different hashes must not prepare the same dataset at once.
    """
    listed = [f"{v.name} {v.reason} {v.path} {files.stamp_of(v.path)}" for v in videos]
    return hashes.sha256_text(loading.dump(r), *listed)


def _remove_stale(dataset: Dataset) -> None:
    """Remove the temporary files of processes that were killed."""
    folders = (dataset.metas, dataset.embeddings, dataset.latents, dataset.descriptions)
    for folder in (dataset.root, *folders):
        if folder.is_dir():
            files.remove_stale(folder)


def _finish(
    r: Recipe,
    latents: Latents,
    videos: list[Source],
    notes: caption_notes.CaptionNotes,
    times: Stopwatch,
) -> None:
    """Write the report, then the manifest, which marks the dataset as complete."""
    dataset = latents.dataset
    sources.require_usable(r, dataset, videos)
    rows = [sources.manifest_row(dataset, v, latents.digest(v)) for v in videos]
    # One file may hold many episodes, so the digest alone does not identify the content.
    content = {v.name: f"{latents.digest(v)} {v.span}" for v in videos if v.clips}
    held_out = holdout.choose_held_out(content, r.holdout_share)
    for row in rows:
        row["split"] = "heldout" if row["file"] in held_out else "train"
    clips = [clip for v in videos for clip in latents.rows.get(v.name, ())]
    texts = {clip["text"] for clip in clips}
    text_hashes = {text: hashes.sha256_file(dataset.root / text) for text in texts}
    manifest = {
        "settings": r.dataset_settings,
        "videos": rows,
        "clips": [{**clip, "text_sha256": text_hashes[clip["text"]]} for clip in clips],
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
    findings = page.Findings(
        manifest, statistics, times.seconds, [*notes.lines(r), *sources.remarks(r, videos)]
    )
    page.write_page(r, dataset, videos, findings, latents.tokenizer)
    # A process that was killed while this one waited may have left temporary files.
    _remove_stale(dataset)
    files.write_json(dataset.manifest, manifest)


def require_ready(r: Recipe, dataset: Dataset, videos: list[Source]) -> None:
    """Check what prep needs beyond usable videos: its networks and disk space.

    Raises:
        UserError: a network is missing, or the latents do not fit on the disk.
    """
    used = [source for source in videos if not source.reason]
    networks = [r.model_files.tokenizer]
    if not all((dataset.embeddings / f"{source.stem}.pickle").exists() for source in used):
        networks.append(r.model_files.text_encoder / "config.json")
    # A name that is not a path is one in the hub's cache.
    if r.caption_model and any(source.caption_source == "vlm" for source in used):
        networks += [Path(r.caption_model)] if Path(r.caption_model).is_absolute() else []
    require_networks(r, *networks)
    _check_disk(r, dataset, videos)


def _check_disk(r: Recipe, dataset: Dataset, videos: list[Source]) -> None:
    missing = sum(
        not (dataset.latents / source.latent_name(clip)).exists()
        for source in videos
        for clip in source.clips
    )
    files.require_free(
        dataset.root,
        missing * latent_files.latent_bytes(r),
        f"{missing} latents",
        "free some space, or make fewer clips: `--set max_clips_per_video=N` or "
        "`--set clip_stride_frames=N`",
    )


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
    folder = r.model_files.text_encoder
    dtype = default_dtype(device)
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
                                embedding_files.write_embedding(temporary, embedding)
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
            embedding_files.read_embedding(path, r.spec.text)
