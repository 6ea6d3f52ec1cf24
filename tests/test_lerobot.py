"""LeRobot datasets as they lie on disk, of both versions."""

import json
import sys

import pytest
import torch
from conftest import Cosmos, settings

from cosmos_cli import lerobot
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import video

CAMERAS = ("observation.images.top", "observation.images.wrist")
LENGTHS = (20, 14, 30)
TASKS = ("Pick up the cube.", "Open the drawer.", "Pick up the cube.")
FPS = 10


def frames_of(episode):
    """A clip whose every frame is grey of a level of its own."""
    levels = 20 + 3 * (sum(LENGTHS[:episode]) + torch.arange(LENGTHS[episode]))
    return levels.byte()[None, :, None, None].expand(3, -1, 64, 96)


def write_info(root, version, video_path):
    (root / "meta").mkdir(parents=True)
    features = {name: {"dtype": "video", "shape": [64, 96, 3]} for name in CAMERAS}
    info = {
        "codebase_version": version,
        "fps": FPS,
        "chunks_size": 2,
        "video_path": video_path,
        "features": {**features, "action": {"dtype": "float32", "shape": [6]}},
    }
    (root / "meta" / "info.json").write_text(json.dumps(info))


def write_video(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write_mp4(path, frames, FPS, 4)


@pytest.fixture
def v2(tmp_path):
    """A file for each episode, two episodes in a chunk."""
    root = tmp_path / "v2"
    name = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    write_info(root, "v2.1", name)
    rows = []
    for i in range(3):
        rows.append(json.dumps({"episode_index": i, "tasks": [TASKS[i]], "length": LENGTHS[i]}))
        for camera in CAMERAS:
            path = root / name.format(episode_chunk=i // 2, video_key=camera, episode_index=i)
            write_video(path, frames_of(i))
    (root / "meta" / "episodes.jsonl").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def v3(tmp_path):
    """The first two episodes in one file, the third in another."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    root = tmp_path / "v3"
    name = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    write_info(root, "v3.0", name)
    files = (torch.cat([frames_of(0), frames_of(1)], dim=1), frames_of(2))
    rows = []
    for i, (file, start) in enumerate([(0, 0), (0, LENGTHS[0]), (1, 0)]):
        row = {"episode_index": i, "tasks": [TASKS[i]], "length": LENGTHS[i]}
        for camera in CAMERAS:
            row[f"videos/{camera}/chunk_index"] = 0
            row[f"videos/{camera}/file_index"] = file
            row[f"videos/{camera}/from_timestamp"] = start / FPS
            row[f"videos/{camera}/to_timestamp"] = (start + LENGTHS[i]) / FPS
        rows.append(row)
    for camera in CAMERAS:
        for i, frames in enumerate(files):
            write_video(root / name.format(video_key=camera, chunk_index=0, file_index=i), frames)
    folder = root / "meta" / "episodes" / "chunk-000"
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "file-000.parquet")
    return root


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_an_episode_is_exactly_its_own_frames(request, version):
    root = request.getfixturevalue(version)
    found = lerobot.episodes(root, "top")
    assert [(e.name, e.frames, e.task) for e in found] == [
        (f"episode_{i:06d}", LENGTHS[i], TASKS[i]) for i in range(3)
    ]
    for i, episode in enumerate(found):
        span = range(episode.first, episode.first + LENGTHS[i])
        info = video.part(video.probe(episode.path), span)
        for policy in ("keep", "resample"):
            (clip,) = video.select_clips(info, policy, FPS, len(span), 1, None)
            read = video.read_clip(episode.path, clip, 64, 96, "stretch").float().mean((0, 2, 3))
            assert (read - frames_of(i)[0, :, 0, 0]).abs().max() <= 1
        with pytest.raises(video.VideoError, match="too short"):
            video.select_clips(info, "keep", FPS, LENGTHS[i] + 1, 1, None)


def test_the_camera_must_be_chosen_among_several(v2):
    for camera, what in ((None, "has 2 cameras"), ("left", "has no camera 'left'")):
        with pytest.raises(UserError, match=what) as caught:
            lerobot.episodes(v2, camera)
        assert "observation.images.top" in caught.value.fix


def test_another_version_and_damaged_files_are_named(v2):
    (v2 / "meta" / "episodes.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"episodes\.jsonl"):
        lerobot.episodes(v2, "top")
    info = json.loads((v2 / "meta" / "info.json").read_text())
    (v2 / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(UserError, match=r"version v1\.6, v2\.1 and v3\.0 are read"):
        lerobot.episodes(v2, "top")


def test_without_pyarrow_v3_is_a_line_that_says_what_to_install(v3, monkeypatch):
    # The import system answers None with ImportError.
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow") as caught:
        lerobot.episodes(v3, "top")
    assert caught.value.code == ExitCode.ENVIRONMENT
    assert "[lerobot]" in caught.value.fix


@pytest.mark.workflow
def test_a_lerobot_folder_is_prepared_and_trained_on_and_left_as_it_is(v3, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in v3.rglob("*")}
    cosmos = Cosmos(tmp_path)
    source = settings("dataset_dir=data", f"videos_dir={v3}", "camera=wrist", "fps=10")
    result = cosmos.json("prep", "tiny", *source)
    assert [row["clips"] for row in result["videos"]] == [2, 1, 3]
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    rows = manifest["videos"]
    assert [row["caption"] for row in rows] == list(TASKS)
    assert {row["caption_source"] for row in rows} == {"task"}
    assert rows[0]["path"] == rows[1]["path"] == f"videos/{CAMERAS[1]}/chunk-000/file-000.mp4"
    cosmos("train", "tiny", *source, "--set", "min_free_disk_gb=0.1", "--dry-run")
    assert {path: path.stat().st_mtime_ns for path in v3.rglob("*")} == before
