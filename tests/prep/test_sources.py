"""A folder of all kinds of files: every file gets its verdict, every frame is the right one."""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch

from cosmos_cli.model import video
from cosmos_cli.model.video import VideoInfo
from cosmos_cli.prep import sources
from cosmos_cli.recipe.keys import Recipe
from tests.helpers.command import Cosmos

pytestmark = pytest.mark.workflow

RECIPE = ("num_frames=9", "height=64", "width=96", "fps_policy=keep", "prompt=A test picture.")


def ffmpeg(*args):
    command = ["ffmpeg", "-v", "error", "-nostdin", "-y", *map(str, args)]
    subprocess.run(command, check=True)


def make(path, *, size="96x64", rate=24, frames=12, codec=("-c:v", "libx264"), more=(), then=""):
    picture = ("-f", "lavfi", "-i", f"testsrc2=s={size}:r={rate}{then}")
    ffmpeg(*picture, *more, "-frames:v", frames, "-pix_fmt", "yuv420p", *codec, path)


ANY_SIZE = ("-c:v", "libx264", "-pix_fmt", "yuv444p")

GOOD = {
    "plain.mp4": {},
    "rate 1.mp4": {"rate": 1},
    "rate 240.mp4": {"rate": 240},
    "rate ntsc.mp4": {"rate": "30000/1001"},
    "size 1x1.mp4": {"then": ",scale=1:1", "codec": ("-c:v", "libx264rgb", "-pix_fmt", "rgb24")},
    "size 33x17.mp4": {"then": ",scale=33:17", "codec": ANY_SIZE},
    "size 16x2000.mp4": {"size": "16x2000"},
    "size 8k.mp4": {"size": "7680x4320", "frames": 9, "codec": ("-preset", "ultrafast")},
    "with sound.mp4": {"more": ("-f", "lavfi", "-i", "sine=d=0.5")},
    "b-frames.mp4": {"frames": 40, "codec": ("-c:v", "libx264", "-bf", 3, "-g", 10)},
    "open gop.mp4": {"frames": 40, "codec": ("-x264-params", "open-gop=1:keyint=8")},
    "all intra.mp4": {"codec": ("-c:v", "libx264", "-g", 1)},
    "interlaced.mp4": {"codec": ("-c:v", "libx264", "-flags", "+ilme+ildct")},
    "fragmented.mp4": {"codec": ("-c:v", "libx264", "-movflags", "frag_keyframe+empty_moov")},
    "full range.mp4": {"codec": ("-c:v", "libx264", "-pix_fmt", "yuvj420p")},
    "10 bit.mp4": {"codec": ("-c:v", "libx264", "-pix_fmt", "yuv420p10le")},
    "hdr.mp4": {
        "codec": (
            "-c:v", "libx265", "-x265-params", "log-level=none", "-pix_fmt", "yuv420p10le",
            "-color_primaries", "bt2020", "-color_trc", "smpte2084", "-colorspace", "bt2020nc",
        )
    },
    "bt709.mp4": {"codec": ("-c:v", "libx264", "-colorspace", "bt709", "-color_range", "tv")},
    "hevc.mkv": {"codec": ("-c:v", "libx265", "-x265-params", "log-level=none")},
    "vp9.webm": {"codec": ("-c:v", "libvpx-vp9", "-deadline", "realtime")},
    "av1.mp4": {"codec": ("-c:v", "libsvtav1", "-preset", 12)},
    "mpeg4.avi": {"codec": ("-c:v", "mpeg4")},
    "prores.mov": {"codec": ("-c:v", "prores_ks", "-pix_fmt", "yuv422p10le")},
    "gray.mp4": {"codec": ("-c:v", "libx264", "-pix_fmt", "gray")},
    "UPPER.MP4": {"codec": ("-c:v", "libx264", "-f", "mp4")},
    "späce 'quote\" $(x) 日本.mp4": {},
    "-dash.mp4": {},
    "new\nline.mp4": {},
    "half.mp4": {"frames": 9},
    "12 bit.mkv": {"codec": ("-c:v", "ffv1", "-pix_fmt", "yuv444p12le")},
    "late.mkv": {"codec": ("-c:v", "libx264", "-output_ts_offset", 100)},
    "squeezed.mp4": {"codec": ("-c:v", "libx264", "-aspect", "16:9")},
    "clear.webm": {"codec": ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p")},
    "see-through.mov": {"codec": ("-c:v", "png", "-pix_fmt", "rgba")},
    "uncompressed.avi": {"codec": ("-c:v", "rawvideo", "-pix_fmt", "bgr24")},
    "animated.gif": {"codec": ("-c:v", "gif", "-pix_fmt", "rgb8")},
    "theora.ogv": {"codec": ("-c:v", "libtheora")},
    "flash.flv": {"codec": ("-c:v", "flv")},
    "windows.wmv": {"codec": ("-c:v", "wmv2")},
    "phone.3gp": {"size": "176x144", "rate": "30000/1001", "codec": ("-c:v", "h263")},
    "broadcast.mxf": {"rate": 25, "codec": ("-c:v", "mpeg2video", "-pix_fmt", "yuv422p")},
    "silent track.mp4": {
        "more": ("-f", "lavfi", "-i", "sine=d=1"), "codec": ("-c:v", "libx264", "-frames:a", 0)
    },
}  # fmt: skip

LONG = "長" * 80 + ".mp4"
NOT_UTF8 = os.fsdecode(b"\xff.mp4")
# What a program of MPEG's or a broadcast is kept in.
STREAMS = ("transport.ts", "program.mpg", "disc.m2ts")

BAD = {
    LONG: "its name is 4 bytes too long",
    NOT_UTF8: "its path is not UTF-8",
    **dict.fromkeys(STREAMS, "an MPEG stream has no index"),
    "audio only.mp4": "no video stream",
    "behind a lock.mp4": "cannot be read: Permission denied",
    "changes size.mp4": "its frames change from 96x64 to 160x96 at ",
    "cut.mkv": "truncated: only ",
    "device.mp4": "not a file",
    "loop.mp4": "cannot be read: Too many levels of symbolic links",
    "song.mp4": "no video stream but a picture",
    "unreadable.mp4": "cannot be read: Permission denied",
    "cut in the index.mp4": "truncated: the index of the mp4 is missing",
    "cut in the frames.mp4": "truncated: ",
    "cut at the end.mp4": "truncated: ",
    "damaged.mp4": "damaged from 0.",
    "directory.mp4": "not a file",
    "dangling link.mp4": "no such file",
    "empty.mp4": "the file is empty",
    "fifo.mp4": "not a file",
    "noise.mp4": "not a video",
    "one frame.mp4": "too short: 1 frames at 24 fps, 9 are needed",
    "picture.mp4": "too short: 1 frames",
    "plain.mp4": "shares its name with plain.mov",
    "text.mp4": "not a video",
    "zeros.mp4": "not a video",
}


def turn(source, target):
    """A copy of an mp4 that says it is to be shown a quarter turn clockwise."""
    data = bytearray(source.read_bytes())
    # The matrix of the track header in 16.16 fixed point, its last number in 2.30.
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    target.write_bytes(data)


def write_special(folder):
    """Names that are no files of their own, and files that need another program first."""
    (folder / "device.mp4").symlink_to("/dev/zero")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    for name in (LONG, NOT_UTF8):
        shutil.copy(folder / "plain.mp4", folder / name)
    shutil.copy(folder / "plain.mov", folder / "unreadable.mp4")
    (folder / "unreadable.mp4").chmod(0)
    locked = folder.parent / "locked"
    locked.mkdir()
    (folder / "behind a lock.mp4").symlink_to(locked / "any.mp4")
    locked.chmod(0)
    for name in STREAMS:
        codec = "mpeg2video" if name == "program.mpg" else "libx264"
        make(folder / name, codec=("-c:v", codec, "-bf", 2))
    parts = [folder.parent / "small.ts", folder.parent / "large.ts"]
    for part, size in zip(parts, ("96x64", "160x96"), strict=True):
        make(part, size=size)
    joined = "concat:" + "|".join(map(str, parts))
    ffmpeg("-i", joined, "-c", "copy", folder / "changes size.mp4")
    (folder / "below").mkdir()
    shutil.copy(folder / "plain.mp4", folder / "below" / "inner.mp4")


def write_bad(folder):
    """Files that are no videos, or not whole ones; always the same bytes."""
    rng = random.Random(0)
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.5", folder / "audio only.mp4")
    make(folder / "whole.mp4", frames=60)
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "cut in the index.mp4").write_bytes(whole[:-200])
    fast = folder / "fast.mp4"
    ffmpeg("-i", folder / "whole.mp4", "-c", "copy", "-movflags", "+faststart", fast)
    data = fast.read_bytes()
    (folder / "cut in the frames.mp4").write_bytes(data[: len(data) * 6 // 10])
    (folder / "cut at the end.mp4").write_bytes(data[:-10])
    start = len(data) // 3
    (folder / "damaged.mp4").write_bytes(data[:start] + rng.randbytes(4000) + data[start + 4000 :])
    # An edit list hides what stands before the cut.
    ffmpeg("-ss", 1, "-i", folder / "whole.mp4", "-c", "copy", folder / "cut before.mp4")
    make(folder / "cut.mkv", frames=60)
    os.truncate(folder / "cut.mkv", (folder / "cut.mkv").stat().st_size * 2 // 3)
    cover = ("-map", 0, "-map", "1:v", "-c:v", "mjpeg", "-frames:v", 1)
    ffmpeg(
        *("-f", "lavfi", "-i", "sine=d=0.5", "-i", folder / "whole.mp4", *cover),
        *("-pix_fmt", "yuvj420p", "-disposition:v", "attached_pic", folder / "song.mp4"),
    )
    for path in (fast, folder / "whole.mp4"):
        path.unlink()
    (folder / "directory.mp4").mkdir()
    (folder / "dangling link.mp4").symlink_to("nowhere.mp4")
    (folder / "empty.mp4").touch()
    os.mkfifo(folder / "fifo.mp4")
    (folder / "noise.mp4").write_bytes(rng.randbytes(20_000))
    make(folder / "one frame.mp4", frames=1)
    ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=s=96x64", "-frames:v", 1, "-f", "image2", folder / "p.png"
    )
    (folder / "p.png").rename(folder / "picture.mp4")
    (folder / "text.mp4").write_text("These are words.\n" * 100)
    (folder / "zeros.mp4").write_bytes(bytes(20_000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("torture")
    videos = root / "datasets" / "tiny" / "videos"
    videos.mkdir(parents=True)
    for name, how in GOOD.items():
        make(videos / name, **how)
    make(videos / "plain.mov")
    # A rate that changes on the way, a picture that lies on its side, one file under three names.
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=s=96x64:r=30", "-frames:v", 30, "-fps_mode", "vfr"),
        *("-vf", "select='lt(n,20)+not(mod(n,3))'", videos / "variable rate.mp4"),
    )
    turn(videos / "half.mp4", videos / "turned.mp4")
    shutil.copy(videos / "plain.mp4", videos / "copy.mp4")
    (videos / "link.mp4").symlink_to("plain.mp4")
    # The suffix says mp4, the content is Matroska.
    make(root / "a.mkv")
    (root / "a.mkv").rename(videos / "matroska.mp4")
    write_bad(videos)
    write_special(videos)
    return root


def independent_frames(path, height, width):
    """All frames as FFmpeg's own program decodes them, uint8 CTHW."""
    command = (
        *("ffmpeg", "-v", "error", "-nostdin", "-i", path, "-map", "0:v:0"),
        *("-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
    )
    data = subprocess.run(command, check=True, capture_output=True).stdout
    frames = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return frames.reshape(-1, height, width, 3).permute(3, 0, 1, 2)


def test_every_file_gets_the_right_verdict(folder):
    words = [word for pair in RECIPE for word in ("--set", pair)]
    command = [sys.executable, "-m", "cosmos_cli", "prep", "tiny", "--json", *words]
    if os.geteuid() == 0:
        # Files that may not be read are readable to root, unless it gives up that right.
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = subprocess.run(
        command,
        cwd=folder,
        env=Cosmos(folder).environment(),
        capture_output=True,
        check=True,
        timeout=300,
    )
    videos = folder / "datasets" / "tiny" / "videos"
    found = {row["file"]: row["reason"] for row in json.loads(done.stdout)["videos"]}
    wrong = {
        name: found[name]
        for name in found
        if not (found[name].startswith(BAD[name]) if name in BAD else found[name] == "")
    }
    assert wrong == {}
    files = {path.name for path in videos.iterdir() if path.name != "below"}
    assert found.keys() == files | {"below__inner.mp4"}
    assert len(found) >= 60
    assert b"1 video is HDR (PQ or HLG)" in done.stderr and b"converts hdr.mp4" in done.stderr
    assert b"1 video is marked as interlaced" in done.stderr
    # A name that is no UTF-8 stands in the page as it is.
    page = (folder / "datasets" / "tiny" / "report.html").read_text(errors="replace")
    assert re.search(r">link\.mp4: has the same bytes as \S+<", page)
    assert re.search(r">hevc\.mkv: looks like \S+<", page)


def test_every_frame_is_what_an_independent_decoder_shows(folder):
    videos = folder / "datasets" / "tiny" / "videos"
    compared = 0
    for path in sorted(videos.glob("*.*")):
        # 8K is compared frame by frame in the decoder's own time; here it would be minutes.
        if path.name in BAD or path.name == "size 8k.mp4" or not os.access(path, os.R_OK):
            continue
        frames = video.read_frames(path, range(video.probe(path).frames))
        # Not the size as shown: the phone's pixels are no squares.
        assert torch.equal(frames, independent_frames(path, *frames.shape[-2:])), path.name
        compared += 1
    assert compared >= 40


def test_a_table_of_many_videos_shows_the_rejected_ones_and_counts_the_others():
    facts = {"frames": 9, "fps": 24, "width": 96, "height": 64, "clips": 1}
    rows = [
        {"file": f"{n}.mp4", "verdict": "rejected" if n == 70 else "used", "reason": "",
         "caption": "\x1b[31mred", **facts}
        for n in range(80)
    ]  # fmt: skip
    _, first, *_, last = sources.verdict_table(rows).splitlines()
    assert first.startswith("70.mp4")
    assert "96x64" in first
    assert last == "... and 30 more"
    assert "\x1b" not in first


def test_small_videos_are_enlarged_with_a_warning_that_names_another_recipe(tmp_path):
    r = Recipe(model="Cosmos-Predict1-7B-Text2World", dataset_dir=str(tmp_path), name="robots")
    small = sources.Source(
        "a", tmp_path / "a.mp4", info=VideoInfo(150, 24.0, 240, 320, 6.0, "h264")
    )
    (line,) = sources.remarks(r, [small])
    assert line.startswith("1 video is enlarged to 1280x704, most from 320x240")
    assert f"`cosmos recipes new robots_small --videos {tmp_path / 'videos'}`" in line
    assert sources.remarks(r.model_copy(update={"height": 240, "width": 320}), [small]) == []
