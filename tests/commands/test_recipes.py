from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from cosmos_cli import files, new_recipe
from cosmos_cli.commands.recipes import app
from cosmos_cli.console import duration
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model.video import VideoInfo
from cosmos_cli.prep import holdout
from cosmos_cli.recipe import gpu_models, loading, plan
from cosmos_cli.recipe.training_plan import Machine


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OUTPUT_ROOT", raising=False)
    return tmp_path


def run(*words: str) -> str:
    """Return the standard output of a command that succeeds."""
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def run_json(*words: str) -> dict[str, Any]:
    answer = json.loads(run(*words, "--json"))
    assert (answer["status"], answer["exit_code"]) == ("ok", 0)
    return answer


def fail(*words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        run(*words)
    return caught.value


def test_list_names_every_shipped_recipe() -> None:
    text = run("list")
    for name in loading.shipped():
        assert f"\n{name} " in text
    names = [row["name"] for row in run_json("list")["recipes"]]
    assert names == sorted(loading.shipped())


def test_show_prints_the_file() -> None:
    assert run("show", "tiny") == loading.shipped()["tiny"].read_text()
    assert run_json("show", "tiny")["recipe"]["num_frames"] == 25


def test_copy_writes_a_recipe_that_loads_and_replaces_nothing_unasked(workplace: Path) -> None:
    assert run("copy", "tiny") == f"{workplace / 'tiny.yaml'}\n"
    shipped = loading.shipped()["tiny"].read_text()
    assert (workplace / "tiny.yaml").read_text() == shipped
    (workplace / "tiny.yaml").write_text("mine")
    error = fail("copy", "tiny")
    assert (error.code, error.where) == (ExitCode.USAGE, "tiny.yaml")
    assert (workplace / "tiny.yaml").read_text() == "mine"
    run("copy", "hdvila", "tiny.yaml", "--yes")
    assert loading.load("tiny.yaml").recipe.dataset_dir == "datasets/hdvila"


def test_copy_into_a_folder_keeps_the_name(workplace: Path) -> None:
    (workplace / "sub").mkdir()
    answer = run_json("copy", "tiny", "sub")
    assert answer["artifacts"] == [str(workplace / "sub" / "tiny.yaml")]
    assert (workplace / "sub" / "tiny.yaml").is_file()


def test_check_says_ok_with_warnings_or_every_problem(workplace: Path) -> None:
    assert run("check", "tiny") == "ok\n"
    assert len(run_json("check", "nemo_assets")["warnings"]) == 2
    (workplace / "bad.yaml").write_text("dataset_dir: data\nsede: 1\nfps: 0\n")
    error = fail("check", "bad.yaml", "--set", "height=1")
    assert error.code == ExitCode.USAGE
    assert len(str(error).splitlines()) == 3


def test_keys_explains_every_key() -> None:
    text = run("keys")
    for row in loading.key_reference():
        assert f"  {row.name} (" in text
        assert row.description in text
    assert [row["name"] for row in run_json("keys")["keys"]] == list(loading.Recipe.model_fields)


def test_schema_is_a_json_schema_on_stdout_or_in_a_file(workplace: Path) -> None:
    content = json.loads(run("schema"))
    jsonschema.Draft202012Validator.check_schema(content)
    run("schema", "--output", "s.json")
    assert json.loads((workplace / "s.json").read_text()) == content
    assert fail("schema", "--output", "s.json").code == ExitCode.USAGE


def info(frames: int = 240, fps: float = 24.0, height: int = 720, width: int = 1280) -> VideoInfo:
    return VideoInfo(frames, fps, height, width, frames / fps, "h264")


def machine(gpus: str = "8xH100-80GB") -> Machine:
    return Machine(*gpu_models.parse_gpus(gpus), "--gpus says so")


def choices(*videos: VideoInfo, captioned: int = 0, gpus: str = "8xH100-80GB") -> dict[str, Any]:
    rows, _ = new_recipe.propose("robot", Path("clips"), videos, captioned, machine(gpus))
    assert all(row.because for row in rows)
    return {row.key: row.value for row in rows}


def test_clips_are_as_long_as_three_of_four_videos() -> None:
    assert choices(info())["num_frames"] == 121
    assert choices(info(121))["num_frames"] == 121
    assert choices(info(120))["num_frames"] == 113
    assert choices(*[info(60)] * 2, *[info(240)] * 2)["num_frames"] == 57
    assert choices(*[info(60)] * 3, info(240))["num_frames"] == 57
    assert choices(info(60), *[info(240)] * 3)["num_frames"] == 121
    assert choices(info(3))["num_frames"] == 1


def test_a_recipe_that_can_only_learn_pictures_says_so() -> None:
    def needs(*lengths: int) -> str:
        videos = [info(length) for length in lengths]
        return "\n".join(new_recipe.propose("robot", Path("clips"), videos, 0, machine())[1])

    assert "fewer than 9 frames.\nWith num_frames 1, the run learns pictures" in needs(4)
    assert "pictures" not in needs(9)
    assert "pictures" not in needs(4, *[60] * 4)


def test_the_rate_is_the_models_unless_the_videos_are_slower() -> None:
    def rates(*fps: float) -> tuple[float, str]:
        found = choices(*(info(fps=rate) for rate in fps))
        return found["fps"], found["fps_policy"]

    assert rates(24) == (24, "keep")
    assert rates(23.976, 24) == (24, "keep")
    assert rates(30, 30) == (24, "resample")
    assert rates(15, 15) == (15, "keep")
    assert rates(15, 15, 24) == (15, "resample")
    rows, _ = new_recipe.propose("robot", Path("clips"), [info(fps=30)] * 2, 0, machine())
    assert {row.key: row.because for row in rows}["fps_policy"] == "30 fps is resampled to 24"


def test_lengths_are_counted_at_the_proposed_rate() -> None:
    assert choices(info(240, fps=60.0))["num_frames"] == 89  # 4 s are 96 frames at 24 fps


def test_the_shape_follows_the_videos() -> None:
    def shape(*sizes: tuple[int, int]) -> tuple[int, int, str]:
        found = choices(*(info(height=height, width=width) for height, width in sizes))
        return found["height"], found["width"], found["resize"]

    assert shape((720, 1280)) == (704, 1280, "crop")
    assert shape((480, 640)) == (480, 640, "crop")
    assert shape((250, 330)) == (240, 320, "crop")
    assert shape((540, 960)) == (704, 1280, "crop")
    assert shape((1920, 1080)) == (1280, 704, "crop")
    assert shape((720, 1280), (720, 1280), (1080, 1080)) == (704, 1280, "crop")
    assert shape((1000, 1000)) == (704, 1280, "pad")
    # A strip is wider than any size that the model can take.
    assert shape((100, 3000)) == (96, 1920, "crop")


def test_clips_are_counted_as_prep_holds_videos_out() -> None:
    for count in (1, 2, 3, 4, 8, 9, 24):
        rows, _ = new_recipe.propose("robot", Path("clips"), [info(121)] * count, 0, machine())
        found = {row.key: row for row in rows}
        content = {f"{i}.mp4": str(i) for i in range(count)}
        held_out = holdout.choose_held_out(content, found["holdout_share"].value)
        assert f"each of {count - len(held_out)} clips" in found["max_steps"].because


GPUS = ("1xRTX-4090", "1xH100-80GB", "4xL40S", "8xH100-80GB")


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("size", [(240, 320), (480, 640), (1080, 1920)])
@pytest.mark.parametrize("count", [5, 24, 200, 2000])
def test_a_new_recipe_fits_and_ends_within_twelve_hours(
    workplace: Path, gpus: str, size: tuple[int, int], count: int
) -> None:
    videos = [info(150, 30.0, *size)] * count
    lines, needs = new_recipe.propose("robot", Path("clips"), videos, 0, machine(gpus))
    header = ["Written by `cosmos recipes new robot` from videos.", *needs]
    files.write_text(workplace / "robot.yaml", new_recipe.to_yaml(lines, header))
    assert run_json("check", "robot.yaml")["warnings"] == []
    r, ranks = loading.load("robot.yaml").recipe, machine(gpus)
    found = plan.plan(r, ranks.count, ranks.gpu)
    assert found.total_gb <= ranks.gpu.memory_gb * plan.COMFORTABLE
    assert found.run_hours is not None
    assert found.run_hours <= 12
    assert r.max_steps >= 200
    assert r.global_batch_size % ranks.count == 0
    assert (r.lora_rank == 0) == (count >= 100 and gpus != "1xRTX-4090")
    assert r.height <= size[0] + 16
    short = found.run_hours < 0.1
    hours = duration(found.run_hours * 3600) if short else f"{found.run_hours:.1f} hours"
    assert hours in " ".join(needs)


def test_a_gpu_that_is_too_small_is_named_with_what_would_do(workplace: Path) -> None:
    tiny_gpu = Machine(1, replace(machine("1xRTX-4090").gpu, memory_gb=2.0), "--gpus says so")
    _, needs = new_recipe.propose("robot", Path("clips"), [info()] * 5, 0, tiny_gpu)
    assert "does not fit" in needs[-1]
    slow = Machine(1, replace(machine("1xRTX-4090").gpu, tflops=0.5), "--gpus says so")
    _, needs = new_recipe.propose("robot", Path("clips"), [info()] * 5, 0, slow)
    assert "does not end within 12 hours" in needs[-1]


def test_the_run_is_long_enough_for_the_clips_and_its_warm_up_ends() -> None:
    steps = [choices(*[info()] * n)["max_steps"] for n in (1, 100, 10_000)]
    assert steps == [200, 600, 2000]
    found = choices(info())
    assert found["warmup_steps"] < found["save_every_steps"] < found["max_steps"]


def test_a_prompt_is_proposed_only_where_captions_are_missing() -> None:
    assert choices(info(), captioned=1)["prompt"] is None
    assert choices(info(), info(), captioned=1)["prompt"] == "A video of robot."


def test_a_new_dataset_leaves_the_folder_of_the_videos_alone(workplace: Path) -> None:
    def places(folder: Path) -> tuple[Path, Path]:
        dataset = new_recipe.dataset_of("robot", folder)
        return dataset.root, dataset.videos

    bare = workplace / "videos"
    bare.mkdir()
    assert places(bare) == (Path("datasets/robot"), bare)
    assert places(workplace) == (workplace, bare)
    (workplace / "metas").mkdir()
    assert places(bare) == (workplace, bare)


def write_mp4(path: Path, frames: int) -> None:
    import torch
    from torchcodec.encoders import VideoEncoder

    noise = torch.randint(0, 255, (frames, 3, 64, 96), dtype=torch.uint8)
    VideoEncoder(noise, frame_rate=24.0).to_file(str(path))


def test_new_writes_a_recipe_that_loads_from_real_videos(workplace: Path) -> None:
    clips = workplace / "clips"
    clips.mkdir()
    write_mp4(clips / "a.mp4", 30)
    (clips / "broken # \n.mp4").write_bytes(b"not a video")
    answer = run_json("new", "robot", "--videos", "clips")
    assert answer["videos"] == 1
    assert "broken" in answer["left_out"][0]
    text = (workplace / "robot.yaml").read_text()
    body = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("  # because " in line for line in body)
    r = loading.load("robot.yaml").recipe
    assert (r.num_frames, r.fps_policy, r.videos_dir, r.name) == (25, "keep", "clips", "robot")
    error = fail("new", "robot", "--videos", "clips")
    assert (error.code, error.where) == (ExitCode.USAGE, "robot.yaml")
    assert r.prompt
    (clips / "metadata.csv").write_text("file_name,text\na.mp4,A robot waves.\n")
    run("new", "robot", "--videos", "clips", "--yes")
    assert loading.load("robot.yaml").recipe.prompt is None, "its caption is in the table"


def test_new_refuses_a_bad_name_and_a_folder_without_videos(workplace: Path) -> None:
    assert fail("new", "../robot", "--videos", ".").code == ExitCode.USAGE
    assert fail("new", "robot", "--videos", ".").code == ExitCode.DATASET
    assert fail("new", "robot", "--videos", "nowhere").code == ExitCode.DATASET
    (workplace / "a.mp4").write_bytes(b"not a video")
    assert "none of 1 videos can be used ('a.mp4': " in str(fail("new", "robot", "--videos", "."))
    assert not (workplace / "robot.yaml").exists()
