"""How prep behaves on much data: memory and time of many videos, speed of decoding.

    python tests/bench/bench_prep.py many [--videos 250,1000]     many small videos on the CPU
    python tests/bench/bench_prep.py decode [--threads 2]         beside the ffmpeg command line

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


def report(**figures):
    print(json.dumps({k: round(v, 3) for k, v in figures.items()}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("many", "decode"))
    parser.add_argument("--videos", default="250,1000")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.what == "many":
        many([int(count) for count in options.videos.split(",")])
    else:
        decode(options.threads)
