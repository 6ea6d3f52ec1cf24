"""The prep verb on folders like those that users have."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cosmos_cli.commands import prep
from cosmos_cli.model import mp4
from cosmos_cli.prep import page, prepare, sources, work_sharing
from cosmos_cli.recipe import loading
from tests.helpers.command import SMALL, Cosmos, settings
from tests.helpers.stand_ins import moving_square

pytestmark = pytest.mark.workflow

PROMPT = "prompt=A video of a square."


def write(folder, name, frames=25, size=(64, 96), fps=12):
    folder.mkdir(parents=True, exist_ok=True)
    mp4.write_mp4(folder / name, moving_square(frames, *size), fps, 18)


@pytest.fixture
def mixed(tmp_path):
    """Good videos of several sizes and rates, and four kinds of bad ones."""
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "landscape.mp4", 60, (160, 288), 30)
    write(videos, "portrait ünï.mp4", 30, (160, 90), 24)
    write(videos, "odd rate.mp4", 60, (96, 96), 59.94)
    write(videos, "short.mp4", 5)
    write(videos, "whole.mp4", 60)
    content = (videos / "whole.mp4").read_bytes()
    (videos / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (videos / "text.mp4").write_text("These are words.\n")
    (videos / "empty.mp4").touch()
    return Cosmos(tmp_path)


def verdicts(result):
    return {row["file"]: (row["verdict"], row["reason"]) for row in result["videos"]}


# What tells when and by whom the rest was made.
JOURNAL = {"prep.log", "prep.lock", "report.html"}


def snapshot(dataset):
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in sorted(dataset.rglob("*"))
        if path.is_file() and path.name not in JOURNAL
    }


def test_good_videos_are_used_and_each_bad_one_is_named_with_its_reason(mixed):
    result = mixed.json("prep", "tiny", *settings(PROMPT))
    found = verdicts(result)
    good = {"landscape.mp4", "portrait ünï.mp4", "odd rate.mp4", "whole.mp4"}
    assert {name for name, (verdict, _) in found.items() if verdict == "used"} == good
    assert "from 5 at 12" in found["short.mp4"][1]
    assert "truncated" in found["truncated.mp4"][1]
    assert "not a video" in found["text.mp4"][1]
    assert "empty" in found["empty.mp4"][1]
    assert (result["used"], result["rejected"]) == (4, 4)
    log = mixed.cwd / "datasets" / "tiny" / "prep.log"
    assert "short.mp4: rejected" in log.read_text()


def test_artifacts_have_the_documented_formats(mixed):
    mixed("prep", "tiny", *settings(PROMPT))
    dataset = mixed.cwd / "datasets" / "tiny"
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert (dataset / "metas" / "whole.txt").read_text().strip() == "A video of a square."
    (embedding,) = pickle.loads((dataset / "t5_xxl" / "whole.pickle").read_bytes())
    assert str(embedding.dtype) == "float16"
    assert embedding.shape[1] == 128
    clip = next(c for c in manifest["clips"] if c["video"] == "whole.mp4")
    with safe_open(dataset / clip["latent"], framework="pt") as stream:
        assert tuple(stream.get_tensor("latent").shape) == (16, 2, 8, 12)
    # 60 frames at 12 fps are 80 at the 16 of the recipe.
    assert len([c for c in manifest["clips"] if c["video"] == "whole.mp4"]) == 80 // 9


def test_strict_recipe_refuses_a_folder_with_a_bad_video(mixed):
    refused = mixed("prep", "tiny", *settings(PROMPT, "strict=true"), code=5)
    for name in ("short.mp4", "truncated.mp4", "text.mp4", "empty.mp4"):
        assert name in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (mixed.cwd / "datasets" / "tiny" / "manifest.json").exists()


def test_nothing_usable_is_exit_code_five(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "short.mp4", 5)
    cosmos = Cosmos(tmp_path)
    assert "short.mp4" in cosmos("prep", "tiny", *settings(PROMPT), code=5).stderr
    (videos / "short.mp4").unlink()
    assert "holds no videos" in cosmos("prep", "tiny", *settings(PROMPT), code=5).stderr
    shutil.rmtree(tmp_path / "datasets")
    assert str(videos.parent) in cosmos("prep", "tiny", *settings(PROMPT), code=5).stderr


def test_a_video_without_a_caption_is_rejected_by_name(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "silent.mp4")
    write(videos, "told.mp4")
    (videos / "told.txt").write_text("A square beside its caption.\n")
    result = Cosmos(tmp_path).json("prep", "tiny", *settings())
    assert "no caption" in verdicts(result)["silent.mp4"][1]
    assert verdicts(result)["told.mp4"] == ("used", "")


def test_a_bare_folder_of_videos_is_accepted(tmp_path):
    write(tmp_path / "my clips", "a.mp4")
    arguments = settings(PROMPT, "dataset_dir=my clips")
    assert Cosmos(tmp_path).json("prep", "tiny", *arguments)["used"] == 1
    assert (tmp_path / "my clips" / "latents").is_dir()


def test_only_a_changed_prompt_changes_a_byte_in_a_second_run(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a.mp4")
    cosmos, dataset = Cosmos(tmp_path), videos.parent
    cosmos("prep", "tiny", *settings(PROMPT))
    first = snapshot(dataset)
    times = {p: p.stat().st_mtime_ns for p in dataset.glob("*/a.*")}
    cosmos("prep", "tiny", *settings(PROMPT))
    assert snapshot(dataset) == first
    assert {p: p.stat().st_mtime_ns for p in dataset.glob("*/a.*")} == times
    cosmos("prep", "tiny", *settings("prompt=Quite another thing."))
    second = snapshot(dataset)
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {
        "metas/a.txt", "t5_xxl/a.pickle", "manifest.json", "prep_captions.json", "resolved.yaml"
    }  # fmt: skip


def test_a_caption_that_was_copied_with_its_time_reaches_the_embedding(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a.mp4")
    cosmos, dataset = Cosmos(tmp_path), videos.parent
    cosmos("prep", "tiny", *settings(PROMPT))
    before = (dataset / "t5_xxl" / "a.pickle").read_bytes()
    meta = dataset / "metas" / "a.txt"
    meta.write_text("Quite another thing.")
    os.utime(meta, (0, 0))
    cosmos("prep", "tiny", *settings(PROMPT))
    assert (dataset / "t5_xxl" / "a.pickle").read_bytes() != before


def test_a_prompt_of_an_interrupted_run_is_not_taken_for_a_caption(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a.mp4")
    write(videos, "b.mp4")
    cosmos, dataset = Cosmos(tmp_path), videos.parent
    (dataset / "t5_xxl").mkdir()
    # Ends the first run after it has written the captions.
    (dataset / "t5_xxl" / "a.pickle").mkdir()
    cosmos("prep", "tiny", *settings("prompt=Wrong words."), code=4)
    assert (dataset / "metas" / "a.txt").read_text() == "Wrong words.\n"
    (dataset / "t5_xxl" / "a.pickle").rmdir()
    cosmos("prep", "tiny", *settings("prompt=Right words."))
    assert (dataset / "metas" / "a.txt").read_text() == "Right words.\n"
    result = cosmos.json("prep", "tiny", *settings())
    assert result["used"] == 2


def test_train_does_not_need_the_prompt_given_to_prep(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a.mp4")
    cosmos = Cosmos(tmp_path)
    cosmos("prep", "tiny", *settings(PROMPT))
    cosmos("train", "tiny", *settings("min_free_disk_gb=0.1"), "--dry-run")


def test_an_interrupted_second_run_leaves_no_manifest(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a.mp4")
    write(videos, "b.mp4")
    cosmos, dataset = Cosmos(tmp_path), videos.parent
    cosmos("prep", "tiny", *settings(PROMPT))
    (dataset / "latents" / "b.000000.safetensors").unlink()
    (dataset / "latents" / "b.000000.safetensors").mkdir()
    cosmos("prep", "tiny", *settings(PROMPT, "resize=pad"), code=4)
    refused = cosmos("train", "tiny", *settings(), code=5)
    assert "cosmos prep" in refused.stderr


def test_a_foreign_manifest_is_left_alone(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a.mp4")
    foreign = videos.parent / "manifest.json"
    foreign.write_text('{"a": 1}')
    for verb in ("prep", "train"):
        refused = Cosmos(tmp_path)(verb, "tiny", *settings(PROMPT), code=5)
        assert "was not written by cosmos prep" in refused.stderr
    assert foreign.read_text() == '{"a": 1}'


def test_a_latent_is_made_again_when_its_video_changes(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a.mp4")
    write(videos, "b.mp4")
    cosmos, dataset = Cosmos(tmp_path), videos.parent
    cosmos("prep", "tiny", *settings(PROMPT))
    first = snapshot(dataset)
    write(videos, "a.mp4", 20, (80, 80))
    (videos / "b.mp4").unlink()
    cosmos("prep", "tiny", *settings(PROMPT))
    second = snapshot(dataset)
    assert first["latents/a.000000.safetensors"] != second["latents/a.000000.safetensors"]
    assert "latents/b.000000.safetensors" not in second


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_a_signal_leaves_no_partial_file_and_the_command_resumes(tmp_path, number, code):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    for i in range(15):
        write(videos, f"{i:02d}.mp4", 60)
    cosmos, dataset = Cosmos(tmp_path), videos.parent
    process = cosmos.start("prep", "tiny", *settings(PROMPT))
    deadline = time.monotonic() + 60
    while len(list(dataset.glob("latents/*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert not list(dataset.rglob("*.tmp*"))
    assert not (dataset / "manifest.json").exists()
    made = snapshot(dataset)
    cosmos("prep", "tiny", *settings(PROMPT))
    after = snapshot(dataset)
    assert all(after[name] == content for name, content in made.items())
    assert "manifest.json" in after


def test_a_hostile_embedding_is_refused_and_never_runs(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a.mp4")
    (videos.parent / "metas").mkdir()
    (videos.parent / "metas" / "a.txt").write_text("A square.\n")
    (videos.parent / "t5_xxl").mkdir()
    target = videos.parent / "t5_xxl" / "a.pickle"
    target.write_bytes(b"cos\nmkdir\n(V" + str(tmp_path / "executed").encode() + b"\ntR.")
    refused = Cosmos(tmp_path)("prep", "tiny", *settings(), code=4)
    assert "posix.mkdir" in refused.stderr or "os.mkdir" in refused.stderr
    assert not (tmp_path / "executed").exists()


def test_dry_run_writes_nothing(mixed):
    before = snapshot(mixed.cwd)
    done = mixed("prep", "tiny", *settings(PROMPT), "--dry-run")
    assert "whole.mp4" in done.stdout
    assert snapshot(mixed.cwd) == before


# --- the report -----------------------------------------------------------------------------------


def test_the_report_shows_every_video_and_loads_nothing(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "a <b>.mp4", 60)
    shutil.copy(videos / "a <b>.mp4", videos / "copy.mp4")
    halves = torch.cat([moving_square(9, 64, 96), 255 - moving_square(9, 64, 96)], dim=1)
    mp4.write_mp4(videos / "cut.mp4", halves, 16, 18)
    write(videos, "short.mp4", 5)
    (videos / "text.mp4").write_text("words")
    arguments = settings("prompt=A <i>square</i>.", "num_frames=17", "check_every_clips=2")
    done = Cosmos(tmp_path)("prep", "tiny", *arguments)
    text = (videos.parent / "report.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 4
    # 80 frames at 16 fps are four clips, twice, and 18 frames one more.
    assert text.count("data:video/mp4;base64,") == 9 // 2
    assert text.count("PSNR") == 9 // 2
    for words in (
        "a &lt;b&gt;.mp4", "A &lt;i&gt;square&lt;/i&gt;.", "rejected: not a video",
        "rejected: too short: 7 frames", "copy.mp4: has the same bytes as a &lt;b&gt;.mp4",
        "cut.mp4: there seems to be a hard cut at 0.56 s", "motion of a clip",
        "disk of the latents", ">inspect</td>",
    ):  # fmt: skip
        assert words in text, words
    assert "a &lt;b&gt;.mp4: the clip" not in text
    assert "<i>" not in text
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import""", text)
    assert "4 clips decoded back: PSNR" in done.stderr


def test_the_report_of_many_videos_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_PICTURES", 2)
    monkeypatch.chdir(tmp_path)
    videos = tmp_path / "datasets" / "tiny" / "videos"
    for i in range(4):
        write(videos, f"{i}.mp4", 9, fps=16)
    prepare.prepare(loading.load("tiny", [*SMALL, PROMPT]).recipe, "cpu")
    text = (videos.parent / "report.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 2
    assert "Pictures are of 2 videos" in text
    assert all(f">{i}.mp4</td>" in text for i in range(4))


# --- captions -------------------------------------------------------------------------------------


def test_captions_come_from_the_documented_place_also_after_a_change(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    for name in "abcd":
        write(videos, f"{name}.mp4", 9, fps=16)
    (videos.parent / "metas").mkdir()
    (videos.parent / "metas" / "a.txt").write_text("From metas.")
    listed = tmp_path / "captions.csv"
    listed.write_text("file,caption\na.mp4,Listed.\nb.mp4,Listed.\nz.mp4,Nobody.\n")
    for name in "abc":
        (videos / f"{name}.txt").write_text("Beside.")
    cosmos, arguments = Cosmos(tmp_path), settings(PROMPT, f"captions_file={listed}")

    def found():
        rows = json.loads((videos.parent / "manifest.json").read_text())["videos"]
        return [(row["caption"], row["caption_source"]) for row in rows]

    done = cosmos("prep", "tiny", *arguments)
    assert "1 row of captions_file belongs to no video" in done.stderr
    assert "line 4 'z.mp4'" in done.stderr
    assert f"report: {videos.parent / 'report.html'}" in done.stderr
    first = [("From metas.", "metas"), ("Listed.", "captions_file"), ("Beside.", "sidecar")]
    assert found() == [*first, ("A video of a square.", "prompt")]
    listed.write_text("file,caption\nc.mp4,Now listed.\n")
    cosmos("prep", "tiny", *arguments)
    assert found()[0] == first[0]
    assert found()[1:3] == [("Beside.", "sidecar"), ("Now listed.", "captions_file")]
    (videos.parent / "metas" / "c.txt").write_text("By hand.\n")
    cosmos("prep", "tiny", *arguments)
    assert found()[2] == ("By hand.", "metas")
    listed.write_text("file,caption\nc.mp4\n")
    refused = cosmos("prep", "tiny", *arguments, code=5)
    assert "captions.csv:2: has no caption" in refused.stderr


# --- several processes, and the end of one --------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder of eight videos with five captions; what one process makes of it."""
    root = tmp_path_factory.mktemp("undisturbed")
    videos = root / "datasets" / "tiny" / "videos"
    for i in range(8):
        write(videos, f"{i}.mp4", 40, (96, 160))
        if i % 2:
            (videos / f"{i}.txt").write_text(f"Take {i}, " + "a square moves " * i)
    content = (videos / "7.mp4").read_bytes()
    (videos / "truncated.mp4").write_bytes(content[: len(content) // 2])
    shutil.copytree(videos, root / "videos")
    Cosmos(root)("prep", "tiny", *settings(PROMPT))
    return root / "videos", snapshot(videos.parent)


def fresh(undisturbed, root):
    """A folder to prepare the same videos in again."""
    shutil.copytree(undisturbed[0], root / "datasets" / "tiny" / "videos")
    return Cosmos(root), root / "datasets" / "tiny"


def wait_for(path, process):
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_the_tasks_of_an_array_end_with_the_bytes_of_one_process(undisturbed, tmp_path):
    cosmos, dataset = fresh(undisturbed, tmp_path)
    numbers = [{"SLURM_ARRAY_TASK_ID": number} for number in range(3)]
    for task in cosmos.together(numbers, "prep", "tiny", *settings(PROMPT)):
        assert task.returncode == 0, task.stderr
    assert snapshot(dataset) == undisturbed[1]
    # The copies are told by the order of the videos, whoever made them.
    text = (dataset / "report.html").read_text()
    assert ">7.mp4: has the same bytes as 0.mp4" in text
    assert ">0.mp4: has" not in text


def test_the_last_process_removes_the_files_of_a_killed_one(undisturbed, tmp_path, monkeypatch):
    cosmos, dataset = fresh(undisturbed, tmp_path)
    cosmos("prep", "tiny", *settings(PROMPT))
    monkeypatch.chdir(tmp_path)
    r = loading.load("tiny", [*SMALL, PROMPT]).recipe
    job = prepare._job(r, sources.inspect(r, r.dataset))
    with work_sharing.workers(dataset / "prep.lock", job) as workers:
        workers.start()
        (dataset / ".99999999.report.tmp").mkdir()
        shutil.rmtree(dataset / "latents")
        other = cosmos.start("prep", "tiny", *settings(PROMPT))
        # Then it works at the same time, and waits for us at its end.
        wait_for(dataset / "latents", other)
    _, err = other.communicate(timeout=120)
    assert other.returncode == 0, err
    assert snapshot(dataset) == undisturbed[1]
    assert not list(dataset.rglob(".*.tmp*"))


def test_the_ranks_of_a_launcher_share_the_work_and_one_prints(undisturbed, tmp_path):
    cosmos, dataset = fresh(undisturbed, tmp_path)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "-m",
            "cosmos_cli",
            "prep",
            "tiny",
            *settings(PROMPT),
            "--json",
        ],
        cwd=tmp_path,
        env=cosmos.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout)["used"] == 8
    assert snapshot(dataset) == undisturbed[1]


@pytest.mark.parametrize("victim", ["command", "helper"])
def test_a_helper_process_and_the_command_do_the_work_of_each_other(undisturbed, tmp_path, victim):
    cosmos, dataset = fresh(undisturbed, tmp_path)
    process = cosmos.start("prep", "tiny", *settings(PROMPT, "num_processes=2"))
    while not list(dataset.glob("latents/*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (helper,) = psutil.Process(process.pid).children()
    if victim == "helper":
        helper.kill()
    else:
        # While the command sleeps, its helper does all but the video that the command has begun.
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while len({path.name[0] for path in dataset.glob("latents/*")}) < 7:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "2 processes share 8 videos" in err
    assert ("process 1 stopped with code -9" in err) == (victim == "helper")
    ours, theirs = snapshot(dataset), dict(undisturbed[1])
    # The recipes differ in num_processes.
    assert ours.pop("resolved.yaml") != theirs.pop("resolved.yaml")
    assert ours == theirs
    assert not helper.is_running()


def test_helpers_end_with_the_command(undisturbed, tmp_path):
    cosmos, dataset = fresh(undisturbed, tmp_path)
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = cosmos.start("prep", "tiny", *settings(PROMPT, "num_processes=2"))
        wait_for(dataset / "prep.lock", process)
        while not (helpers := psutil.Process(process.pid).children()):
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == code
        gone, alive = psutil.wait_procs(helpers, timeout=10)
        assert gone and not alive


def test_a_process_with_another_recipe_is_refused_while_one_is_at_work(undisturbed, tmp_path):
    cosmos, dataset = fresh(undisturbed, tmp_path)
    with work_sharing.workers(dataset / "prep.lock", "another job") as workers:
        workers.start()
        refused = cosmos("prep", "tiny", *settings(PROMPT), code=2)
    assert "another `cosmos prep` is working here" in refused.stderr
    assert not (dataset / "metas").exists()
    cosmos("prep", "tiny", *settings(PROMPT))
    assert snapshot(dataset) == undisturbed[1]


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_prep_killed_at_any_moment_and_rerun_gives_the_same_bytes(undisturbed, tmp_path, kills):
    rng = random.Random(kills)
    unfinished = 0
    for i in range(kills):
        cosmos, dataset = fresh(undisturbed, tmp_path / str(i))
        process = cosmos.start("prep", "tiny", *settings(PROMPT))
        # Every second time another process is at work, which continues alone.
        other = cosmos.start("prep", "tiny", *settings(PROMPT)) if i % 2 else None
        wait_for(dataset / "prep.lock", process)
        time.sleep(rng.uniform(0, 2))
        process.kill()
        process.communicate()
        unfinished += not (dataset / "manifest.json").exists()
        if other:
            _, err = other.communicate(timeout=120)
            assert other.returncode == 0, err
        else:
            cosmos("prep", "tiny", *settings(PROMPT))
        assert snapshot(dataset) == undisturbed[1]
        assert not list(dataset.rglob(".*.tmp*"))
    assert unfinished >= kills // 3


def flip_bits(path):
    """Damage a video in the middle of its frames, which stand behind the index."""
    data = bytearray(path.read_bytes())
    middle = (data.index(b"mdat") + len(data)) // 2
    for place in range(middle, middle + 4):
        data[place] ^= 0x5A
    path.write_bytes(data)


def test_flipped_bits_in_a_video_are_rejected_with_their_times(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "good.mp4", 60)
    shutil.copy(videos / "good.mp4", videos / "flipped.mp4")
    flip_bits(videos / "flipped.mp4")
    found = verdicts(Cosmos(tmp_path).json("prep", "tiny", *settings(PROMPT)))
    assert found["good.mp4"] == ("used", "")
    verdict, reason = found["flipped.mp4"]
    assert verdict == "rejected" and re.match(r"damaged from \d\.\d\d to \d\.\d\d s", reason)


def test_checks_in_processes_change_nothing(undisturbed, tmp_path, monkeypatch):
    _, dataset = fresh(undisturbed, tmp_path)
    monkeypatch.chdir(tmp_path)
    r = loading.load("tiny", [*SMALL, PROMPT]).recipe
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    prepare.prepare(r, "cpu")
    assert snapshot(dataset) == undisturbed[1]
    flip_bits(dataset / "videos" / "5.mp4")
    found = {row["file"]: row["reason"] for row in prepare.prepare(r, "cpu")["videos"]}
    assert found.pop("5.mp4").startswith("damaged from ")
    assert set(found.values()) == {"", found["truncated.mp4"]}


def test_an_old_latent_is_kept_only_if_it_shows_the_right_frames(tmp_path):
    videos = tmp_path / "datasets" / "tiny" / "videos"
    write(videos, "right.mp4")
    write(videos, "wrong.mp4", 30)
    cosmos, latents = Cosmos(tmp_path), videos.parent / "latents"
    cosmos("prep", "tiny", *settings(PROMPT))
    for name, motion in (("right", 0.0), ("wrong", 9.0)):
        path = latents / f"{name}.000000.safetensors"
        with safe_open(path, framework="pt") as stream:
            latent, about = stream.get_tensor("latent"), json.loads(stream.metadata()["about"])
        del about["checked"]
        about["look"][0] += motion
        save_file({"latent": latent}, path, {"about": json.dumps(about)})
    before = {path.name: path.read_bytes() for path in latents.iterdir()}
    cosmos("prep", "tiny", *settings(PROMPT))
    changed = [n for n, data in before.items() if (latents / n).read_bytes() != data]
    assert changed == ["wrong.000000.safetensors"]


def test_min_free_disk_gb_is_not_asked_for_by_prep(tmp_path):
    r = loading.load("tiny", [f"dataset_dir={tmp_path}", "min_free_disk_gb=1e9"]).recipe
    prepare._check_disk(r, r.dataset, [])


def test_a_holdout_share_that_holds_out_nothing_is_said(capsys):
    r = loading.load("tiny", ["holdout_share=0.1"]).recipe
    assert "1 held out" in prep._held_out(r, [{"split": "heldout"}, {"split": "train"}])
    assert not capsys.readouterr().err
    prep._held_out(r, [{"split": "train"}])
    assert "holdout_share 0.1 holds out no video" in capsys.readouterr().err
