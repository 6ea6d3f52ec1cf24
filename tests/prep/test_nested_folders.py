"""Videos in folders below the dataset, with captions in the ways that other trainers use."""

import json

import pytest

from cosmos_cli.model import mp4
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import captions, sources
from cosmos_cli.recipe.keys import Recipe
from tests.helpers.command import Cosmos, settings
from tests.helpers.stand_ins import moving_square


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_videos_below_a_folder_are_found_without_those_that_macos_adds(tmp_path):
    touch(tmp_path, "videos/flat.mp4", "videos/2024/cam1/a.mp4", "videos/2024/cam 2/b.MOV")
    touch(tmp_path, "videos/__MACOSX/2024/._a.mp4", "videos/__MACOSX/c.mp4", "videos/._flat.mp4")
    touch(tmp_path, "videos/.cache/d.mp4", "videos/lost+found/e.mp4", "videos/2024/notes.txt")
    (tmp_path / "videos" / "2024" / "loop").symlink_to(tmp_path / "videos")
    (tmp_path / "videos" / "itself").symlink_to("itself")
    (tmp_path / "videos" / "broken").symlink_to("nothing")
    touch(tmp_path, "elsewhere/f.mp4")
    (tmp_path / "videos" / "link").symlink_to(tmp_path / "elsewhere")
    dataset = Dataset.at(str(tmp_path), None)
    names = [dataset.name_of(path) for path in dataset.video_files()]
    assert names == ["2024__cam 2__b.MOV", "2024__cam1__a.mp4", "flat.mp4", "link__f.mp4"]


def test_a_folder_of_folders_of_videos_is_its_own_videos(tmp_path):
    touch(tmp_path, "cam1/a.mp4")
    assert Dataset.at(str(tmp_path), None).videos == tmp_path


def test_files_of_a_lerobot_dataset_are_not_plain_videos(tmp_path):
    touch(tmp_path, "meta/info.json", "videos/chunk-000/top/episode_000000.mp4")
    assert Dataset.at(str(tmp_path), None).video_files() == []
    assert Dataset.at(str(tmp_path / "data"), str(tmp_path)).video_files() == []


def test_a_caption_belongs_to_the_video_in_its_own_folder(tmp_path):
    touch(tmp_path, "cam1/a.txt", "cam2/a.json", "cam2/other.json", "cam2/lost.txt")
    videos = {"cam1__a.mp4": tmp_path / "cam1/a.mp4", "cam2__a.mp4": tmp_path / "cam2/a.mp4"}
    found = captions.sidecars(videos)
    assert found.files == {
        "cam1__a.mp4": tmp_path / "cam1/a.txt", "cam2__a.mp4": tmp_path / "cam2/a.json",
    }  # fmt: skip
    assert found.unused == [tmp_path / "cam2/lost.txt"]


@pytest.mark.parametrize(
    ("content", "caption"),
    [
        ('{"caption": " A.\\r\\nB. "}', "A.\nB."),
        ('{"text": "A.", "fps": 24}', "A."),
        ('{"prompt": "A.", "seed": 1}', "A."),
        ('{"caption": 3}', ""),
        ('["A."]', ""),
        ("{", ""),
        ("\ud800", ""),
    ],
)
def test_a_json_file_next_to_a_video_may_hold_its_caption(tmp_path, content, caption):
    path = tmp_path / "a.json"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    assert captions.caption_in(path) == caption


@pytest.mark.parametrize(
    "content",
    [
        "file_name,text\n2024/a.mp4,One.\n",
        "File_Name;Text\n2024\\a.mp4;One.\n",
        "video_path\tprompt\n/data/2024/a.mp4\tOne.\n",
        '"file_name";"split";"caption"\n"./2024/a.mp4";"train";"One."\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_other_trainers_and_of_excel_are_read(tmp_path, content, encoding):
    path = tmp_path / "metadata.csv"
    path.write_text(content, encoding=encoding)
    assert captions.table_in(tmp_path) == path
    assert captions.read(path, ["a.mp4", "2024__a.mp4"]) == ({"2024__a.mp4": "One."}, [])


def test_a_row_with_a_comma_in_a_semicolon_table_needs_no_quotes(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("file;caption\na.mp4;One, two, three.\n")
    assert captions.read(path, ["a.mp4"]) == ({"a.mp4": "One, two, three."}, [])


def test_a_metadata_file_about_something_else_is_not_a_table(tmp_path):
    (tmp_path / "metadata.csv").write_text("name,size\na,3\n")
    assert captions.table_in(tmp_path) is None
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "One."}\n')
    assert captions.table_in(tmp_path) == tmp_path / "metadata.jsonl"


def test_a_flat_video_wins_over_one_in_a_folder_of_the_same_name(tmp_path):
    touch(tmp_path, "videos/a/b.mp4", "videos/a__b.mp4", "videos/b.mp4")
    r = Recipe(dataset_dir=str(tmp_path))
    found = sources.inspect(r, Dataset.at(r.dataset_dir, None))
    assert {source.name: source.reason for source in found} == {
        "a/b.mp4": "shares its name with a__b.mp4; rename one",
        "a__b.mp4": "the file is empty",
        "b.mp4": "the file is empty",
    }


@pytest.mark.workflow
def test_nested_videos_are_prepared_and_train_finds_them_unchanged(tmp_path):
    videos = tmp_path / "data" / "videos"
    for i, name in enumerate(("flat", "2024/cam1/a", "2024/cam2/a", "2024/cam2/bad")):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        clip = moving_square(13 if i < 3 else 3, 64, 96).roll(7 * i, dims=3)
        mp4.write_mp4(videos / f"{name}.mp4", clip, 12, 18)
    (videos / "metadata.csv").write_text("file_name,text\n2024/cam2/a.mp4,A table.\n")
    (videos / "2024" / "cam1" / "a.txt").write_text("Beside it.")
    (videos / "flat.json").write_text('{"caption": "Cut o')
    cosmos = Cosmos(tmp_path)
    options = settings("dataset_dir=data", "prompt=Other.", "min_free_disk_gb=0.1")
    done = cosmos("prep", "tiny", *options)
    assert f"{videos}/2024/cam2/bad.mp4: rejected: too short" in done.stderr
    assert "1 JSON file next to a video cannot be read and is not used: videos/flat" in done.stderr
    rows = json.loads((tmp_path / "data" / "manifest.json").read_text())["videos"]
    assert {row["file"]: (row["path"], row["caption"]) for row in rows} == {
        "2024__cam1__a.mp4": ("2024/cam1/a.mp4", "Beside it."),
        "2024__cam2__a.mp4": ("2024/cam2/a.mp4", "A table."),
        "2024__cam2__bad.mp4": ("2024/cam2/bad.mp4", ""),
        "flat.mp4": ("flat.mp4", "Other."),
    }
    cosmos("train", "tiny", *options, "--dry-run")
