"""A run without resume states does not start again over its weights, unless it is told to."""

import json
import shlex
import shutil
import time

import psutil
import pytest

from cosmos_cli.hashes import sha256_file
from cosmos_cli.train import status
from tests.helpers.command import Cosmos
from tests.helpers.runs import find_run, options, train

pytestmark = pytest.mark.workflow

PAIRS = ("num_processes=1", "micro_batch_size=1", "max_steps=6")


@pytest.fixture(scope="module")
def cosmos(prepared):
    cosmos = Cosmos(prepared)
    train(cosmos, "original", *PAIRS)
    return cosmos


@pytest.fixture
def copy(cosmos):
    """Makes a copy of a finished run under another name, without the newest resume states."""
    original, made = find_run(cosmos, "original"), []

    def make(name, deleted):
        root = original.root.with_name(name)
        shutil.copytree(original.root, root)
        run = find_run(cosmos, name)
        for step in run.resumable_steps()[2 - deleted :]:
            shutil.rmtree(run.resume_state(step))
        made.append(root)
        return run

    yield make
    for root in made:
        shutil.rmtree(root)


def files(run):
    """The content of everything but the lock and the log."""
    paths = (path for path in run.root.rglob("*") if path.is_file())
    kept = (path for path in paths if path.name != ".lock" and path.parent.name != "log")
    return {str(path.relative_to(run.root)): sha256_file(path) for path in kept}


def figures(run):
    return [{key: row[key] for key in row if key != "seconds"} for row in status.rows(run)]


def models(run):
    return {name: digest for name, digest in files(run).items() if name.endswith("_model.pt")}


def refused(cosmos, name, *more):
    done = cosmos("train", "tiny", *options(name, *PAIRS), *more, code=2)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    return line


@pytest.mark.parametrize("left", ["files", "link", "no status"])
def test_weights_without_resume_states_are_refused_untouched(cosmos, copy, tmp_path, left):
    run = copy("kept", deleted=2)
    if left == "link":
        elsewhere = tmp_path / "big_disk"
        run.checkpoints.rename(elsewhere)
        run.checkpoints.symlink_to(elsewhere)
    if left == "no status":
        run.status.unlink()
    before = files(run)
    for more in ([], ["--dry-run"]):
        line = refused(cosmos, "kept", *more)
        assert "overwriting the weights of 2 saves, steps 3 to 6" in line
    planned = cosmos("train", "tiny", *options("kept", *PAIRS), "--plan")
    assert "overwriting the weights of 2 saves" in planned.stderr
    words = ("train", "tiny", *options("kept", "micro_batch_size=1", "max_steps=6"))
    ranks = cosmos.ranks(2, *words, code=2)
    assert sum("overwriting the weights" in rank.stderr for rank in ranks) == 1
    assert files(run) == before


def test_the_suggested_commands_can_be_pasted(cosmos, copy):
    run = copy("stuck", deleted=2)
    before = files(run)
    another, from_them, again = refused(cosmos, "stuck").split("`")[1::2]
    try:
        assert cosmos.json(*shlex.split(another)[1:], "--dry-run")["from"] == 0
        cosmos(*shlex.split(from_them)[1:], "--set", "max_steps=1")
        log = find_run(cosmos, "stuck-2").resolved.read_text()
        assert f"base: {run.model(6, 'ema')}" in log
        # A name that is taken is not proposed.
        assert "name=stuck-3" in refused(cosmos, "stuck")
    finally:
        shutil.rmtree(run.root.with_name("stuck-2"), ignore_errors=True)
    assert files(run) == before
    assert "--overwrite" in again


def test_overwrite_leaves_nothing_of_the_earlier_run(cosmos, copy):
    run = copy("again", deleted=2)
    run.samples.mkdir()
    (run.samples / "step_000000000_preview.jpg").touch()
    pairs = ("num_processes=1", "micro_batch_size=1", "max_steps=2", "seed=5")
    words = options("again", *pairs)
    assert len(cosmos.json("train", "tiny", *words, "--dry-run", "--overwrite")["deletes"]) == 4
    assert len(run.weight_files()) == 2
    train(cosmos, "again", *pairs, words=["--overwrite"])
    assert [row["step"] for row in status.rows(run) if "loss" in row] == [1, 2]
    assert list(run.weight_files()) == run.resumable_steps() == [2]
    assert not run.samples.exists()
    # Its saves are protected again, and it resumes.
    assert cosmos.json("train", "tiny", *words)["step"] == 2


def test_with_a_resume_state_overwrite_resumes(cosmos, copy):
    run = copy("whole", deleted=0)
    before = models(run)
    done = train(cosmos, "whole", *PAIRS, "max_steps=7", words=["--overwrite"])
    assert "resumed at step 6" in done.stderr
    assert before.items() <= models(run).items()


def test_steps_after_an_older_resume_state_are_reproduced(cosmos, copy):
    run = copy("older", deleted=1)
    original = find_run(cosmos, "original")
    train(cosmos, "older", *PAIRS)
    assert models(run) == models(original)
    assert figures(run) == figures(original)


def test_steps_after_an_older_resume_state_keep_their_weights(cosmos, copy):
    run = copy("other", deleted=1)
    before = files(run)
    rate = "learning_rate=5e-3"
    line = refused(cosmos, "other", "--set", rate)
    assert "would resume at step 3 with another learning_rate" in line
    assert "overwriting the weights of step 6" in line
    assert files(run) == before
    # What decides no weights may change.
    assert cosmos.json(
        "train", "tiny", *options("other", *PAIRS), "--set", "log_every_steps=2", "--dry-run"
    )["from"] == 3  # fmt: skip
    train(cosmos, "other", *PAIRS, rate, "max_steps=4", words=["--overwrite"])
    assert list(run.weight_files()) == [3, 4]


def test_metrics_alone_are_not_overwritten_either(cosmos, copy):
    run = copy("figures", deleted=2)
    for path in run.root.iterdir():
        if path != run.metrics:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files(run)
    assert "overwriting the metrics of the earlier training" in refused(cosmos, "figures")
    assert files(run) == before


def test_a_resume_state_without_its_manifest_does_not_count(cosmos, copy):
    run = copy("torn", deleted=1)
    (run.resume_state(3) / "manifest.json").unlink()
    assert "has no complete resume state" in refused(cosmos, "torn")
    train(cosmos, "torn", *PAIRS, "max_steps=1", words=["--overwrite"])
    assert [path.name for path in run.checkpoints.glob("iter_*") if path.is_dir()] == [
        "iter_000000001"
    ]


def test_a_run_killed_during_its_first_save_starts_again(cosmos):
    for attempt in range(10):
        name = f"first{attempt}"
        process = cosmos.start("train", "tiny", *options(name, *PAIRS))
        everyone = [psutil.Process(process.pid)]
        while process.poll() is None:
            if list(cosmos.cwd.glob(f"outputs/*/*/{name}/checkpoints/iter_*_model.pt")):
                break
            time.sleep(0.001)
        for victim in [*everyone, *everyone[0].children(recursive=True)]:
            victim.kill()
        process.communicate(timeout=60)
        run = find_run(cosmos, name)
        if not run.resumable_steps():
            break
    assert run.weight_files()
    assert json.loads(run.status.read_text())["saved_step"] == 0
    # A second start, killed before it saves, changes nothing about that.
    process = cosmos.start("train", "tiny", *options(name, *PAIRS))
    everyone = [psutil.Process(process.pid)]
    time.sleep(4)
    for victim in [*everyone, *everyone[0].children(recursive=True)]:
        victim.kill()
    process.communicate(timeout=60)
    train(cosmos, name, *PAIRS)
    assert models(run) == models(find_run(cosmos, "original"))


@pytest.mark.slow
def test_a_lora_without_resume_states_continues_by_way_of_promote(cosmos):
    pairs = ("num_processes=1", "max_steps=2", "lora_rank=4", "learning_rate=1e-2")
    checkpoints = ("checkpoints_dir=promoted",)
    words = options("small", *pairs, *checkpoints)
    train(cosmos, "small", *pairs, *checkpoints)
    run = find_run(cosmos, "small")
    shutil.rmtree(run.resume_state(2))
    done = cosmos("train", "tiny", *words, code=2)
    promote, again = done.stderr.split("`")[3].split(" && ")
    cosmos(*shlex.split(promote)[1:])
    cosmos(*shlex.split(again)[1:])
    assert find_run(cosmos, "small-2").weight_files()
