"""Checks that run ahead in processes find what `damage.find` finds, and end with this process."""

import multiprocessing
import os
import pickle
import subprocess
import threading
import time

import psutil
import pytest

from cosmos_cli.errors import ExitCode, UserError, usage_error
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
    with checks.running(100, 1) as running:
        assert running.ahead == 2
        begun = [running.begin(path, CLIPS) for path in (whole, other, whole)]
        found = [check() for check in begun]
    assert found == [[], damage.find(other, CLIPS), []]
    assert found[1]
    assert not running_checks()


def test_a_small_machine_checks_in_its_own_process(whole, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with checks.running(100, 1) as running:
        assert running.ahead == 0
        assert running.begin(whole, CLIPS)() == []
        assert running.begin(damaged(whole), CLIPS)()


def running_checks():
    """The processes of the checks; commands of other tests are forked, these are spawned."""
    spawned = (one for one in multiprocessing.active_children() if "Spawn" in type(one).__name__)
    return [one for one in spawned if psutil.pid_exists(one.pid)]


def test_a_check_whose_process_is_killed_is_repeated(whole, many_cores):
    other = damaged(whole)
    with checks.running(100, 1) as running:
        running.begin(whole, CLIPS)()
        for worker in running_checks():
            worker.kill()
            worker.join(10)
        begun = [running.begin(path, CLIPS) for path in (whole, other)]
        assert [bool(check()) for check in begun] == [False, True]
        assert running.begin(whole, CLIPS)() == []
        assert running_checks(), "the pool is replaced"


def test_a_video_whose_check_always_dies_is_named(tmp_path, many_cores):
    # A check of a pipe that nobody writes does not end by itself.
    pipe, stop = tmp_path / "crashes.mp4", threading.Event()
    os.mkfifo(pipe)

    def kill():
        while not stop.wait(0.5):
            for worker in running_checks():
                worker.kill()

    with checks.running(100, 1) as running:
        check = running.begin(pipe, CLIPS)
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(UserError) as caught:
            check()
        stop.set()
        killer.join()
    assert caught.value.code == ExitCode.ENVIRONMENT
    assert "crashes.mp4: the process that looks for damaged frames in it" in str(caught.value)


def test_an_error_ends_checks_at_once(tmp_path, many_cores):
    pipe = tmp_path / "never_written.mp4"
    os.mkfifo(pipe)
    with pytest.raises(KeyboardInterrupt), checks.running(100, 1) as running:
        running.begin(pipe, CLIPS)
        (worker,) = running_checks()
        time.sleep(0.5)
        raise KeyboardInterrupt
    assert not psutil.pid_exists(worker.pid)


def test_few_videos_are_left_for_other_processes(many_cores):
    for videos, ahead in ((3, 0), (4, 1), (8, 2), (100, 2)):
        with checks.running(videos, 1) as running:
            assert running.ahead == ahead
    with checks.running(100, 2) as running:
        assert running.ahead == 1, "eight cores are shared by two processes"


def test_an_error_of_a_check_keeps_what_it_says():
    error = usage_error("a", "b", "c")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code) == (str(error), error.code)
