"""Trackers follow a run from a process of their own and cannot harm it."""

import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosmos_cli.train import status
from tests.helpers.runs import copy_of, find_run, options, train

pytestmark = pytest.mark.workflow

PAIRS = (
    "tracker=tensorboard", "num_processes=1", "save_every_steps=2", "preview_every_steps=2",
    "preview_share=1",
)  # fmt: skip


@pytest.fixture
def cosmos(prepared, tmp_path):
    return copy_of(prepared, tmp_path)


def test_tensorboard_shows_all_rows_and_pictures_of_a_resumed_run_once(cosmos):
    for steps in (2, 3):
        train(cosmos, "board", *PAIRS, f"max_steps={steps}")
    run = find_run(cosmos, "board")
    events = EventAccumulator(str(run.root / "tensorboard")).Reload()
    for name in ("loss", "learning_rate", "grad_norm"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        rows = [(row["step"], row[name]) for row in status.rows(run) if name in row]
        assert [step for step, _ in shown] == [step for step, _ in rows] == [1, 2, 3]
        assert shown == [pytest.approx(row, rel=1e-6) for row in rows]
    assert [event.step for event in events.Images("preview")] == [0, 2, 3]


def test_a_failing_tracker_gives_a_warning_and_does_not_end_the_run(cosmos):
    folder = cosmos.cwd / "outputs" / "posttraining" / "diffusion_text2world" / "broken"
    folder.mkdir(parents=True)
    (folder / "tensorboard").touch()
    err = train(cosmos, "broken", *PAIRS, "max_steps=1").stderr
    assert "warning: tensorboard does not show all of the run" in err
    assert (folder / "log" / "tracker.log").read_text()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(cosmos):
    refused = cosmos("train", "tiny", *options("none", *PAIRS, "tracker=wandb"), code=3)
    assert "the package wandb is not installed" in refused.stderr
    assert not (cosmos.cwd / "outputs").exists()
