"""LeRobot datasets as they lie on disk, of both versions."""

import json
import os
import sys

import pytest
import torch

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import mp4, video
from cosmos_cli.prep import lerobot
from tests.helpers.command import Cosmos, settings

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
    mp4.write_mp4(path, frames, FPS, 4)


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


def test_v2_0_is_read_as_v2_1(v2):
    expected = lerobot.episodes(v2, "top")
    change_info(v2, codebase_version="v2.0")
    assert lerobot.episodes(v2, "top") == expected


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
    (v2 / "meta" / "episodes.jsonl").unlink()
    with pytest.raises(UserError, match=r"episodes\.jsonl: does not exist"):
        lerobot.episodes(v2, "top")
    info = json.loads((v2 / "meta" / "info.json").read_text())
    (v2 / "meta" / "info.json").write_text(json.dumps({**info, "codebase_version": "v1.6"}))
    with pytest.raises(UserError, match=r"version 'v1\.6', not one of v2\.0"):
        lerobot.episodes(v2, "top")


def test_v3_without_pyarrow_says_what_to_install(v3, monkeypatch):
    # The import system answers None with ImportError.
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow") as caught:
        lerobot.episodes(v3, "top")
    assert caught.value.code == ExitCode.ENVIRONMENT
    assert "[lerobot]" in caught.value.fix


def change_info(root, **changes):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"video_path": "../../../outside.mp4"}, "outside of the dataset"),
        ({"video_path": "/etc/{video_key}.mp4"}, "outside of the dataset"),
        ({"video_path": "//etc/{video_key}.mp4"}, "outside of the dataset"),
        ({"video_path": "videos/../../{video_key}.mp4"}, "outside of the dataset"),
        ({"video_path": ".."}, "outside of the dataset"),
        ({"video_path": "{episode_index:>3000000000}"}, "may hold video_key"),
        ({"video_path": "{episode_index:0300d}"}, "may hold video_key"),
        ({"video_path": "{episode_index:.5f}"}, "may hold video_key"),
        ({"video_path": "{episode_index:{episode_index}}"}, "may hold video_key"),
        ({"video_path": "{video_key.foo}"}, "may hold video_key"),
        ({"video_path": "{video_key[0]}"}, "may hold video_key"),
        ({"video_path": "{video_key:>99}"}, "may hold video_key"),
        ({"video_path": "{video_key!r}"}, "may hold video_key"),
        ({"video_path": "{episode_index.__class__}"}, "may hold video_key"),
        ({"video_path": "{}"}, "may hold video_key"),
        ({"video_path": "{file_index}.mp4"}, "may hold video_key"),
        ({"video_path": "{episode_index"}, "expected '}'"),
        ({"video_path": "a\0b.mp4"}, "contains a NUL"),
        ({"video_path": "\ud800.mp4"}, "is not valid Unicode"),
        ({"video_path": "x" * 5000}, "at most 1000"),
        ({"video_path": None}, "valid string"),
        ({"chunks_size": 0}, "greater than or equal to 1"),
        ({"chunks_size": 10**400}, "chunks_size"),
        ({"fps": 0}, "greater than 0"),
        ({"fps": float("nan")}, "finite"),
        ({"fps": float("inf")}, "fps"),
        ({"features": []}, "valid dictionary"),
        ({"codebase_version": ["v2.1"]}, "valid string"),
    ],
)
def test_an_invalid_value_in_info_json_gives_one_line(v2, changes, what):
    change_info(v2, **changes)
    with pytest.raises(UserError) as refused:
        lerobot.episodes(v2, "top")
    assert refused.value.code == ExitCode.DATASET
    assert what in str(refused.value) and str(v2 / "meta" / "info.json") in str(refused.value)
    assert len(str(refused.value)) < 1000 and "\n" not in str(refused.value)


def test_a_camera_cannot_lead_out_of_the_dataset(v2):
    change_info(v2, features={"../../../../etc": {"dtype": "video"}})
    with pytest.raises(UserError, match="outside of the dataset"):
        lerobot.episodes(v2, None)


def test_dots_in_a_path_inside_the_dataset_are_resolved(v2):
    name = "meta/../videos/./chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    change_info(v2, video_path=name)
    assert all(episode.path.is_file() for episode in lerobot.episodes(v2, "top"))


def test_videos_may_be_links_out_of_the_dataset_as_in_the_hubs_cache(v2, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(v2.rglob("*.mp4"))):
        path.rename(blobs / str(i))
        path.symlink_to(blobs / str(i))
    info = v2 / "meta" / "info.json"
    info.rename(blobs / "info")
    info.symlink_to(blobs / "info")
    found = lerobot.episodes(v2, "top")
    assert [video.probe(episode.path).frames for episode in found] == list(LENGTHS)


GOOD = '{"episode_index": 0, "tasks": ["Pick."], "length": 20}'
BAD_LINES = {
    '{"episode_index": 1, "length": 20}': "episode_000001",
    '{"episode_index": 1, "tasks": null, "length": 20}': "episode_000001",
    '{"episode_index": 1, "tasks": ["\\ud800"], "length": 20}': "episode_000001",
    '{"episode_index": 1, "tasks": [3], "length": 20}': "episode_000001",
    '{"episode_index": 1, "tasks": ["Go."], "length": 1e400}': "episode_000001",
    '{"episode_index": 1, "tasks": ["Go."], "length": NaN}': "episode_000001",
    '{"episode_index": 1, "tasks": ["Go."], "length": 0}': "episode_000001",
    '{"episode_index": 1, "tasks": ["Go."], "length": 100000000}': "episode_000001",
    '{"episode_index": -1, "tasks": ["Go."], "length": 20}': "episodes.jsonl line 2",
    '{"episode_index": 1e400, "tasks": ["Go."], "length": 20}': "episodes.jsonl line 2",
    '{"episode_index": ' + "9" * 5000 + "}": "episodes.jsonl line 2",
    '{"episode_index": [1]}': "episodes.jsonl line 2",
    "{": "episodes.jsonl line 2",
    "[1]": "episodes.jsonl line 2",
    "[" * 200_000: "episodes.jsonl line 2",
    '"' + "x" * 3_000_000: "episodes.jsonl line 2",
    "\udcff": "episodes.jsonl line 2",
    # It cannot be known which of two is right, but the same row twice is one episode.
    '{"episode_index": 0, "tasks": ["A."], "length": 10}': "episode_000000, episodes.jsonl line 2",
}  # fmt: skip


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:60])
def test_a_bad_row_is_named_and_does_not_lose_the_others(v2, line):
    last = '{"episode_index": 2, "tasks": ["Put."], "length": 30.0}'
    content = "\n".join([GOOD, line, last]).encode(errors="surrogateescape")
    (v2 / "meta" / "episodes.jsonl").write_bytes(content)
    found = {episode.name: episode for episode in lerobot.episodes(v2, "top")}
    assert set(found) == {"episode_000000", BAD_LINES[line], "episode_000002"}
    assert found["episode_000002"].frames == 30 and not found["episode_000002"].reason
    bad = found[BAD_LINES[line]]
    assert bad.reason and len(bad.reason) < 300 and "\n" not in bad.reason
    twice = line.startswith('{"episode_index": 0')
    assert bool(found["episode_000000"].reason) == twice


def test_the_same_row_twice_is_one_episode_and_the_second_is_named(v2):
    (v2 / "meta" / "episodes.jsonl").write_text(f"{GOOD}\n{GOOD}\n")
    first, second = lerobot.episodes(v2, "top")
    assert (first.name, first.reason) == ("episode_000000", "")
    assert second.reason == "it is listed twice"


def test_too_many_rows_are_refused(v2, monkeypatch):
    monkeypatch.setattr(lerobot, "MOST_ROWS", 2)
    with pytest.raises(UserError, match="more than 2 episodes"):
        lerobot.episodes(v2, "top")


def rewrite(root, change):
    """Replaces the rows of a v3.0 dataset."""
    import pyarrow
    from pyarrow import parquet

    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    rows = parquet.read_table(path).to_pylist()
    parquet.write_table(pyarrow.Table.from_pylist(change(rows)), path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"videos/{CAMERAS[0]}/file_index", None),
        (f"videos/{CAMERAS[0]}/chunk_index", -1),
        (f"videos/{CAMERAS[0]}/from_timestamp", float("nan")),
        (f"videos/{CAMERAS[0]}/from_timestamp", float("inf")),
        (f"videos/{CAMERAS[0]}/from_timestamp", -0.5),
        ("tasks", None),
        ("tasks", ["go"] * 200),
        ("tasks", ["x" * 50_000]),
        ("length", None),
        ("length", -4),
        ("episode_index", None),
    ],
)
def test_a_bad_parquet_row_is_named_and_does_not_lose_the_others(v3, key, value):
    rewrite(v3, lambda rows: [rows[0], {**rows[1], key: value}, rows[2]])
    found = lerobot.episodes(v3, "top")
    good = [episode.name for episode in found if not episode.reason]
    assert good == ["episode_000000", "episode_000002"]
    (bad,) = (episode for episode in found if episode.reason)
    assert bad.name in ("episode_000001", "chunk-000 file-000.parquet row 2")


def cell_that_python_cannot_read(kind):
    import pyarrow

    if kind == "text":
        ends = pyarrow.array([0, 1, 4, 5], pyarrow.int32()).buffers()[1]
        surrogate = pyarrow.StringArray.from_buffers(3, ends, pyarrow.py_buffer(b"a\xed\xa0\x80c"))
        return "tasks", pyarrow.ListArray.from_arrays([0, 1, 2, 3], surrogate)
    return "length", pyarrow.array([20, 2**62, 30], pyarrow.timestamp("us"))


@pytest.mark.parametrize("kind", ["text", "date"])
def test_a_cell_that_python_cannot_read_loses_one_episode(v3, kind):
    from pyarrow import parquet

    path = v3 / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = parquet.read_table(path)
    name, column = cell_that_python_cannot_read(kind)
    table = table.set_column(table.column_names.index(name), name, column)
    parquet.write_table(table, path)
    found = {episode.name: episode.reason for episode in lerobot.episodes(v3, "top")}
    assert list(found) == [f"episode_{i:06d}" for i in range(3)]
    assert f"its row cannot be used: {name} cannot be read" in found["episode_000001"]
    if kind == "text":
        assert not found["episode_000000"] and not found["episode_000002"]


def test_two_columns_of_one_name_give_one_line(v3):
    from pyarrow import parquet

    path = v3 / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = parquet.read_table(path)
    parquet.write_table(table.append_column("length", table["length"]), path)
    with pytest.raises(UserError, match="exists 2 times"):
        lerobot.episodes(v3, "top")


def test_invalid_and_oversized_parquet_files_give_one_line(v3, monkeypatch):
    path = v3 / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    monkeypatch.setattr(lerobot, "MOST_BYTES", 100)
    with pytest.raises(UserError, match="takes more than 100 bytes"):
        lerobot.episodes(v3, "top")
    path.write_bytes(b"PAR1" + bytes(1000) + b"PAR1")
    with pytest.raises(UserError, match="is not part of a valid LeRobot dataset"):
        lerobot.episodes(v3, "top")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe, not a file"):
        lerobot.episodes(v3, "top")


@pytest.mark.workflow
def test_a_text_that_parquet_repeats_is_in_memory_once(v3):
    """100,000 episodes of the same text of a megabyte, which is 1 MB in the file."""
    import pyarrow
    from pyarrow import parquet

    def column(name):
        return pyarrow.array([0] * 100_000) if name != "tasks" else tasks

    words = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 100_000, pyarrow.int32()), pyarrow.array(["x" * 10**6])
    )
    tasks = pyarrow.ListArray.from_arrays(pyarrow.array(range(100_001), pyarrow.int32()), words)
    path = v3 / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    names = parquet.read_schema(path).names
    table = pyarrow.table({name: column(name) for name in names})
    parquet.write_table(table, path, store_schema=False, dictionary_pagesize_limit=10**8)
    assert path.stat().st_size < 3 * 10**6
    before = pyarrow.total_allocated_bytes()
    found = lerobot.episodes(v3, "top")
    assert all("longer than" in episode.reason for episode in found)
    assert pyarrow.total_allocated_bytes() - before < 50 * 10**6


@pytest.mark.workflow
def test_prep_takes_the_good_episodes_and_names_the_bad_ones(v2, tmp_path):
    path = v2 / "meta" / "episodes.jsonl"
    bad = '{"episode_index": 1, "tasks": ["Go."], "length": 1e400}\n{\n'
    path.write_text(path.read_text().splitlines()[0] + "\n" + bad)
    source = settings("dataset_dir=data", f"videos_dir={v2}", "camera=wrist", "fps=10")
    done = Cosmos(tmp_path)("prep", "tiny", *source)
    assert "1 of 3 videos used, 2 rejected" in done.stderr
    assert "episode_000001: rejected: its row cannot be used: length" in done.stderr
    assert (
        "episodes.jsonl line 3: rejected: its row cannot be used: it is not valid JSON"
        in done.stderr
    )


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
