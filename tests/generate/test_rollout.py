"""A rollout: segments that continue one another, one mp4, resumable by segment."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cosmos_cli import files, hashes, locks, paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import batch, rollout
from cosmos_cli.generate.jobs import Job, Weights
from cosmos_cli.generate.phases import Pipeline
from cosmos_cli.generate.requests import Given
from cosmos_cli.generate.text_models import Conditioning
from cosmos_cli.model import mp4, video
from cosmos_cli.recipe import loading
from tests.helpers.stand_ins import moving_square

SETTINGS = (
    "model=Cosmos-Tiny-Video2World", "lora_rank=0", "num_frames=17", "height=64", "width=96",
    "num_steps=2", "guidance=0",
)  # fmt: skip


def job_at(folder, segments):
    r = loading.load("tiny", SETTINGS).recipe
    weights = Weights(paths.EMBEDDED_DIR / "model.safetensors", "0" * 64)
    return Job("a ball", r, weights, folder / "ball.mp4", segments=segments)


def prompt(r):
    empty = torch.zeros(r.spec.text.tokens, r.spec.text.channels)
    return Conditioning("a ball", empty, empty)


@pytest.fixture(scope="module")
def pipeline():
    job = job_at(paths.EMBEDDED_DIR, 1)
    pipeline = Pipeline(job.r, "cpu", in_turn=True)
    pipeline.load(job.r, job.weights)
    return pipeline


@torch.inference_mode()
def roll(pipeline, job, given=None):
    job.path.parent.mkdir(exist_ok=True)
    rollout.make(pipeline, job, prompt(job.r), given)
    return hashes.sha256_file(job.path)


def test_a_rollout_is_one_video_of_all_segments(pipeline, tmp_path, monkeypatch):
    job, seen = job_at(tmp_path, 3), []
    original = pipeline.segment

    def segment(own, text_emb, given):
        pixels, about = original(own, text_emb, given)
        seen.append((own.r.sampling_seed, given, pixels.clone()))
        return pixels, about

    def pixelate(pixels):
        pixels[:, :, :8] = 0
        return pixels.shape[1]

    monkeypatch.setattr(pipeline, "segment", segment)
    monkeypatch.setattr(pipeline, "blur", pixelate)
    given = moving_square(9, 64, 96)
    roll(pipeline, job, given)
    assert [seed for seed, *_ in seen] == [1, 2, 3]
    assert torch.equal(seen[0][1], given)
    for before, after in pairwise(seen):
        assert torch.equal(after[1], before[2][:, -9:]), "as before any face was pixelated"
    info = video.probe(job.path)
    assert info.frames == job.num_frames == 17 + 2 * 8
    # The continued frames come back almost as they were given.
    assert (seen[1][2][:, :9].float() - seen[1][1].float()).abs().mean() < 8
    expected = torch.cat([seen[0][2], *(pixels[:, 9:] for *_, pixels in seen[1:])], dim=1)
    expected[:, :, :8] = 0
    written = video.read_frames(job.path, range(info.frames))
    assert (written.float() - expected.float()).abs().mean() < 5
    about = files.read_json(job.files[0])
    assert about["blurred_faces"] == 17 + 8 + 8
    assert [row["frames"] for row in about["segments"]] == [17, 8, 8]
    assert "frames" not in about and about["attention"] == about["segments"][0]["attention"]
    assert about["mp4_sha256"] == hashes.sha256_file(job.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ball.jpg", "ball.json", "ball.mp4", "ball.txt",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """The hash of a rollout of two and of three segments that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return {count: roll(pipeline, job_at(folder / str(count), count)) for count in (2, 3)}


def test_the_frame_filter_looks_at_the_input(pipeline, tmp_path, monkeypatch):
    seen = []
    judge = SimpleNamespace(reason=lambda pixels: seen.append(pixels) or "frame 0 may show drugs")
    monkeypatch.setattr(pipeline.videos, "frame_filter", judge)
    Image.new("RGB", (96, 64), "red").save(tmp_path / "red.png")
    job = replace(job_at(tmp_path, 1), given=Given(tmp_path / "red.png", False, 1))
    with pytest.raises(UserError, match=r"in the input red\.png, frame 0 may show drugs") as caught:
        pipeline.read_input(job)
    assert caught.value.code == ExitCode.BLOCKED
    assert seen[0].shape == (3, 1, 64, 96)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupted_rollout_resumes_bit_for_bit(
    pipeline, whole, tmp_path, monkeypatch, finished
):
    job, made, original = job_at(tmp_path / "cut", 3), [], pipeline.segment

    def segment(own, text_emb, given):
        if len(made) == finished:
            raise Stopped
        made.append(own.path.stem)
        return original(own, text_emb, given)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pipeline, "segment", segment)
        roll(pipeline, job)
    assert not job.path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "segment", lambda *args: made.append(1) or original(*args))
        assert roll(pipeline, job) == whole[3]
    assert len(made) == 3


def test_two_commands_cannot_make_the_same_rollout(pipeline, tmp_path):
    job = job_at(tmp_path / "both", 2)
    job.path.parent.mkdir()
    with (
        locks.held(job.path.with_name(".ball.segments.lock"), "cosmos generate"),
        pytest.raises(UserError, match="another `cosmos generate` is writing it"),
    ):
        roll(pipeline, job)
    assert not job.path.exists()


@pytest.mark.parametrize("damage", ["mp4", "frames", "key", "list"])
def test_segments_of_another_job_or_damaged_ones_are_made_again(
    pipeline, whole, tmp_path, monkeypatch, damage
):
    job, original = job_at(tmp_path / "cut", 2), pipeline.segment

    def segment(own, text_emb, given):
        if given is not None:
            raise Stopped
        return original(own, text_emb, given)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(pipeline, "segment", segment)
        other = replace(job, prompt="another") if damage == "key" else job
        roll(pipeline, other)
    folder = tmp_path / "cut" / ".ball.segments"
    if damage == "mp4":
        (folder / "0000.mp4").write_bytes(b"cut")
    elif damage == "frames":
        (folder / "after_0001.safetensors").unlink()
    elif damage == "list":
        (folder / "state.json").write_text("[]")
    made = []
    monkeypatch.setattr(pipeline, "segment", lambda *args: made.append(1) or original(*args))
    assert roll(pipeline, job) == whole[2]
    assert len(made) == 2


def test_drift_is_told_segment_by_segment(tmp_path, capsys):
    job = job_at(tmp_path, 2)
    rows = [
        {"frames": 17, "sharpness": 1.0, "brightness": 0.5, "saturation": 0.2},
        {"frames": 8, "sharpness": 0.5, "brightness": 0.5, "saturation": 0.3},
    ]
    files.write_json(job.files[0], {"segments": rows})
    batch._say_drift(job)
    err = capsys.readouterr().err
    assert "0.500 (-50%)" in err
    assert "0.300 (+50%)" in err
    assert "1.1 to 1.6 s" in err


def test_joined_files_have_the_frames_of_their_parts(tmp_path):
    clips = [moving_square(17, 64, 96), moving_square(8, 64, 96).flip(3)]
    for number, clip in enumerate(clips):
        mp4.write_mp4(tmp_path / f"{number}.mp4", clip, 16, 18)
    parts = [tmp_path / "0.mp4", tmp_path / "1.mp4", tmp_path / "0.mp4"]
    mp4.join_mp4(parts, tmp_path / "joined")
    info = video.probe(tmp_path / "joined")
    assert (info.frames, info.fps, info.seconds) == (42, 16.0, 42 / 16)
    decoded = [
        video.read_frames(path, range(n)) for path, n in zip(parts, (17, 8, 17), strict=True)
    ]
    assert torch.equal(video.read_frames(tmp_path / "joined", range(42)), torch.cat(decoded, dim=1))


def test_a_full_disk_is_one_line(pipeline, tmp_path):
    (tmp_path / "file").write_text("in the way")
    job = replace(job_at(tmp_path, 2), path=tmp_path / "file" / "ball.mp4")
    with pytest.raises(UserError, match="cannot be written"):
        rollout.make(pipeline, job, prompt(job.r), None)
