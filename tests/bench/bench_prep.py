"""How prep behaves on much data: memory and time of many videos, speed of decoding and encoding.

    python tests/bench/bench_prep.py many [--videos 250,1000]     many small videos on the CPU
    python tests/bench/bench_prep.py decode [--threads 2]         compared with ffmpeg
    python tests/bench/bench_prep.py check [--file a.mp4]         the second decoder, per codec
    python tests/bench/bench_prep.py latents [--model tiny]       compared with diffusers
    python tests/bench/bench_prep.py text [--model tiny]          compared with transformers

Weights are random. Prints one JSON object for each measurement.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from common import SHIPPED, T5_11B, peak_gib, synchronize
from diffusers import AutoencoderKLCosmos
from torch.profiler import ProfilerActivity
from transformers import T5Config, T5EncoderModel

from cosmos_cli import paths
from cosmos_cli.gpus import best_device
from cosmos_cli.model import text as model_text
from cosmos_cli.model import tokenizer as module
from cosmos_cli.model import video
from cosmos_cli.prep import damage
from cosmos_cli.recipe import loading

SOURCE = "testsrc2=s=1280x720:r=24"
PROMPT = "A video of a teal robot that pours coffee in a bright kitchen. "


def ffmpeg(*args):
    subprocess.run(["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, args)], check=True)


def many(counts):
    """Whole runs of prep on `counts` videos with a caption each: seconds, peak memory."""
    for count in counts:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as root:
            videos = Path(root) / "datasets" / "tiny" / "videos"
            videos.mkdir(parents=True)
            small = videos / "00000.mp4"
            ffmpeg("-f", "lavfi", "-i", "testsrc2=s=96x64:r=16", "-frames:v", 9, small)
            for i in range(count):
                path = videos / f"{i:05d}.mp4"
                if i:
                    path.write_bytes(small.read_bytes())
                path.with_suffix(".txt").write_text(f"Take {i} of a test picture.")
            sizes = ("num_frames=9", "height=64", "width=96", "min_free_disk_gb=1")
            words = [word for pair in sizes for word in ("--set", pair)]
            command = [sys.executable, "-m", "cosmos_cli", "prep", "tiny", *words]
            started = time.monotonic()
            process = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL)
            # Of this child alone; RUSAGE_CHILDREN would keep the largest of all.
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, status
            report(
                videos=count,
                seconds=time.monotonic() - started,
                peak_gib=usage.ru_maxrss / 2**20,
            )


def decode(threads, repeats=5):
    """Frames per second of decoding and resizing 121 frames of 1280x720 to 704x1280."""
    # FFmpeg's threads and PyTorch's are told apart by their owners; the process is bound to cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as root:
        path = Path(root) / "a.mp4"
        ffmpeg("-f", "lavfi", "-i", SOURCE, "-vf", "noise=alls=8:allf=t", "-frames:v", 121, path)
        scaled = ("-vf", "scale=1280:704:flags=bilinear", "-pix_fmt", "rgb24", "-f", "rawvideo")
        ours, theirs = [], []
        for _ in range(repeats):
            started = time.monotonic()
            video.read_clip(path, video.Clip(0, 24, 121), 704, 1280, "stretch")
            ours.append(121 / (time.monotonic() - started))
            started = time.monotonic()
            ffmpeg("-threads", threads, "-i", path, *scaled, os.devnull)
            theirs.append(121 / (time.monotonic() - started))
    report(
        threads=threads,
        ours_frames_per_second=max(ours),
        ffmpeg_frames_per_second=max(theirs),
        ratio=max(ours) / max(theirs),
    )


ENCODERS = {
    "h264": ("libx264",),
    "hevc": ("libx265", "-x265-params", "log-level=0"),
    "vp9": ("libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8"),
}


def check(source, rounds=3):
    """Seconds to read 121 frames of 1280x720, and to look for damage in them, for each codec."""
    clip, device = video.Clip(0, 24, 121), best_device()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as root:
        for codec, encoder in ENCODERS.items():
            path = Path(root) / f"{codec}.mp4"
            given = ("-i", source) if source else ("-f", "lavfi", "-i", SOURCE)
            ffmpeg(*given, "-frames:v", 121, "-c:v", *encoder, path)
            runs = {
                "read": partial(video.read_clip, path, clip, 704, 1280, "crop", device),
                "check": partial(damage.find, path, [clip]),
            }
            seconds = {name: fastest(run, rounds, device) for name, run in runs.items()}
            report(part="check", codec=codec, **seconds)


def latents(model, rounds=3):
    """Seconds of the tokenizer on one clip of the model's own size, by ours and by diffusers'."""
    device = best_device()
    r = loading.load(*SHIPPED[model]).recipe
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tok, size = r.spec.tokenizer, (r.num_frames, r.height, r.width)
    with torch.device(device):
        ours = module.Tokenizer(tok, r.spec.sigma_data).to(dtype).eval()
        widths = [tok.channels * times for times in (1, *tok.multipliers)]
        theirs = AutoencoderKLCosmos(
            latent_channels=tok.latent_channels,
            encoder_block_out_channels=widths,
            decode_block_out_channels=[*widths[1:], widths[-1]],
            num_layers=tok.res_blocks,
            patch_size=tok.patch,
        )
        theirs = theirs.to(device, dtype).eval()
        pixels = torch.rand(1, 3, *size, dtype=dtype) * 2 - 1
        x0 = torch.randn(1, *r.spec.latent_shape(*size), dtype=dtype)

    def measure(name, **runs):
        for verb, run in runs.items():
            with row(part="latents", who=name, verb=verb, size=size) as figures:
                seconds = fastest(run, rounds, device)
                figures |= {"seconds": seconds, "frames_per_second": size[0] / seconds}
                figures |= {"peak_gib": peak_gib(device)}

    def encode():
        return ours.encode(pixels)

    def decode():
        return ours.decode(x0)

    with torch.inference_mode():
        measure("ours", encode=encode, decode=decode)
        measure(
            "diffusers",
            encode=lambda: theirs.encode(pixels),
            decode=lambda: theirs.decode(x0),
        )
        theirs.cpu()
        profile("encode", encode, device)
        profile("decode", decode, device)
        # What prep does for a dataset of many clips.
        ours.compile_blocks()
        measure("ours, blocks compiled", encode=encode)


def text(model, rounds=3):
    """Prompts and real tokens per second of T5's encoder: long and short captions."""
    device = best_device()
    spec, folder = loading.load(*SHIPPED[model]).recipe.spec.text, paths.EMBEDDED_DIR / "t5"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    encoder = model_text.TextEncoder(folder, spec, device, dtype)
    if model == "7b":
        with torch.device(device):
            config = T5Config(**T5_11B)
            encoder.encoder = T5EncoderModel(config).to(dtype).eval()
    count, limit = (16, 256) if device != "cpu" else (2, 16)
    long, short = [PROMPT * 60] * count, [PROMPT] * limit
    mixed = [" ".join((PROMPT * 4).split()[: 4 + i % 30]) for i in range(limit)]

    def measure(name, run=None, **captions):
        for kind, given in captions.items():
            with row(part="text", who=name, captions=f"{len(given)} {kind}") as figures:
                seconds = fastest(lambda: (run or encoder.encode)(given), rounds, device)  # noqa: B023
                real = sum(map(len, encoder.tokenizer(given, **cut).input_ids))
                figures |= {"seconds": seconds, "prompts_per_second": len(given) / seconds}
                figures |= {"tokens_per_second": real / seconds, "peak_gib": peak_gib(device)}

    cut = {"truncation": True, "max_length": spec.tokens}
    measure("tokenizing alone", lambda g: encoder.tokenizer(g, **cut), long=long, short=short)
    measure("ours", long=long, short=short, mixed=mixed, one=long[:1])
    profile("T5, long", lambda: encoder.encode(long), device)
    profile("T5, short", lambda: encoder.encode(short), device)
    judged = mixed[:8] + long[:1]
    found = {"ours": encoder.encode(judged)}

    def by_transformers(captions):
        given = encoder.tokenizer(captions, padding="longest", return_tensors="pt", **cut)
        with torch.inference_mode():
            out = encoder.encoder(**given.to(device)).last_hidden_state
        lengths = given.attention_mask.sum(dim=1).tolist()
        return [row[:n].float().cpu() for row, n in zip(out, lengths, strict=True)]

    encoder.encoder.set_attn_implementation("eager")
    measure("transformers, eager", by_transformers, long=long, short=short)
    found["transformers"] = by_transformers(judged)
    encoder.encoder = encoder.encoder.float()
    one_by_one = lambda captions: [by_transformers([c]) for c in captions]  # noqa: E731
    measure("transformers, fp32, one at a time", one_by_one, long=long[:4])
    exact = torch.cat([x for (x,) in one_by_one(judged)])
    for name, rows in found.items():
        error = (torch.cat(rows).float() - exact).norm() / exact.norm()
        report(part="text", who=name, error_beside_fp32=f"{error.item():.2e}")


@contextmanager
def row(**about):
    """Reports what is put into it, or what went wrong: one variant must not end the others."""
    figures = {}
    try:
        yield figures
    except Exception as error:  # noqa: BLE001
        figures["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    report(**about, **figures)


def profile(name, run, device):
    """Prints where the time of one run goes."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with row(part="profile", who=name), torch.inference_mode():
        with torch.profiler.profile(activities=kinds) as seen:
            run()
            synchronize(device)
        order = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
        print(seen.key_averages().table(sort_by=order, row_limit=14, max_name_column_width=70))


def fastest(run, rounds, device):
    """The least seconds of some runs, after one to warm up."""
    found = []
    for _ in range(rounds + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found[1:])


def report(**figures):
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("many", "decode", "check", "latents", "text"))
    parser.add_argument("--model", choices=sorted(SHIPPED), default="7b")
    parser.add_argument("--videos", default="250,1000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--file", help="a video of at least 121 frames of 1280x720")
    options = parser.parse_args()
    if options.what == "many":
        many([int(count) for count in options.videos.split(",")])
    elif options.what == "decode":
        decode(options.threads)
    elif options.what == "check":
        check(options.file)
    else:
        {"latents": latents, "text": text}[options.what](options.model)
