"""Reading a run from outside, from files as a run leaves them."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from PIL import Image

from cosmos_cli import console, files, html
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.paths import Run
from cosmos_cli.train import page, status


@pytest.fixture
def run(tmp_path):
    """A run that is at step 4 of 10, was measured at 0, 2, 3 and 4, and saved at 2."""
    run = Run(tmp_path / "run")
    rows = [
        {"step": 0, "heldout": 0.9, "heldout_sigma_0.32": 0.9},
        {"step": 2, "loss": -0.5, "edm": 0.4, "edm_sigma_below_0.5": None, "learning_rate": 1e-3},
        {"step": 2, "heldout": 0.4, "heldout_sigma_0.32": 0.4},
        {"step": 3, "heldout": 0.3, "heldout_sigma_0.32": 0.3},
        {"step": 4, "loss": -0.7, "edm": 0.3, "edm_sigma_below_0.5": 0.3, "learning_rate": 1e-3},
        {"step": 4, "heldout": 0.5, "heldout_sigma_0.32": 0.5},
    ]
    files.write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    files.write_text(run.resolved, "name: <run>\n")
    files.write_json(run.root / "env.json", {"cosmos": "1.2.3", "gpus": []})
    files.write_text(run.model(2, "ema"), "")
    pace = {"from": 0, "started": time.time() - 20}
    status.note(run, {"step": 4, "max_steps": 10, **pace, **rows[4]})
    return run


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        status.state(Run(tmp_path))
    assert caught.value.code == ExitCode.ASSET


def test_the_best_step_is_one_that_was_saved(run):
    assert status.best_step(run) == 2
    files.write_text(run.lora(4, "ema"), "")
    assert status.best_step(run) == 2
    assert status.state(run)["least_step"] == 3
    words = "step 2, of the saved steps; step 3 had a lower held-out error"
    assert words in status.state_table(status.state(run))
    files.write_text(run.lora(3, "ema"), "")
    assert status.best_step(run) == 3
    assert status.state_table(status.state(run)).endswith("step 3")


def test_a_base_model_that_no_saved_step_improves_is_named(run):
    rows = [{"step": 0, "heldout": 0.3}, {"step": 2, "heldout": 0.4}]
    files.write_text(run.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    assert "the base model had a lower held-out" in status.state_table(status.state(run))


def test_a_status_that_cannot_be_read_leaves_the_saved_step_to_the_files(run):
    files.write_text(run.status, "[" * 200_000)
    assert status.saved_step(run) == 2


def test_a_running_run_has_a_pace_and_a_time_left(run):
    stands = status.state(run)
    assert (stands["state"], stands["step"], stands["max_steps"]) == ("running", 4, 10)
    assert stands["seconds_per_step"] == pytest.approx(5, abs=0.2)
    assert stands["seconds_left"] == pytest.approx(30, abs=2)
    assert stands["last"]["edm"] == 0.3
    assert (stands["heldout_base"]["heldout"], stands["heldout"]["heldout"]) == (0.9, 0.5)
    assert "0.5000 at step 4, 0.9000 before training" in status.state_table(stands)


def test_the_pace_leaves_pictures_out_as_the_bar_does(run):
    bar = console.Progress("train", 10, "steps")
    bar.started -= 8
    began = bar.started
    with bar.paused():
        time.sleep(0.2)
    assert bar.started - began >= 0.2
    bar.advance(count=4)
    files.write_json(run.status, {**files.read_json(run.status), "running_seconds": bar.seconds()})
    stands = status.state(run)
    assert stands["seconds_per_step"] == pytest.approx(2, abs=0.1)
    assert "pace       2." in status.state_table(stands)
    assert bar.rate().startswith("2.")
    assert bar.left() in ("12 s left", "13 s left")


def test_a_run_whose_process_is_gone_without_a_result_has_failed(run):
    stored = files.read_json(run.status)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    files.write_json(run.status, {**stored, "pid": gone.pid})
    assert status.state(run)["state"] == "failed"
    # Another process that has got the number since.
    files.write_json(run.status, {**stored, "pid": os.getpid(), "time": 0})
    assert status.state(run)["state"] == "failed"
    files.write_json(run.status, {**stored, "host": "elsewhere"})
    assert status.state(run)["state"] == "unknown, on elsewhere"


@pytest.mark.parametrize(("code", "name"), [(0, "finished"), (143, "stopped")])
def test_a_run_with_a_result_has_ended(run, code, name):
    files.write_json(run.result, {"step": 4, "exit_code": code})
    stands = status.state(run)
    assert stands["state"] == name
    assert stands["seconds_left"] is None


def test_a_metrics_line_cut_short_by_a_kill_is_ignored(run):
    with run.metrics.open("a") as stream:
        stream.write('{"step": 6, "lo')
    assert [row["step"] for row in status.rows(run)] == [0, 2, 2, 3, 4, 4]


def test_a_reader_of_growing_metrics_returns_each_row_once(run):
    reader = status.RowReader(run)
    assert reader.read() == status.rows(run)
    with run.metrics.open("a") as stream:
        stream.write('{"step": 5}\n{"step": 6, "lo')
    assert reader.read() == [{"step": 5}]
    with run.metrics.open("a") as stream:
        stream.write('ss": 1}\n')
    # Only what is new is read.
    content = run.metrics.read_bytes()
    with run.metrics.open("r+b") as stream:
        stream.write(b"?" * 100)
    assert reader.read() == [{"step": 6, "loss": 1}]
    # A start replaces the file by a shorter or changed one.
    files.write_text(run.metrics, content.decode().replace("6", "7"))
    assert reader.read()[-1] == {"step": 7, "loss": 1}


def test_the_page_draws_each_curve_and_escapes_the_recipe(run):
    page.write_page(run)
    text = run.report.read_text()
    assert text.count("<svg") == 6
    for words in ("base</span>", "held-out clips</span>", "sigma 0.32</span>", "1.2.3"):
        assert words in text
    assert "name: &lt;run&gt;" in text


def test_each_sample_stands_under_its_own_prompt(run):
    run.samples.mkdir()
    for step, prompts in ((1, ["A ball.", "A cube."]), (2, ["A star."]), (3, ["A star."])):
        for i in range(len(prompts)):
            Image.new("RGB", (8, 8)).save(run.sample(step, i).with_suffix(".jpg"))
            run.sample(step, i).touch()
        # Earlier versions wrote one file for all steps.
        place = run.samples / "prompts.json" if step == 1 else run.sample_prompts(step)
        files.write_json(place, prompts)
    page.write_page(run)
    text = run.report.read_text()
    tables = [part.split("</table>")[0] for part in text.split("<table")[1:]]
    samples = [table for table in tables if "_sample0.mp4" in table]
    assert [re.findall(r"A \w+\.", table) for table in samples] == [
        ["A ball.", "A cube."],
        ["A star."],
    ]
    assert [table.count(">step ") for table in samples] == [1, 2]


def test_the_page_shows_no_age_and_links_to_the_samples(run, tmp_path):
    files.write_json(run.sample_prompts(2), ["A <ball>."])
    Image.new("RGB", (8, 8)).save(run.sample(2, 0).with_suffix(".jpg"))
    Image.new("RGB", (8, 8)).save(run.preview(2))
    run.sample(2, 0).touch()
    page.write_page(run)
    text = run.report.read_text()
    assert not re.search(r"\d s ago|<td[^>]*>left<", text)
    assert f"running, as of {time.strftime('%Y-%m-%d')}" in text
    assert '<a href="samples/step_000000002_sample0.mp4">' in text
    assert "<span>clip</span><span>sigma 0.5</span>" in text
    elsewhere = html.page("", page.sections(run, tmp_path / "pages"))
    assert '<a href="../run/samples/step_000000002_sample0.mp4">' in elsewhere
