"""Every clip that is used equals the clip of the whole file, or its video is named."""

import random
import subprocess

import av
import pytest

from cosmos_cli.model import video
from cosmos_cli.model.video import Clip, VideoError
from cosmos_cli.prep import damage, h264

FRAMES, LENGTH, HEIGHT, WIDTH = 96, 12, 192, 320
CODECS = {
    "h264.mp4": ("-c:v", "libx264", "-g", 24),
    "hevc.mp4": ("-c:v", "libx265", "-x265-params", "log-level=none:keyint=24"),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8, "-g", 24),
}
needs_libde265 = pytest.mark.skipif(not damage.checks_hevc(), reason="needs libde265")
EACH = [
    pytest.param(name, marks=needs_libde265 if "hevc" in name else ()) for name in CODECS
]  # fmt: skip


def ffmpeg(*args):
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, args)], check=True)


@pytest.fixture(scope="module", params=EACH)
def whole(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / request.param
    source = ("-f", "lavfi", "-i", f"testsrc2=s={WIDTH}x{HEIGHT}:r=24", "-frames:v", FRAMES)
    ffmpeg(*source, "-pix_fmt", "yuv420p", *CODECS[request.param], path)
    return path


def clips():
    return [Clip(start, 24, LENGTH) for start in range(0, FRAMES, LENGTH)]


def read(path, clip):
    return video.read_clip(path, clip, HEIGHT, WIDTH, "stretch")


def flip(source, target, seed):
    """A copy of which 1 to 16 bits are flipped anywhere."""
    rng, data = random.Random(f"{source.name} {seed}"), bytearray(source.read_bytes())
    for _ in range(rng.choice([1, 2, 4, 8, 16])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    target.write_bytes(data)
    return target


def used(path):
    """Return the clips that prep uses of a file, none if it is rejected."""
    try:
        video.probe(path)
        return [] if damage.find(path, clips()) else [read(path, clip) for clip in clips()]
    except VideoError:
        return []


def passed_over(whole, folder, seeds):
    """Return the seeds of damage that reaches a used clip without a report."""
    right = used(whole)
    assert len(right) == FRAMES // LENGTH
    wrong = []
    for seed in seeds:
        found = used(flip(whole, folder / f"damaged{whole.suffix}", seed))
        if any((a.int() - b.int()).abs().max() > 1 for a, b in zip(found, right, strict=False)):
            wrong.append(seed)
    return wrong


# Damage of which FFmpeg reports nothing, and libde265 only without repeated parameter sets.
SILENT = {"h264.mp4": (150, 166, 169), "hevc.mp4": (146, 151)}


def test_flipped_bits_are_found_in_four_files_of_each_codec(whole, tmp_path):
    seeds = (*range(4), *SILENT.get(whole.name, ()))
    assert passed_over(whole, tmp_path, seeds) == []


@pytest.mark.slow
def test_flipped_bits_are_found_in_twenty_files_of_each_codec(whole, tmp_path):
    assert passed_over(whole, tmp_path, range(20)) == []


def test_damage_is_named_with_its_times_and_only_where_a_clip_shows_it(tmp_path):
    path = tmp_path / "a.mp4"
    source = ("-f", "lavfi", "-i", f"testsrc2=s={WIDTH}x{HEIGHT}:r=24", "-frames:v", FRAMES)
    ffmpeg(*source, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-g", 24, "-bf", 0, path)
    data = bytearray(path.read_bytes())
    # Of frame 30, behind its header.
    with av.open(str(path)) as file:
        packet = next(p for n, p in enumerate(file.demux(video=0)) if n == 30)
        data[packet.pos + packet.size // 2] ^= 255
    path.write_bytes(data)
    (span,) = damage.find(path, clips())
    assert span == pytest.approx((30 / 24, 48 / 24))
    assert damage.find(path, [Clip(20, 24, 11)]) == [span]
    # Before it, and behind the key frame after it.
    assert damage.find(path, [Clip(18, 24, 12)]) == damage.find(path, [Clip(48, 24, 12)]) == []
    assert damage.find(path, [Clip(47, 24, 12)]) == [span]


def make(path, height, *options, frames=FRAMES):
    """Encode a video and return its sequence parameter set."""
    source = ("-f", "lavfi", "-i", f"testsrc2=s=320x{height}:r=24", "-frames:v", frames)
    ffmpeg(*source, "-pix_fmt", "yuv420p", "-c:v", "libx264", "-level", "4.2", *options, path)
    with av.open(str(path)) as file:
        extradata = file.streams.video[0].codec_context.extradata
    return extradata[8 : 8 + int.from_bytes(extradata[6:8])]


KINDS = ("-profile:v baseline", "-profile:v main", "-pix_fmt yuv420p10le", "-pix_fmt yuv444p")


@pytest.mark.parametrize("kind", KINDS)
def test_a_taller_parameter_set_is_that_of_a_taller_video(tmp_path, kind):
    for height in (192, 240, 1008):
        lower = make(tmp_path / "lower.mp4", height, *kind.split(), frames=1)
        taller = make(tmp_path / "taller.mp4", height + 16, *kind.split(), frames=1)
        assert h264.one_row_taller(lower) == (taller, 20)


@pytest.mark.parametrize("options", [(), ("-profile:v", "baseline"), ("-x264-params", "slices=3")])
def test_a_slice_that_continues_after_its_picture_is_damage(tmp_path, options):
    lower = make(tmp_path / "lower.mp4", 192, *options)
    path = tmp_path / "a.mp4"
    taller = make(path, 208, *options)
    assert damage.find(path, clips()) == []
    data = path.read_bytes()
    assert len(lower) == len(taller) and data.count(taller) == 1
    path.write_bytes(data.replace(taller, lower))
    assert damage.find(path, clips()) != []


X265 = ("-c:v", "libx265", "-x265-params")
WHOLE = {
    "open gop.mp4": ("-c:v", "libx264", "-x264-params", "open-gop=1:keyint=16:bframes=3"),
    "refresh.mkv": ("-c:v", "libx264", "-x264-params", "intra-refresh=1:keyint=16"),
    "cavlc.avi": ("-c:v", "libx264", "-x264-params", "cabac=0:bframes=0:keyint=16"),
    "headers.mkv": ("-c:v", "libx264", "-x264-params", "repeat-headers=1:keyint=16"),
    "ten bit.mp4": ("-c:v", "libx264", "-g", 16, "-pix_fmt", "yuv420p10le"),
    "hevc headers.mp4": (*X265, "log-level=none:repeat-headers=1:keyint=16"),
    "hevc open gop.mp4": (*X265, "log-level=none:open-gop=1:keyint=16:bframes=4"),
    "hevc 444.mkv": (*X265, "log-level=none:keyint=16", "-pix_fmt", "yuv444p"),
    "slices.mp4": ("-c:v", "libx264", "-x264-params", "slices=4:interlaced=1:keyint=16"),
    "mpeg4.mp4": ("-c:v", "mpeg4", "-bf", 2, "-g", 16),
    "vp8.webm": ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", 8, "-g", 16),
    "av1.mp4": ("-c:v", "libsvtav1", "-preset", 12, "-g", 16),
    "frames.avi": ("-c:v", "mjpeg", "-pix_fmt", "yuvj420p"),
    "prores.mov": ("-c:v", "prores_ks", "-pix_fmt", "yuv422p10le"),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_an_undamaged_file_passes_wherever_its_clip_starts(tmp_path, name):
    path = tmp_path / name
    source = ("-f", "lavfi", "-i", "testsrc2=s=160x96:r=24", "-frames:v", 60, "-pix_fmt", "yuv420p")
    ffmpeg(*source, *WHOLE[name], path)
    for start in (0, 15, 16, 17, 33, 48):
        assert damage.find(path, [Clip(start, 24, 12)]) == []
