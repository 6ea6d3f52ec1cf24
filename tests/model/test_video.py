import itertools
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchcodec.encoders import VideoEncoder

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import mp4, rgb, video
from cosmos_cli.model.video import Clip, VideoError, VideoInfo


def ffmpeg(*args: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", *map(str, args)], check=True)


def numbered_frames(frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    """Noise (3, T, H, W) in which every frame is different."""
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (3, frames, height, width), generator=generator).byte()


def lossless(path: Path, frames: torch.Tensor, fps: float = 24) -> Path:
    encoder = VideoEncoder(frames.transpose(0, 1).contiguous(), frame_rate=fps)
    encoder.to_file(path, codec="libx264rgb", crf=0)
    return path


def info(frames: int, fps: float) -> VideoInfo:
    return VideoInfo(frames, fps, 32, 48, frames / fps, "h264")


def clips(source: VideoInfo, policy: str, fps: float, frames: int, stride: int = 1) -> list[Clip]:
    return video.select_clips(source, policy, fps, frames, stride, None)


@pytest.mark.parametrize("fps", [12, 23.976023976, 24, 29.97, 30, 60000 / 1001])
def test_a_written_file_has_the_frames_rate_and_size_it_was_given(tmp_path, fps):
    mp4.write_mp4(tmp_path / "clip", numbered_frames(9), fps, 18)
    found = video.probe(tmp_path / "clip")
    assert (found.frames, found.height, found.width, found.codec) == (9, 32, 48, "h264")
    assert found.fps == pytest.approx(fps, rel=1e-5)
    assert found.seconds == pytest.approx(9 / fps, rel=1e-3)


def test_the_same_frames_give_the_same_bytes_in_an_mp4_container(tmp_path):
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 4, 6, 10, generator=generator)
    smooth = F.interpolate(coarse, (25, 96, 160), mode="trilinear")[0].mul(255).byte()
    written, elsewhere = set(), []
    for i in range(12):
        mp4.write_mp4(tmp_path / "clip.tmp", smooth, 24, 18)
        written.add((tmp_path / "clip.tmp").read_bytes())
        elsewhere.append(torch.rand(1000 + 777 * i))  # the next encoder's memory lies elsewhere
    (data,) = written
    assert data[4:8] == b"ftyp"
    # A browser can play it while it loads.
    assert data.index(b"moov") < data.index(b"mdat")


def test_flat_colours_survive_the_round_trip(tmp_path):
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128], [0, 128, 128]])
    frames = colours.T[:, :, None, None].expand(3, 5, 32, 48).byte()
    mp4.write_mp4(tmp_path / "a.mp4", frames, 24, 10)
    read = video.read_frames(tmp_path / "a.mp4", range(5))
    assert (read.int() - frames.int()).abs().max() <= 3


@pytest.mark.parametrize(("height", "width"), [(33, 48), (32, 47)])
def test_odd_sizes_are_refused_when_writing(tmp_path, height, width):
    with pytest.raises(ValueError, match=f"{width}x{height}"):
        mp4.write_mp4(tmp_path / "a.mp4", numbered_frames(2, height, width), 24, 18)
    assert not (tmp_path / "a.mp4").exists()


def test_frames_are_read_exactly_also_across_chunks_and_out_of_order(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "CHUNK_BYTES", 4 * 3 * 32 * 48)
    frames = numbered_frames(70)
    path = lossless(tmp_path / "a.mp4", frames)
    assert torch.equal(video.read_frames(path, range(70)), frames)
    some = [69, 0, 5, 5, 40, 41, 12]
    assert torch.equal(video.read_frames(path, some), frames[:, some])


def test_odd_sizes_are_read(tmp_path):
    frames = numbered_frames(5, 31, 47)
    path = lossless(tmp_path / "a.mp4", frames)
    assert (video.probe(path).height, video.probe(path).width) == (31, 47)
    assert torch.equal(video.read_frames(path, range(5)), frames)


def test_a_frame_beyond_the_end_is_an_error(tmp_path):
    path = lossless(tmp_path / "a.mp4", numbered_frames(5))
    with pytest.raises(VideoError, match="5 frames in the file"):
        video.read_frames(path, [3, 4, 5])


def test_a_rotation_tag_swaps_height_and_width(tmp_path):
    frames = numbered_frames(3)
    data = bytearray(lossless(tmp_path / "a.mp4", frames).read_bytes())
    # The matrix of the track header: a quarter turn clockwise in 16.16 fixed point (w is 2.30).
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    (tmp_path / "b.mp4").write_bytes(data)
    found = video.probe(tmp_path / "b.mp4")
    assert (found.height, found.width) == (48, 32)
    shown = video.read_frames(tmp_path / "b.mp4", range(3))
    assert torch.equal(shown, torch.rot90(frames, -1, (2, 3)))


def test_pixels_that_are_not_square_are_shown_in_their_shape(tmp_path):
    frames = numbered_frames(3, 32, 32)
    path = lossless(tmp_path / "a.mp4", frames)
    wide = tmp_path / "wide.mp4"
    # The codec's header says it, and the container.
    ratio = "h264_metadata=sample_aspect_ratio=3/2"
    command = ["ffmpeg", "-v", "error", "-i", path, "-c", "copy", "-bsf:v", ratio, wide]
    subprocess.run(command, check=True)
    assert (video.probe(path).width, video.probe(wide).width) == (32, 48)
    clip = Clip(0, 24, 3)
    cropped, padded = (video.read_clip(wide, clip, 32, 48, mode) for mode in ("crop", "pad"))
    stretched = video.read_clip(wide, clip, 32, 48, "stretch")
    assert torch.equal(cropped, stretched)
    assert torch.equal(padded, stretched)


def test_59_94_fps_is_probed_exactly(tmp_path):
    path = lossless(tmp_path / "a.mp4", numbered_frames(120, 16, 16), 60000 / 1001)
    assert video.probe(path).fps == pytest.approx(60000 / 1001, rel=1e-6)


def test_one_frame_is_a_video_of_one_frame_and_too_short_for_more(tmp_path):
    path = lossless(tmp_path / "a.mp4", numbered_frames(1))
    found = video.probe(path)
    assert found.frames == 1
    assert len(clips(found, "keep", 24, 1)) == 1
    with pytest.raises(VideoError, match="too short: 1 frames at 24 fps, 9 are needed"):
        clips(found, "keep", 24, 9)


@pytest.fixture(scope="module")
def faststart(tmp_path_factory):
    """60 frames with the index before the data."""
    folder = tmp_path_factory.mktemp("faststart")
    mp4.write_mp4(folder / "a.mp4", numbered_frames(60), 30, 18)
    return (folder / "a.mp4").read_bytes()


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_names_its_frames(tmp_path, faststart, part):
    (tmp_path / "a.mp4").write_bytes(faststart[: int(part * len(faststart))])
    with pytest.raises(VideoError, match=r"truncated: \d+ of 60 frames"):
        video.probe(tmp_path / "a.mp4")


def test_a_file_without_its_index_is_truncated(tmp_path):
    mp4.write_mp4(tmp_path / "b.mp4", numbered_frames(30), 30, 18)
    # FFmpeg writes the index at the end.
    ffmpeg("-i", tmp_path / "b.mp4", "-c", "copy", tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[:-100])
    with pytest.raises(VideoError, match="index of the mp4 is missing"):
        video.probe(tmp_path / "a.mp4")


def test_a_damaged_file_is_named_when_its_frames_are_read(tmp_path, faststart):
    middle = len(faststart) // 2
    (tmp_path / "a.mp4").write_bytes(
        faststart[:middle] + bytes(20_000) + faststart[middle + 20_000 :]
    )
    with pytest.raises(VideoError, match="damaged"):
        video.read_frames(tmp_path / "a.mp4", range(video.probe(tmp_path / "a.mp4").frames))


def cut(path: Path, frames: torch.Tensor, gop: int) -> Path:
    """A lossless file of 30 fps without its first second, cut without re-encoding."""
    encoder = VideoEncoder(frames.transpose(0, 1).contiguous(), frame_rate=30)
    options = {"g": gop, "sc_threshold": 0}
    encoder.to_file(path.with_stem("whole"), codec="libx264rgb", crf=0, extra_options=options)
    ffmpeg("-ss", 1, "-i", path.with_stem("whole"), "-c", "copy", path)
    return path


def test_a_cut_at_a_key_frame_is_read_exactly(tmp_path):
    frames = numbered_frames(60)
    path = cut(tmp_path / "a.mp4", frames, gop=15)
    assert video.probe(path).frames == 30
    assert torch.equal(video.read_frames(path, range(30)), frames[:, 30:])


@pytest.mark.parametrize("name", ["a.mp4", "a.mov"])
def test_a_cut_with_a_hidden_key_frame_is_read_exactly(tmp_path, name):
    frames = numbered_frames(60)
    path = cut(tmp_path / name, frames, gop=20)
    assert video.probe(path).frames == 30
    for first in (0, 9, 10, 29):
        indices = range(first, 30)
        assert torch.equal(video.read_frames(path, indices), frames[:, 30 + first :])
    (clip,) = clips(video.probe(path), "resample", 30, 30)
    assert torch.equal(video.read_clip(path, clip, 32, 48, "stretch"), frames[:, 30:])


def run_its_command(error: Exception) -> None:
    """Paste the command of a message into a shell."""
    command = str(error).partition("`")[2].rpartition("`")[0]
    subprocess.run(command, shell=True, check=True, capture_output=True)


def test_a_cut_without_any_key_frame_names_a_command_that_repairs_it(tmp_path):
    lossless(tmp_path / "whole.mp4", numbered_frames(60), 30)
    path = tmp_path / "it's cut.mkv"
    ffmpeg("-i", tmp_path / "whole.mp4", "-ss", 1, "-c", "copy", "-copyinkf", path)
    with pytest.raises(VideoError, match="its first frames do not decode") as caught:
        video.probe(path)
    run_its_command(caught.value)
    repaired = video.probe(tmp_path / "it's cut.mp4")
    assert len(video.read_frames(tmp_path / "it's cut.mp4", range(repaired.frames))[0]) > 9
    assert (tmp_path / "it's cut.mkv.orig").exists() and not path.exists()


def test_frames_of_two_sizes_name_the_time_and_a_command_that_makes_one(tmp_path):
    for name, size in (("a.ts", "96x64"), ("b.ts", "160x96")):
        ffmpeg("-f", "lavfi", "-i", f"testsrc2=s={size}:r=24", "-frames:v", 24, tmp_path / name)
    path = tmp_path / "call.mp4"
    ffmpeg("-i", f"concat:{tmp_path}/a.ts|{tmp_path}/b.ts", "-c", "copy", path)
    with pytest.raises(VideoError, match=r"change from 96x64 to 160x96 at 1\.00 s") as caught:
        video.read_frames(path, range(20, 40))
    assert video.read_frames(path, range(20)).shape == (3, 20, 64, 96)
    run_its_command(caught.value)
    assert video.read_frames(path, range(20, 40)).shape == (3, 20, 64, 96)


def test_files_that_are_not_videos_say_so(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(VideoError, match="no such file"):
        video.probe(path)
    path.touch()
    with pytest.raises(VideoError, match="the file is empty"):
        video.probe(path)
    path.write_text("# not a video, just notes\n" * 50)
    with pytest.raises(VideoError, match="not a video"):
        video.probe(path)
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", path)
    with pytest.raises(VideoError, match="no video stream"):
        video.probe(path)


@pytest.mark.parametrize("make", [lambda p: p.touch(), lambda p: p.write_text("x" * 99)])
def test_no_message_shows_a_path_or_the_decoder(tmp_path, make):
    make(tmp_path / "a.mp4")
    with pytest.raises(VideoError) as error:
        video.probe(tmp_path / "a.mp4")
    assert "/" not in str(error.value) and "cpp" not in str(error.value)


def test_keep_takes_consecutive_frames_at_every_stride():
    found = clips(info(50, 30), "keep", 24, 17, stride=8)
    assert [clip.start for clip in found] == [0, 8, 16, 24, 32]
    assert all(clip.indices == range(clip.start, clip.start + 17) for clip in found)
    assert {clip.fps for clip in found} == {30}
    assert len(video.select_clips(info(50, 30), "keep", 24, 17, 8, 2)) == 2


def test_resampled_clips_start_at_every_stride_of_their_own_rate():
    found = clips(info(60, 30), "resample", 12, 9, stride=5)
    assert [clip.start for clip in found] == [0, 5, 10, 15]
    for clip in found:
        expected = [(clip.start + k) / 12 for k in range(9)]
        assert clip.seconds == pytest.approx(expected, abs=2 * video.CLOCK_SECONDS)
    assert {clip.fps for clip in found} == {12}


def test_reject_takes_only_sources_of_the_rate():
    assert len(clips(info(50, 23.976), "reject", 24, 50)) == 1
    for rate in (25, 30, 12, 48):
        with pytest.raises(VideoError, match=f"{rate} fps instead of 24"):
            clips(info(50, rate), "reject", 24, 50)


def test_too_short_after_resampling_says_how_many_frames_there_are():
    with pytest.raises(VideoError, match=r"48 frames at 24 fps \(from 60 at 30\), 121 are needed"):
        clips(info(60, 30), "resample", 24, 121)


def test_an_unknown_policy_is_misuse():
    with pytest.raises(ValueError, match="sometimes"):
        clips(info(60, 30), "sometimes", 24, 9)


@settings(deadline=None)
@given(
    frames=st.integers(1, 400),
    source=st.sampled_from([10, 12, 15, 24000 / 1001, 24, 25, 30, 60000 / 1001, 60, 120]),
    target=st.sampled_from([8, 12, 24, 25, 30, 60]),
)
def test_resampling_keeps_the_duration(frames, source, target):
    found = info(frames, source)
    count = video.frames_at_policy(found, "resample", target)
    assert abs(count / target - found.seconds) <= 1 / target
    if count:
        (clip,) = clips(found, "resample", target, count)
        assert len(clip) == count and clip.seconds[-1] < found.seconds


def shown_frames(path: Path, frames: torch.Tensor, fps: float) -> list[int]:
    """Which of `frames` a resampled read of a lossless file shows."""
    found = video.probe(path)
    count = video.frames_at_policy(found, "resample", fps)
    (clip,) = clips(found, "resample", fps, count)
    read = video.read_clip(path, clip, 32, 48, "stretch")
    return [int((frames == frame[:, None]).all((0, 2, 3)).nonzero()) for frame in read.unbind(1)]


@pytest.mark.parametrize(
    ("source", "target"), [(30, 24), (24, 24), (12, 24), (60, 24), (30, 30), (10, 25)]
)
def test_resampling_shows_the_frame_of_the_closed_form(tmp_path, monkeypatch, source, target):
    monkeypatch.setattr(video, "CHUNK_BYTES", 4 * 3 * 32 * 48)
    frames = numbered_frames(20)
    path = lossless(tmp_path / "a.mp4", frames, source)
    count = -(-20 * target // source)
    assert shown_frames(path, frames, target) == [k * source // target for k in range(count)]


def test_resampling_a_variable_rate_goes_by_the_time_stamps(tmp_path):
    frames = numbered_frames(30)
    lossless(tmp_path / "a.mp4", frames, 30)
    # Frames 0..7, then every third: the rate falls from 30 to 10.
    kept = [n for n in range(30) if n < 8 or n % 3 == 0]
    ffmpeg(
        *("-i", tmp_path / "a.mp4", "-vf", "select='lt(n,8)+not(mod(n,3))'", "-fps_mode", "vfr"),
        *("-c:v", "libx264rgb", "-crf", 0, tmp_path / "b.mp4"),
    )
    assert video.probe(tmp_path / "b.mp4").frames == len(kept)
    shown = shown_frames(tmp_path / "b.mp4", frames, 30)
    assert shown == [max(k for k in kept if k <= n) for n in range(len(shown))]
    assert len(shown) >= 27


def test_resampling_survives_time_stamps_in_whole_milliseconds(tmp_path):
    frames = numbered_frames(30)
    lossless(tmp_path / "a.mp4", frames, 30)
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "b.mkv")
    assert shown_frames(tmp_path / "b.mkv", frames, 30)[:29] == list(range(29))


def test_stretch_to_the_same_size_changes_nothing():
    frames = numbered_frames(2)
    assert torch.equal(rgb.resize_frames(frames, 32, 48, "stretch"), frames)


@pytest.mark.parametrize(("height", "width"), [(8, 4), (30, 44), (60, 100), (300, 17)])
def test_stretch_is_the_rounded_filter_of_the_reference(height, width):
    frames = numbered_frames(3)
    resized = rgb.resize_frames(frames, height, width, "stretch")
    exact = F.interpolate(frames.double() / 255, (height, width), mode="bilinear", antialias=True)
    assert (resized - exact * 255).abs().max() < 1.1
    assert (resized - exact * 255).mean().abs() < 0.05


@pytest.mark.parametrize("order", ["CTHW", "TCHW"])
@pytest.mark.parametrize("mode", rgb.RESIZE_MODES)
@pytest.mark.parametrize(("height", "width"), [(96, 160), (31, 17), (64, 64)])
def test_resize_gives_the_size_asked_for_in_either_order(order, mode, height, width):
    frames = numbered_frames(2, 50, 90)
    expected = rgb.resize_frames(frames, height, width, mode)
    assert expected.shape == (3, 2, height, width) and expected.dtype == torch.uint8
    if order == "TCHW":
        swapped = rgb.resize_frames(frames.transpose(0, 1), height, width, mode)
        assert torch.equal(swapped.transpose(0, 1), expected)


def test_crop_keeps_the_centre_and_pad_adds_even_black_bars():
    frames = torch.full((3, 1, 40, 80), 200).byte()
    frames[..., :20] = frames[..., 60:] = 50
    assert rgb.resize_frames(frames, 40, 40, "crop").unique().tolist() == [200]
    padded = rgb.resize_frames(frames, 80, 80, "pad")
    assert padded[..., :20, :].max() == 0 and padded[..., 60:, :].max() == 0
    assert padded[..., 20:60, :].min() == 50


def test_an_unknown_resize_is_misuse():
    with pytest.raises(ValueError, match="squash"):
        rgb.resize_frames(numbered_frames(1), 8, 8, "squash")


def test_to_uint8_is_the_inverse_of_to_model_and_clamps():
    levels = torch.arange(256).byte()
    assert torch.equal(rgb.to_uint8(rgb.to_model(levels)), levels)
    assert rgb.to_model(levels).aminmax() == (-1, 1)
    assert rgb.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_contact_sheet_shows_first_and_last_frame():
    frames = torch.arange(25).byte()[None, :, None, None].expand(3, 25, 40, 80) * 10
    sheet = rgb.contact_sheet(frames, columns=3, rows=2, width=20)
    assert sheet.size == (60, 20)
    cells = [sheet.getpixel((x, y))[0] for y, x in itertools.product((5, 15), (10, 30, 50))]
    assert cells[0] == 0 and cells[-1] == 240 and cells == sorted(set(cells))


def test_missing_ffmpeg_is_a_user_error_with_a_fix(tmp_path, monkeypatch):
    # The import system answers None with ImportError, as the RuntimeError of missing libraries.
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(UserError, match="cosmos setup RECIPE --install") as error:
        video.probe(tmp_path / "a.mp4")
    assert error.value.code == ExitCode.ENVIRONMENT


@pytest.mark.workflow
def test_a_4k_clip_is_never_in_memory_at_full_size(tmp_path):
    path = tmp_path / "a.mp4"
    source = ("-f", "lavfi", "-i", "color=s=3840x2160:r=24", "-frames:v", 20)
    ffmpeg(*source, "-preset", "ultrafast", path)
    code = (
        "import resource, sys; from pathlib import Path; from cosmos_cli.model import video\n"
        "path = Path(sys.argv[1])\n"
        "video.read_clip(path, video.Clip(0, 24, 1), 96, 160, 'stretch')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "clip = video.Clip(0, 24, 20)\n"
        "print(video.read_clip(path, clip, 96, 160, 'stretch').shape)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, path], check=True, capture_output=True, text=True
    )
    shape, grown_kib = run.stdout.splitlines()
    assert shape == "torch.Size([3, 20, 96, 160])"
    clip_kib = 20 * 3840 * 2160 * 3 / 1024
    assert int(grown_kib) < 0.5 * clip_kib


@settings(max_examples=60, deadline=None)
# PyTorch's own does not make pictures of 1x1.
@given(*[st.integers(1, 130)] * 2, *[st.integers(2, 130)] * 2, st.booleans())
def test_resizing_on_a_gpu_gives_the_numbers_of_the_cpu(old_h, old_w, new_h, new_w, last):
    generator = torch.Generator().manual_seed(old_h * old_w)
    frames = torch.randint(0, 256, (2, 3, old_h, old_w), generator=generator, dtype=torch.uint8)
    if last:
        frames = frames.contiguous(memory_format=torch.channels_last)
    on_cpu = rgb.resize_frames(frames, new_h, new_w, "stretch")
    assert torch.equal(rgb.interpolate_exactly(frames, new_h, new_w), on_cpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_clip_resized_on_a_gpu_equals_that_of_the_cpu(tmp_path):
    path = lossless(tmp_path / "a.mp4", numbered_frames(9, 144, 256))
    for mode in rgb.RESIZE_MODES:
        arguments = (path, Clip(0, 24, 9), 96, 160, mode)
        on_cpu = video.read_clip(*arguments)
        assert torch.equal(video.read_clip(*arguments, "cuda").cpu(), on_cpu)
