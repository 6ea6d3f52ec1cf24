"""Write the report of prep: an HTML page with every video, the warnings and reconstructions."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_cli import console, files, html
from cosmos_cli.html import Html
from cosmos_cli.model import mp4, rgb, video
from cosmos_cli.model.tokenizer import Tokenizer
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import clip_statistics
from cosmos_cli.prep.latent_files import read_latent
from cosmos_cli.prep.sources import Source
from cosmos_cli.recipe.keys import Recipe

# These limits keep the page small enough for a browser: contact sheets, decoded clips, warnings.
MOST_PICTURES, MOST_CHECKED, MOST_WARNINGS = 200, 12, 200
# Columns and rows of frames in a contact sheet, and the width of a frame in pixels.
COLUMNS, ROWS, CELL = 4, 2, 160
CHECK_WIDTH, CHECK_CRF = 320, 23
# Decoding uses several cores, so there is one contact sheet at a time for every four.
CORES_PER_SHEET = 4


@dataclass(frozen=True)
class Findings:
    """The results of prep that the report shows.

    The statistics of each video are in the order of its clips. `seconds` is the time of each phase,
    `notes` are warnings about captions.
    """

    manifest: dict[str, Any]
    statistics: dict[str, list[clip_statistics.ClipStatistics]]
    seconds: dict[str, float]
    notes: list[str]


def write_page(
    r: Recipe, dataset: Dataset, videos: list[Source], findings: Findings, tokenizer: Tokenizer
) -> None:
    """Write the dataset's `report.html`, and print the first warnings about its clips."""
    warnings = list(_warnings(findings))
    for line in warnings[:10]:
        console.warn(line)
    if len(warnings) > 10:
        console.warn(f"{len(warnings) - 10} more warnings about clips: see {dataset.report}")
    # With this name, the next run removes the folder if this one is killed.
    where = {"dir": dataset.root, "prefix": f".{os.getpid()}.", "suffix": ".tmp"}
    with tempfile.TemporaryDirectory(**where) as folder:
        checked = _reconstructions(r, dataset, videos, tokenizer, Path(folder))
        pictures = _pictures(r, videos, Path(folder))
    sections = [
        ("Totals", html.table(_totals(dataset, findings))),
        ("Warnings", _lines([*findings.notes, *warnings])),
        ("Distributions", _histograms(findings)),
        ("Reconstructions", checked),
        ("Videos", _table(findings, pictures)),
        ("Time", _times(findings.seconds, next(tokenizer.parameters()).device.type)),
    ]
    settings = findings.manifest["settings"].items()
    listed = ", ".join(f"{k} {v}" for k, v in settings if k != "model" and v is not None)
    note = f"{dataset.videos} prepared for {r.model}: {listed}."
    files.write_text(dataset.report, html.page(f"Dataset {dataset.root.name}", sections, note))


def _totals(dataset: Dataset, findings: Findings) -> Iterator[tuple[str, str]]:
    videos, clips = findings.manifest["videos"], findings.manifest["clips"]
    frames = findings.manifest["settings"]["num_frames"]
    used = [video for video in videos if video["verdict"] == "used"]
    yield "videos used", f"{len(used)} of {len(videos)}"
    yield "videos held out", str(sum(video["split"] == "heldout" for video in used))
    yield "time in the videos used", console.duration(sum(video["seconds"] for video in used))
    yield "clips", str(len(clips))
    yield "time in the clips", console.duration(sum(frames / clip["fps"] for clip in clips))
    yield "distinct captions", str(len({video["caption"] for video in used}))
    origins = [video["caption_source"] for video in used]
    counts = (f"{origins.count(origin)} from {origin}" for origin in dict.fromkeys(origins))
    yield "captions", ", ".join(counts)
    sizes = {video["path"]: video["bytes"] for video in videos}
    yield "disk of the videos", console.size(sum(sizes.values()))
    for name, folder in (("latents", dataset.latents), ("embeddings", dataset.embeddings)):
        yield f"disk of the {name}", console.size(sum(p.stat().st_size for p in folder.iterdir()))


def _warnings(findings: Findings) -> Iterator[str]:
    """Yield a warning for each hard cut and each video that is like an earlier one."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for clip in findings.manifest["clips"]:
        rows.setdefault(clip["video"], []).append(clip)
    for name, clips in findings.statistics.items():
        cuts = [
            (row["first_frame"] + measured.cut) / row["fps"]
            for row, measured in zip(rows[name], clips, strict=True)
            if measured.cut is not None
        ]
        # Clips that overlap show the same cut.
        for at in dict.fromkeys(f"{cut:.2f}" for cut in cuts):
            yield f"{name}: there seems to be a hard cut at {at} s"
    first = {name: clips[0] for name, clips in findings.statistics.items() if clips}
    digests = {video["file"]: video["sha256"] for video in findings.manifest["videos"]}
    for earlier, name in clip_statistics.near_duplicates(first):
        how = "has the same bytes as" if digests[earlier] == digests[name] else "looks like"
        yield f"{name}: {how} {earlier}"


def _lines(lines: list[str]) -> str:
    if not lines:
        return html.text("none")
    more = [f"... and {len(lines) - MOST_WARNINGS} more"] if len(lines) > MOST_WARNINGS else []
    return html.table([line] for line in [*lines[:MOST_WARNINGS], *more])


def _histograms(findings: Findings) -> str:
    videos = [video for video in findings.manifest["videos"] if video["frames"]]
    motion = [clip.motion for clips in findings.statistics.values() for clip in clips]
    return html.row(
        html.histogram([v["seconds"] for v in videos], "length of a video in seconds"),
        html.histogram([v["width"] * v["height"] / 1e6 for v in videos], "size in megapixels"),
        html.histogram([v["fps"] for v in videos], "frames per second"),
        html.histogram(motion, "motion of a clip: mean change of a frame in grey levels"),
    )


def _table(findings: Findings, pictures: dict[str, Html]) -> str:
    header = (
        "contact sheet", "video", "verdict", "frames, size, length", "clips", "motion",
        "caption", "from",
    )  # fmt: skip
    rows = []
    for v in findings.manifest["videos"]:
        clips = findings.statistics.get(v["file"], [])
        motion = f"{sum(clip.motion for clip in clips) / len(clips):.2f}" if clips else ""
        verdict = f"rejected: {v['reason']}" if v["reason"] else f"used ({v['split']})"
        rate, size = f"{v['frames']} at {v['fps']:.4g} fps", f"{v['width']}x{v['height']}"
        shape = f"{rate}, {size}, {v['seconds']:.2f} s" if v["frames"] else ""
        picture, caption = pictures.get(v["file"], ""), (v["caption"], v["caption_source"])
        rows.append((picture, v["file"], verdict, shape, v["clips"], motion, *caption))
    table = html.table(rows, header)
    if len(pictures) < MOST_PICTURES:
        return table
    return html.text(f"Pictures are of {MOST_PICTURES} videos, chosen at random.") + table


def _pictures(r: Recipe, videos: list[Source], folder: Path) -> dict[str, Html]:
    """Return the contact sheets of the videos that can be decoded, by video."""
    readable = [source for source in videos if source.info]
    if len(readable) > MOST_PICTURES:
        readable = random.Random(r.seed).sample(readable, MOST_PICTURES)
    pictures = {}
    path = folder / "sheet.jpg"
    pool = ThreadPoolExecutor(max(len(os.sched_getaffinity(0)) // CORES_PER_SHEET, 1))
    try:
        frames = pool.map(_small_frames, readable)
        with console.progress("contact sheets", len(readable), "videos") as bar:
            for source, shown in zip(readable, frames, strict=True):
                if shown is not None:
                    rgb.contact_sheet(shown, COLUMNS, ROWS, CELL).save(path, quality=75)
                    pictures[source.name] = html.media(path)
                bar.advance(source.name)
    finally:
        pool.shutdown(cancel_futures=True)
    return pictures


def _small_frames(source: Source) -> Tensor | None:
    """Return the frames of a video's contact sheet, None if one does not decode."""
    assert source.info
    try:
        return video.read_small(source.path, source.info, COLUMNS * ROWS, CELL)
    except video.VideoError:
        return None


@torch.inference_mode()
def _reconstructions(
    r: Recipe, dataset: Dataset, videos: list[Source], tokenizer: Tokenizer, folder: Path
) -> str:
    """Return the HTML of some clips next to what the tokenizer decodes from their latents."""
    numbered = [(source, clip) for source in videos for clip in source.clips]
    count = min(MOST_CHECKED, max(1, len(numbered) // r.check_every_clips))
    parameter = next(tokenizer.parameters())
    shown, found = [], []
    with console.progress("decode back", count, "clips") as bar:
        for i in sorted(random.Random(r.seed).sample(range(len(numbered)), count)):
            source, clip = numbered[i]
            pixels = video.read_clip(source.path, clip, r.height, r.width, r.resize)
            x0 = read_latent(dataset.latents / source.latent_name(clip)).to(parameter)
            again = rgb.to_uint8(tokenizer.decode(x0[None])[0]).cpu()
            found.append(rgb.psnr(pixels, again))
            path = folder / "check.mp4"
            mp4.write_mp4(path, _side_by_side(pixels, again), clip.fps, CHECK_CRF)
            what = f"{source.name} from frame {clip.start}: PSNR {found[-1]:.1f} dB"
            shown.append(html.media(path, what))
            bar.advance(source.name)
    mean = sum(found) / count
    console.say(
        f"{count} clips decoded back: PSNR {mean:.1f} dB on average, {min(found):.1f} dB at worst"
    )
    note = f"Left: clip; right: reconstruction. {count} of {len(numbered)} clips, chosen at random."
    return html.text(note) + html.row(*shown)


def _side_by_side(left: Tensor, right: Tensor) -> Tensor:
    height = max(2, round(left.shape[2] * CHECK_WIDTH / left.shape[3] / 2) * 2)
    both = [rgb.resize_frames(part, height, CHECK_WIDTH, "stretch") for part in (left, right)]
    return torch.cat(both, dim=3)


def _times(seconds: dict[str, float], device: str) -> str:
    rows = [(phase, console.duration(spent)) for phase, spent in seconds.items()]
    note = (
        "Times of the process that wrote this page; files kept from an earlier run took no time. "
        f"Frames were decoded on the cpu, and resized and encoded on {device}."
    )
    return html.text(note) + html.table(rows)
