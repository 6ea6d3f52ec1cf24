"""What a run shows while it trains: previews, samples, their page, and trackers."""

import signal
import time

import pytest
from PIL import Image

from cosmos_cli import files
from cosmos_cli.train import status
from tests.helpers.runs import copy_of, find_run, losses, options, train

pytestmark = pytest.mark.workflow

PICTURES = (
    "preview_every_steps=2", "sample_every_saves=1", "preview_clips=3", "preview_share=1",
    "num_steps=2", "max_steps=5", "micro_batch_size=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def cosmos(prepared, tmp_path_factory):
    return copy_of(prepared, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def shown(cosmos):
    """A run of two processes with pictures; tiny's share of held-out videos gives few clips."""
    return train(cosmos, "shown", *PICTURES, "num_processes=2").stderr


def picture(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def test_pictures_are_made_at_step_0_when_due_and_at_the_end(cosmos, shown):
    run = find_run(cosmos, "shown")
    assert run.picture_steps("preview") == [0, 2, 4, 5]
    assert run.picture_steps("sample0") == [0, 3, 5]
    assert "pictures took" in shown
    clips = len(files.read_json(run.sample_prompts(5)))
    assert picture(run.preview(0)).size == (800, clips * round(64 * 200 / 96))
    assert all(run.sample(5, i).exists() for i in range(clips))


def test_pictures_do_not_change_the_training(cosmos, shown):
    off = ("preview_every_steps=0", "sample_every_saves=0", "num_processes=2")
    train(cosmos, "hidden", *PICTURES, *off)
    hidden = find_run(cosmos, "hidden")
    assert not hidden.samples.exists()
    assert losses(hidden) == losses(find_run(cosmos, "shown"))


def test_pictures_show_the_model_under_training(cosmos, shown):
    run = find_run(cosmos, "shown")
    first, last = (picture(run.preview(step)) for step in (0, 5))
    # Away from the seam, which JPEG blurs.
    clip, estimates = (0, 0, 184, first.height), (216, 0, 800, first.height)
    assert first.crop(clip).tobytes() == last.crop(clip).tobytes()
    assert first.crop(estimates).tobytes() != last.crop(estimates).tobytes()


def test_one_process_makes_the_same_samples_as_two(cosmos, shown):
    train(cosmos, "alone", *PICTURES, "num_processes=1", "max_steps=1")
    rows = [status.rows(find_run(cosmos, name))[1] for name in ("alone", "shown")]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    assert rows[0]["nearest_clip"] > 0


def test_the_page_shows_pictures_and_distances_to_training_clips(cosmos, shown):
    page = find_run(cosmos, "shown").report.read_text()
    assert page.count("data:image/jpeg") >= 4 + 3
    for words in ("<h2>Previews", "<h2>Samples", "<span>sigma 0.5<", "A square moves right"):
        assert words in page
    assert "distance to the nearest training clip" in page


def test_pictures_beyond_preview_share_are_skipped(cosmos):
    pairs = ("num_processes=1", "preview_share=1e-6", "max_steps=4")
    err = train(cosmos, "thrifty", *PICTURES, *pairs).stderr
    run = find_run(cosmos, "thrifty")
    assert run.picture_steps("preview") == run.picture_steps("sample0") == [0]
    assert err.count("previews are skipped for") == 1


def test_samples_of_step_0_that_a_stop_interrupts_are_made_by_the_next_start(cosmos):
    pairs = ("num_processes=1", "max_steps=1", "preview_every_steps=0")
    slow = options("stopped", *PICTURES, *pairs, "num_steps=1000")
    process = cosmos.start("train", "tiny", *slow)
    while "held-out error" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "step 0: no samples, the run is stopping" in err
    run = find_run(cosmos, "stopped")
    assert run.resumable_steps() == run.picture_steps("sample0") == []
    train(cosmos, "stopped", *PICTURES, *pairs)
    assert run.picture_steps("sample0") == [0, 1]


def test_samples_are_made_on_request_and_a_resume_deletes_later_ones(cosmos):
    pairs = ("sample_every_saves=0", "num_processes=1", "max_steps=3")
    train(cosmos, "asked", *PICTURES, *pairs)
    run = find_run(cosmos, "asked")
    assert run.picture_steps("sample0") == []
    later = run.preview(99)
    later.touch()
    run.sample_request.touch()
    train(cosmos, "asked", *PICTURES, *pairs[:2], "max_steps=5")
    assert run.picture_steps("sample0") == [4]
    assert not run.sample_request.exists()
    assert not later.exists()
