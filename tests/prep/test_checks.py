"""Checks that run ahead in processes find what `damage.find` finds, and end with this process."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model.video import Clip
from cosmos_cli.prep import checks, damage

CLIPS = [Clip(0, 24, 12), Clip(12, 24, 12)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    source = ("-f", "lavfi", "-i", "testsrc2=s=320x192:r=24", "-frames:v", "24")
    command = ("ffmpeg", "-v", "error", *source, "-pix_fmt", "yuv420p", "-c:v", "libx264", path)
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def damaged(whole):
    data = bytearray(whole.read_bytes())
    middle = data.index(b"mdat") + 4000
    data[middle : middle + 200] = bytes(200)
    path = whole.with_name("damaged.mp4")
    path.write_bytes(data)
    return path


def test_a_check_finds_the_same_in_a_process(whole, many_cores):
    other = damaged(whole)
    with checks.running() as running:
        assert running.ahead == 2
        begun = [running.begin(path, CLIPS) for path in (whole, other, whole)]
        found = [check() for check in begun]
    assert found == [[], damage.find(other, CLIPS), []]
    assert found[1]
    assert not any(process.is_alive() for process in running._processes)


def test_a_small_machine_checks_in_its_own_process(whole, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with checks.running() as running:
        assert running.ahead == 0
        assert running.begin(whole, CLIPS)() == []
        assert running.begin(damaged(whole), CLIPS)()


def workers(running):
    """The processes of the checks, once they decode."""
    found = [psutil.Process(process.pid) for process in running._processes]
    assert found
    return found


def test_a_killed_check_is_a_clear_error(whole, many_cores):
    with checks.running() as running:
        running.begin(whole, CLIPS)()
        (worker,) = workers(running)
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
        with pytest.raises(UserError) as caught:
            running.begin(whole, CLIPS)()
    assert caught.value.code == ExitCode.ENVIRONMENT
    assert "whole.mp4: a process that looks for damaged frames was killed" in str(caught.value)


def test_an_error_ends_checks_at_once(tmp_path, many_cores):
    pipe = tmp_path / "never_written.mp4"
    os.mkfifo(pipe)
    with pytest.raises(KeyboardInterrupt), checks.running() as running:
        running.begin(pipe, CLIPS)
        (worker,) = workers(running)
        time.sleep(0.5)
        raise KeyboardInterrupt
    assert not worker.is_running()
