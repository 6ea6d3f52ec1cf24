"""The picture or video that a video continues: how it is read, and how a request names it."""

import io
import json
import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_cli import hashes
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import inputs, jobs
from cosmos_cli.generate.jobs import Settings, Weights
from cosmos_cli.generate.requests import Given, Request
from cosmos_cli.model import mp4, rgb, video
from cosmos_cli.recipe import loading
from tests.helpers.stand_ins import moving_square

R = SimpleNamespace(height=64, width=96, resize="crop", fps=12.0, fps_policy="resample")


def photo(height=80, width=120):
    """A picture whose corners differ."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack((y * 255 // height, x * 255 // width, (x + y) % 256), axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def read(path, r=R):
    return inputs.read_given(Given(path, is_video=False, frames=1), r)


def expected(picture, r=R):
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[:, None]
    return rgb.resize_frames(pixels.contiguous(), r.height, r.width, r.resize)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.wrong"])
@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
def test_a_picture_is_resized_as_prep_resizes_clips(tmp_path, name, resize):
    r = SimpleNamespace(**{**vars(R), "resize": resize})
    path = tmp_path / name
    photo().save(path, "webp" if name.endswith("webp") else "png", lossless=True)
    assert read(path, r).shape == (3, 1, 64, 96)
    assert torch.equal(read(path, r), expected(photo(), r))


def test_a_jpeg_is_turned_as_its_exif_data_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(120, 80).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    turned = expected(photo(120, 80).rotate(-90, expand=True)).float()
    assert (read(tmp_path / "a.jpg").float() - turned).abs().mean() < 2


def test_transparent_parts_are_white(tmp_path):
    clear = photo().convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    clear.save(tmp_path / "clear.png")
    assert read(tmp_path / "clear.png").min() == 255
    palette = photo().quantize(16)
    palette.info["transparency"] = 0
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (read(tmp_path / "palette.png") == 255).any()


def test_grey_of_sixteen_bits_is_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 96 * 64).reshape(64, 96).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    pixels = read(tmp_path / "grey.png")[0, 0].float()
    assert (pixels - torch.from_numpy((grey / 257).astype(np.float32))).abs().max() <= 1
    Image.fromarray((grey // 256).astype(np.uint8)).save(tmp_path / "small.png")
    assert read(tmp_path / "small.png").shape == (3, 1, 64, 96)


def test_an_enlarged_input_is_reported(tmp_path, capsys):
    photo(32, 48).save(tmp_path / "small.png")
    photo(64, 96).save(tmp_path / "same.png")
    read(tmp_path / "same.png")
    assert "enlarged" not in capsys.readouterr().err
    read(tmp_path / "small.png")
    assert "is 48x32, smaller than the video's 96x64" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize(("policy", "rate"), [("resample", 12.0), ("resample", 24.0), ("keep", 24)])
def test_the_last_frames_of_a_video_are_given(tmp_path, count, policy, rate):
    clip, path = moving_square(30, 64, 96), tmp_path / "a.mp4"
    mp4.write_mp4(path, clip, rate, 0)
    r = SimpleNamespace(**{**vars(R), "fps_policy": policy})
    pixels = inputs.read_given(Given(path, is_video=True, frames=count), r)
    step = 2 if (policy, rate) == ("resample", 24.0) else 1
    last = 28 if step == 2 else 29
    numbers = range(last - step * (count - 1), 30, step)
    assert torch.equal(pixels, video.read_frames(path, numbers))


def oversized():
    """A png that claims 60,000 x 60,000 pixels."""
    stream = io.BytesIO()
    photo(8, 8).save(stream, "png")
    data = bytearray(stream.getvalue())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "is_video", "words"),
    [
        (None, False, "does not exist"),
        (b"", False, "is not a png, jpeg or webp picture"),
        (b"words", False, "is not a png, jpeg or webp picture"),
        (b"words", True, "not a video"),
        ("cut", False, "is damaged"),
        ("large", False, "has too many pixels"),
        ("short", True, r"too short: 5 frames .* 9 are needed; .*--num-input-frames 1"),
    ],
)
def test_a_bad_input_is_one_clear_line(tmp_path, content, is_video, words):
    path = tmp_path / "input"
    if content == "cut":
        photo().save(path, "png")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content == "large":
        path.write_bytes(oversized())
    elif content == "short":
        mp4.write_mp4(path, moving_square(5, 64, 96), 12, 18)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        inputs.read_given(Given(path, is_video, 9 if is_video else 1), R)
    assert caught.value.code == ExitCode.ASSET
    assert str(caught.value).count("\n") == 0
    assert str(path) in str(caught.value)


# --- requests -------------------------------------------------------------------------------------


def line(**entry):
    return Request(json.dumps({"prompt": "a ball", **entry}), "b:1", is_object=True)


@pytest.mark.parametrize(
    ("entry", "is_video", "frames"),
    [
        ({"image": "a.png"}, False, 1),
        ({"video": "a.mp4"}, True, 9),
        ({"video": "a", "num_input_frames": 1}, True, 1),
        ({"visual_input": "a.jpg"}, False, 1),
        ({"visual_input": "a.MP4", "num_input_frames": 9}, True, 9),
    ],
)
def test_a_line_names_an_input(tmp_path, monkeypatch, entry, is_video, frames):
    monkeypatch.chdir(tmp_path)
    name = next(iter(entry.values()))
    assert line(**entry).read().given == Given(tmp_path / name, is_video, frames)
    assert line(**entry).has_input


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"image": "a", "video": "b"}, "names both image and video"),
        ({"image": 3}, "image is 3"),
        ({"visual_input": ""}, 'visual_input is ""'),
        ({"image": "a", "num_input_frames": 9}, "a picture is one frame, not 9"),
        ({"video": "a", "num_input_frames": 5}, "the number of input frames is 5; use 1 or 9"),
        ({"num_input_frames": 9}, "num_input_frames needs a video"),
    ],
)
def test_a_wrong_input_of_a_line_is_refused(entry, words):
    with pytest.raises(UserError, match=words) as caught:
        line(**entry).read()
    assert caught.value.code == ExitCode.USAGE
    assert not line(**entry).has_input


def settings(tmp_path, model="Cosmos-Tiny-Video2World", **changes):
    r = loading.load("tiny", [f"model={model}"]).recipe
    return Settings(r, Weights(tmp_path / "w", "0" * 64), tmp_path / "out", False, **changes)


def test_the_content_of_the_input_is_part_of_a_jobs_identity(tmp_path):
    for name, height in (("a.png", 80), ("b.png", 90)):
        photo(height).save(tmp_path / name)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    request, own = Request("a ball"), settings(tmp_path)
    made = {
        name: jobs.resolve(line(image=str(tmp_path / name)), own)
        for name in ("a.png", "b.png", "copy.png")
    }
    without = jobs.resolve(request, own)
    assert made["a.png"].key == made["copy.png"].key
    assert len({job.key for job in (*made.values(), without)}) == 3
    padded = replace(own, r=own.r.model_copy(update={"resize": "pad"}))
    picture = line(image=str(tmp_path / "a.png"))
    assert jobs.resolve(picture, padded).key != made["a.png"].key
    assert jobs.resolve(request, padded).key == without.key
    rolled = jobs.resolve(request, settings(tmp_path, segments=3))
    assert rolled.key != without.key
    assert rolled.num_frames == 25 + 2 * (25 - 9)
    for job in (made["a.png"], rolled):
        assert jobs.from_json(json.loads(json.dumps(jobs.to_json(job)))) == job
    given = Given(tmp_path / "a.png", is_video=False, frames=1)
    assert jobs.resolve(request, settings(tmp_path, given=given)).key == made["a.png"].key
    assert made["a.png"].given.sha256 == hashes.sha256_file(tmp_path / "a.png")


def test_a_text2world_model_continues_nothing(tmp_path):
    photo().save(tmp_path / "a.png")
    own = settings(tmp_path, "Cosmos-Tiny-Text2World")
    with pytest.raises(UserError, match="--set model=Cosmos-Tiny-Video2World"):
        jobs.resolve(line(image=str(tmp_path / "a.png")), own)
    with pytest.raises(UserError, match="has no --rollout"):
        jobs.resolve(Request("a"), settings(tmp_path, "Cosmos-Tiny-Text2World", segments=2))
