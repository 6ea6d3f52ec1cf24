"""The frames of a clip are those of its numbers, however the file was encoded or is sought in."""

import random
import subprocess

import pytest
import torch

from cosmos_cli.model import containers, video
from cosmos_cli.model.video import Clip, VideoError

FRAMES, FPS, HEIGHT, WIDTH = 150, 24, 96, 160
# A number is 12 black and white squares in two rows.
SQUARE, COLUMNS = 24, 6

X264 = ("-c:v", "libx264", "-preset", "fast")


def x264(parameters):
    return (*X264, "-x264-params", parameters)


def x265(parameters):
    return ("-c:v", "libx265", "-x265-params", f"log-level=none:{parameters}")


AV1_OPEN = ("-c:v", "libsvtav1", "-preset", 10, "-g", 32, "-svtav1-params", "irefresh-type=1")
VARIABLE = ("-vf", "select='lt(n,50)+not(mod(n,3))'", "-fps_mode", "vfr")

ENCODINGS = {
    "refresh 20.mp4": x264("intra-refresh=1:keyint=20"),
    "refresh 40.mp4": x264("intra-refresh=1:keyint=40"),
    "refresh 71.mp4": x264("intra-refresh=1:keyint=71:bframes=0"),
    "refresh 20.mkv": x264("intra-refresh=1:keyint=20:ref=1"),
    "refresh 40.mkv": x264("intra-refresh=1:keyint=40"),
    "refresh 71.mkv": x264("intra-refresh=1:keyint=71"),
    "refresh 33.mov": x264("intra-refresh=1:keyint=33"),
    "refresh fragments.mp4": (*x264("intra-refresh=1:keyint=30"), "-movflags", "frag_keyframe"),
    "refresh.flv": x264("intra-refresh=1:keyint=40"),
    "hevc open.mp4": x265("keyint=20:min-keyint=20:open-gop=1:bframes=4"),
    "hevc open.mkv": x265("keyint=25:open-gop=1:bframes=8:b-pyramid=1"),
    "hevc refresh.mp4": x265("intra-refresh=1:keyint=40"),
    "av1 open.mp4": AV1_OPEN,
    "av1 open.mkv": AV1_OPEN,
    "h264 open.mp4": x264("open-gop=1:keyint=20:bframes=3"),
    "variable.mp4": (*VARIABLE, *x264("keyint=20")),
    "variable refresh.mkv": (*VARIABLE, *x264("intra-refresh=1:keyint=30")),
    "negative.mkv": (*x264("keyint=20:bframes=3"), "-output_ts_offset", -0.5),
    "negative.mp4": (*x264("keyint=20:bframes=3"), "-movflags", "negative_cts_offsets"),
    "late.mp4": (*x264("keyint=20"), "-output_ts_offset", 3),
    "mpeg4.mp4": ("-c:v", "mpeg4", "-q:v", 3, "-bf", 2, "-g", 20),
    "mpeg4.avi": ("-c:v", "mpeg4", "-q:v", 3, "-bf", 2, "-g", 20),
    "mpeg4 without b.avi": ("-c:v", "mpeg4", "-q:v", 3, "-bf", 0, "-g", 20),
    "vp9.webm": ("-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", 8, "-g", 20),
    "vp8.webm": ("-c:v", "libvpx", "-deadline", "realtime", "-cpu-used", 8, "-b:v", "1M"),
}  # fmt: skip
# Those of the smaller count: a kind each.
SOME = (
    "refresh 40.mp4", "refresh 71.mkv", "hevc open.mp4", "variable refresh.mkv", "mpeg4.avi",
    "negative.mp4",
)  # fmt: skip
# An AVI says nothing about the order of B-frames.
REFUSED = {"mpeg4.avi": "has no time stamps"}


def numbered(frames=FRAMES):
    """Frames (T, H, W) of a drifting texture with their numbers in black and white squares."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 1, 30, 60, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, (HEIGHT, 3 * WIDTH), mode="bilinear")[0, 0]
    texture = (texture * 255).byte()
    out = torch.stack([texture[:, 2 * n : 2 * n + WIDTH] for n in range(frames)])
    for n in range(frames):
        for bit in range(2 * COLUMNS):
            row, column = divmod(bit, COLUMNS)
            top, left = 4 + 48 * row, 6 + 25 * column
            out[n, top : top + SQUARE, left : left + SQUARE] = 255 * (n >> bit & 1)
    return out


def numbers(frames):
    """The numbers in uint8 frames (3, T, HEIGHT, WIDTH)."""
    grey, found = frames.float().mean(0), torch.zeros(frames.shape[1], dtype=torch.long)
    for bit in range(2 * COLUMNS):
        row, column = divmod(bit, COLUMNS)
        top, left = 4 + 48 * row, 6 + 25 * column
        square = grey[:, top + 6 : top + SQUARE - 6, left + 6 : left + SQUARE - 6]
        found += (square.mean((1, 2)) > 128).long() << bit
    return found.tolist()


def encode(path, options):
    raw = ("-f", "rawvideo", "-pix_fmt", "gray", "-s", f"{WIDTH}x{HEIGHT}", "-r", FPS, "-i", "-")
    pixels = ("-pix_fmt", "yuv420p")
    command = ["ffmpeg", "-v", "error", "-y", *raw, *pixels, *options, path]
    data = numbered().numpy().tobytes()
    subprocess.run([str(word) for word in command], input=data, check=True, capture_output=True)
    return path


def in_order(path):
    """All frames as FFmpeg's own program decodes them from the start, uint8 (3, T, H, W)."""
    command = (
        *("ffmpeg", "-v", "error", "-nostdin", "-i", path, "-map", "0:v:0"),
        *("-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"),
    )
    data = subprocess.run(command, check=True, capture_output=True).stdout
    frames = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return frames.reshape(-1, HEIGHT, WIDTH, 3).permute(3, 0, 1, 2)


def clips(count, seed, length=9):
    """Clips at both ends and at random in between, in no order."""
    rng = random.Random(seed)
    starts = [0, count - length, *(rng.randrange(count - length) for _ in range(10))]
    rng.shuffle(starts)
    return [Clip(start, FPS, length) for start in starts]


def require_right_frames(path):
    """Every clip shows the frames of its numbers; returns how many there are."""
    whole = in_order(path)
    shown = numbers(whole)
    assert len(set(shown)) == len(shown) >= 70
    info = video.probe(path)
    assert info.frames == len(shown)
    for clip in clips(info.frames, path.name):
        frames = video.read_clip(path, clip, HEIGHT, WIDTH, "stretch")
        wanted = slice(clip.start, clip.start + len(clip))
        assert numbers(frames) == shown[wanted], clip
        assert torch.equal(frames, whole[:, wanted]), clip
    return len(shown)


def require_right_frames_or_refusal(path):
    if path.name in REFUSED:
        with pytest.raises(VideoError, match=REFUSED[path.name]):
            video.probe(path)
    else:
        require_right_frames(path)


@pytest.mark.parametrize("name", SOME)
def test_clips_hold_the_frames_of_their_numbers(tmp_path, name):
    require_right_frames_or_refusal(encode(tmp_path / name, ENCODINGS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENCODINGS if name not in SOME])
def test_clips_of_every_encoding_hold_the_frames_of_their_numbers(tmp_path, name):
    require_right_frames_or_refusal(encode(tmp_path / name, ENCODINGS[name]))


def copy(source, target, *options, before=()):
    command = ["ffmpeg", "-v", "error", "-y", *before, "-i", source, "-c", "copy", *options, target]
    subprocess.run([str(word) for word in command], check=True)
    return target


@pytest.mark.parametrize("options", [x264("keyint=20"), x264("intra-refresh=1:keyint=20")])
def test_a_cut_with_an_edit_list_shows_its_frames_or_is_refused(tmp_path, options):
    whole = encode(tmp_path / "whole.mp4", options)
    for seconds in (20 / FPS, 1.1, 2.5):
        path = copy(whole, tmp_path / "cut.mp4", before=("-ss", seconds))
        try:
            assert require_right_frames(path) >= 70
        except VideoError as error:
            assert "intra-refresh" in str(options) and "first frames do not decode" in str(error)


def test_frames_that_are_wrongly_called_key_frames_are_never_started_at(tmp_path):
    codecs = (
        x264("keyint=50:bframes=0"),
        # The decoder starts at any frame of HEVC and shows it with the right time stamp.
        x265("keyint=50:bframes=0"),
        ENCODINGS["mpeg4.mp4"],
    )
    for number, codec in enumerate(codecs):
        name = f"{number}.mp4"
        data = encode(tmp_path / name, codec).read_bytes()
        assert b"stss" in data
        # Without the table of key frames every frame is one.
        (tmp_path / name).write_bytes(data.replace(b"stss", b"free"))
        require_right_frames(tmp_path / name)


def test_resampled_clips_of_a_refreshed_video_show_the_frame_of_each_time(tmp_path):
    path = encode(tmp_path / "a.mp4", ENCODINGS["refresh 40.mp4"])
    info = video.probe(path)
    for clip in video.select_clips(info, "resample", 10, 9, 11, None):
        shown = numbers(video.read_clip(path, clip, HEIGHT, WIDTH, "stretch"))
        assert shown == [(clip.start + k) * FPS // 10 for k in range(9)]


def test_a_seek_that_shows_other_frames_is_noticed_and_done_without(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", ENCODINGS["refresh 40.mp4"])
    # As if nothing could be read from the packets: only the time stamps tell.
    monkeypatch.setattr(containers, "is_start", lambda *_: True)
    video._opened.key = None
    require_right_frames(path)


def test_two_frames_with_one_time_stamp_are_refused(tmp_path):
    path = encode(tmp_path / "a.mkv", x264("keyint=20:bframes=0"))
    twice = copy(path, tmp_path / "b.mkv", "-bsf:v", "setts=ts=if(eq(N\\,50)\\,PREV_OUTPTS\\,PTS)")
    assert numbers(video.read_frames(twice, range(40))) == list(range(40))
    with pytest.raises(VideoError, match=r"two frames have the same time stamp, 2\.0"):
        video.read_frames(twice, range(45, 54))
