"""How prep behaves on much data: memory and time of many videos, speed of decoding and encoding.

    python tests/bench/bench_prep.py many [--videos 250,1000]     many small videos on the CPU
    python tests/bench/bench_prep.py decode [--threads 2]         beside the ffmpeg command line
    python tests/bench/bench_prep.py latents [--model tiny]       beside diffusers, random weights
    python tests/bench/bench_prep.py text [--model tiny]          kinds of attention, batches, and
                                                                  one prompt at a time in fp32

Prints one JSON object for each measurement.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = "testsrc2=s=1280x720:r=24"
MODELS = {"7b": ("nemo_assets", ["height=704"]), "tiny": ("tiny", [])}
PROMPT = "A video of a teal robot that pours coffee in a bright kitchen. "
# google-t5/t5-11b, of which the encoder is built.
T5_11B = {
    "vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24,
    "num_heads": 128,
}  # fmt: skip


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
    import torch

    from cosmos_cli.model import video

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


def latents(model, rounds=5):
    """Frames per second of the tokenizer's encoder on one clip of the model's own size."""
    import torch
    from diffusers import AutoencoderKLCosmos

    from cosmos_cli import recipe
    from cosmos_cli.model.device import best_device
    from cosmos_cli.model.tokenizer import Tokenizer

    device = best_device()
    r = recipe.load(*MODELS[model]).recipe
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tok, size = r.spec.tokenizer, (r.num_frames, r.height, r.width)
    with torch.device(device):
        ours = Tokenizer(tok, r.spec.sigma_data).to(dtype).eval()
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
    rows = {"ours": lambda: ours.encode(pixels), "diffusers": lambda: theirs.encode(pixels)}
    with torch.inference_mode():
        for name, run in rows.items():
            seconds = fastest(run, rounds, device)
            report(part="latents", who=name, size=size, frames_per_second=size[0] / seconds)


def text(model, rounds=3):
    """Prompts and real tokens per second of T5's encoder: long and short captions."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from cosmos_cli import layout, recipe
    from cosmos_cli.model import text as model_text
    from cosmos_cli.model.device import best_device

    device = best_device()
    spec, folder = recipe.load(*MODELS[model]).recipe.spec.text, layout.EMBEDDED_DIR / "t5"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    encoder = model_text.TextEncoder(folder, spec, device, dtype)
    if model == "7b":
        with torch.device(device):
            config = T5Config(**T5_11B, pad_token_id=0, eos_token_id=1)
            encoder.encoder = T5EncoderModel(config).to(dtype).eval()
    long, short = PROMPT * 60, PROMPT

    def measure(name, captions):
        real = sum(len(e) for e in encoder.encode(captions))
        seconds = fastest(lambda: encoder.encode(captions), rounds, device)
        rate, tokens = len(captions) / seconds, real / seconds
        report(part="text", who=name, prompts_per_second=rate, tokens_per_second=tokens)

    for attention in ("sdpa", "eager"):
        encoder.encoder.set_attn_implementation(attention)
        for count in (1, 16):
            measure(f"{attention}, {count} x {spec.tokens} tokens", [long] * count)
    measure("eager, 256 short captions", [short] * 256)
    blocks = encoder.encoder.encoder.block
    for attention in ("eager", "sdpa"):
        encoder.encoder.set_attn_implementation(attention)
        for block in blocks:
            block.compile()
        measure(f"{attention}, blocks compiled, 16 x {spec.tokens} tokens", [long] * 16)
    encoder.encoder = encoder.encoder.float()
    one = encoder.encode
    encoder.encode = lambda captions: [one([caption])[0] for caption in captions]
    measure(f"fp32, one at a time, 4 x {spec.tokens} tokens", [long] * 4)


def fastest(run, rounds, device):
    """The least seconds of some runs, after one to warm up."""
    import torch

    found = []
    for _ in range(rounds + 1):
        if device != "cpu":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])


def report(**figures):
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("many", "decode", "latents", "text"))
    parser.add_argument("--model", choices=sorted(MODELS), default="7b")
    parser.add_argument("--videos", default="250,1000")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.what == "many":
        many([int(count) for count in options.videos.split(",")])
    elif options.what == "decode":
        decode(options.threads)
    else:
        {"latents": latents, "text": text}[options.what](options.model)
