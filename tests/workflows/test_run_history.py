"""Measuring on held-out videos, and what a run says about itself, in real processes."""

import json
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from cosmos_cli import files, hashes
from cosmos_cli.prep import holdout
from cosmos_cli.train import page, status
from tests.helpers.command import Cosmos
from tests.helpers.runs import copy_of, find_run, losses, options, train, wait_for_step

pytestmark = pytest.mark.workflow

SPLIT = ("holdout_share=0.3", "micro_batch_size=1")


@pytest.fixture(scope="module")
def cosmos(prepared, tmp_path_factory):
    """A prepared dataset of six clips, two of them, of one video, held out."""
    cosmos = copy_of(prepared, tmp_path_factory.mktemp("split"))
    cosmos("prep", "tiny", *options("x", *SPLIT))
    return cosmos


def errors(run):
    return {row["step"]: row["heldout"] for row in status.rows(run) if "heldout" in row}


@pytest.fixture(scope="module")
def measured(cosmos):
    """A run of one process, saved at steps 3 and 5."""
    pairs = (*SPLIT, "max_steps=5", "validate_every_steps=2")
    done = train(cosmos, "one", *pairs, "num_processes=1", words=["--json"])
    return json.loads(done.stdout), find_run(cosmos, "one"), pairs


def test_the_held_out_error_is_measured_at_step_0_and_when_due(measured):
    result, run, _ = measured
    assert list(errors(run)) == [0, 2, 3, 4, 5]
    assert (result["clips"], result["heldout_clips"]) == (4, 2)
    assert [row[0] for row in losses(run)] == [1, 2, 3, 4, 5]


def test_the_error_is_the_same_for_two_processes(cosmos, measured):
    _, one, pairs = measured
    train(cosmos, "two", *pairs, "num_processes=2")
    two = find_run(cosmos, "two")
    assert errors(one) == pytest.approx(errors(two), rel=1e-4)


def test_held_out_clips_are_measured_and_not_trained_on(cosmos, measured, tmp_path):
    _, one, pairs = measured
    shutil.copytree(cosmos.cwd / "datasets", tmp_path / "datasets")
    other = Cosmos(tmp_path)
    path = tmp_path / "datasets" / "tiny" / "manifest.json"
    manifest = files.read_json(path)
    for clip in holdout.split_clips(manifest)[1]:
        latent = path.with_name("latents") / Path(clip["latent"]).name
        save_file({"latent": load_file(latent)["latent"] + 1}, latent)
        clip["sha256"] = hashes.sha256_file(latent)
    files.write_json(path, manifest)
    train(other, "one", *pairs, "num_processes=1")
    run = find_run(other, "one")
    assert losses(run) == losses(one)
    assert all(error != errors(one)[step] for step, error in errors(run).items())


def test_the_best_saved_step_is_named_and_promoted(cosmos, measured):
    result, run, pairs = measured
    error = errors(run)
    best = min((3, 5), key=error.get)
    assert result["best_step"] == files.read_json(run.result)["best_step"] == best
    assert result["next"].endswith("--step best")
    done = cosmos.json("promote", "tiny", *options("one", *pairs), "--step", "best")
    assert done["step"] == best


def test_a_resumed_run_measures_the_same_as_an_uninterrupted_one(cosmos, measured):
    _, one, pairs = measured
    for steps in (3, 5):
        train(cosmos, "again", *pairs, "num_processes=1", f"max_steps={steps}")
    again = find_run(cosmos, "again")
    assert errors(again) == errors(one)
    assert losses(again) == losses(one)
    # The errors of other clips say nothing about these.
    more = ("num_processes=1", "max_steps=6", "validate_clips=1")
    assert "the held-out clips have changed" in train(cosmos, "again", *pairs, *more).stderr
    assert sorted(errors(again)) == [5, 6]
    assert losses(again)[:5] == losses(one)


def test_the_page_of_a_run_is_self_contained_and_shows_its_metrics(measured):
    _, run, _ = measured
    text = run.report.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)
    for words in ("held-out", "EDM error by noise band", "learning rate", "global_batch_size: 2"):
        assert words in text
    assert text.count("<svg") == 7
    page.write_page(run)
    assert text.partition("<h2>Error")[2] == run.report.read_text().partition("<h2>Error")[2]


def test_promote_best_is_refused_without_held_out_measurements(prepared, tmp_path):
    cosmos = copy_of(prepared, tmp_path)
    pairs = ("max_steps=1", "num_processes=1", "holdout_share=0")
    cosmos("prep", "tiny", *options("blind", *pairs))
    train(cosmos, "blind", *pairs)
    refused = cosmos("promote", "tiny", *options("blind", *pairs), "--step", "best", code=4)
    assert "held-out" in refused.stderr
    assert cosmos.json("train", "tiny", *options("blind", *pairs))["step"] == 1


def wait_until(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_running_run_saves_on_request_and_reports_its_status(cosmos):
    pairs = (*SPLIT, "num_processes=2", "save_every_steps=5000", "max_steps=5000")
    ask = ("train", "tiny", *options("asked", *pairs), "--status")
    nothing = cosmos(*ask, code=4)
    assert "there is no run" in nothing.stderr

    process = cosmos.start("train", "tiny", *options("asked", *pairs))
    children = psutil.Process(process.pid).children
    wait_until(lambda: len(children(recursive=True)) == 3, process)
    # Nothing can be saved yet, and no rank may die of being asked.
    process.send_signal(signal.SIGUSR1)
    wait_for_step(cosmos, "asked", process, 3)
    run = find_run(cosmos, "asked")
    before = len(run.resumable_steps())

    run.save_request.touch()
    wait_until(lambda: len(run.resumable_steps()) == before + 1, process)
    assert not run.save_request.exists()
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(run.resumable_steps()) == 2, process)
    wait_until(lambda: status.state(run)["step"] > run.resumable_steps()[-1], process)
    stands = cosmos.json(*ask)
    assert stands["state"] == "running"
    assert stands["saved_steps"][-1] == run.resumable_steps()[-1]
    assert stands["best_step"] in stands["saved_steps"]
    assert 0 < stands["seconds_per_step"] < stands["seconds_left"]

    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    stands = cosmos.json(*ask)
    assert stands["state"] == "stopped"
    assert stands["step"] == stands["saved_steps"][-1]
    assert "state      stopped" in cosmos(*ask).stdout
