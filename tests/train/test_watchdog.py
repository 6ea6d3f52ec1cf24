"""A process that stands still ends the run: within the time-out, by name, leaving nothing."""

import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cosmos_cli.files import read_json
from cosmos_cli.prep.holdout import split_clips
from tests.helpers.command import Cosmos
from tests.helpers.runs import find_run, start_training, wait_for_step

pytestmark = pytest.mark.workflow

PAIRS = ("num_processes=2", "micro_batch_size=1", "save_every_steps=2", "max_steps=500")


@pytest.fixture
def cosmos(prepared):
    return Cosmos(prepared)


def started(cosmos, name, *pairs):
    """A training that has reached step 3, its launcher and its ranks."""
    process = start_training(cosmos, name, *PAIRS, *pairs, step=3)
    (launcher,) = psutil.Process(process.pid).children()
    return process, launcher, launcher.children()


@pytest.mark.slow
def test_a_stopped_rank_ends_the_run_by_name_and_is_ended_too(cosmos):
    process, launcher, ranks = started(cosmos, "stopped_rank", "timeout_seconds=10")
    ranks[0].suspend()
    _, err = process.communicate(timeout=90)
    assert process.returncode == 6, err
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "rank 0: sent no heartbeat for 10 s" in line
    assert "Traceback" not in err
    _, alive = psutil.wait_procs([launcher, *ranks], timeout=10)
    assert not alive
    assert find_run(cosmos, "stopped_rank").resumable_steps()


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_an_operation_is_named(cosmos, tmp_path):
    dataset = cosmos.cwd / "datasets" / "tiny"
    process, launcher, ranks = started(cosmos, "deadlock", "timeout_seconds=10")
    clip = split_clips(read_json(dataset / "manifest.json"))[0][0]
    text = dataset / clip["text"]
    aside = text.replace(tmp_path / text.name)
    # Whoever opens a FIFO waits for a writer; its other threads continue.
    os.mkfifo(text)
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.terminate()
        aside.replace(text)
    assert process.returncode == 6, err
    assert re.search(r"error: rank [01]: kept other ranks waiting for 10 s", err)
    _, alive = psutil.wait_procs([launcher, *ranks], timeout=10)
    assert not alive


@pytest.mark.slow
def test_a_run_that_is_stopped_as_a_whole_goes_on_when_it_is_woken(cosmos):
    process, _, ranks = started(cosmos, "asleep", "timeout_seconds=5")
    step = len(find_run(cosmos, "asleep").metrics.read_text().splitlines())
    for rank in ranks:
        rank.suspend()
    time.sleep(8)
    for rank in ranks:
        rank.resume()
    wait_for_step(cosmos, "asleep", process, step + 10)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err


@pytest.mark.slow
def test_a_stopped_rank_restarts_the_run(cosmos):
    pairs = ("timeout_seconds=5", "max_restarts=1")
    process, _, ranks = started(cosmos, "woken", *pairs)
    ranks[1].suspend()
    deadline = time.monotonic() + 120
    log = ""
    while "restart 1 of 1" not in log:
        assert time.monotonic() < deadline, log
        log += process.stderr.readline()
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err


@pytest.mark.slow
def test_without_a_launcher_the_loss_of_rank_0_ends_the_others(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import time\n"
        "import torch.distributed as dist\n"
        "from cosmos_cli.train.watchdog import Watchdog\n"
        "dist.init_process_group('gloo')\n"
        "Watchdog(6).start()\n"
        "print('beats', flush=True)\n"
        "time.sleep(60)\n"
    )
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29771", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, script],
            env={**os.environ, **where, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        assert rank.stdout.readline() == "beats\n"
    time.sleep(2)
    ranks[0].kill()
    ranks[0].communicate()
    _, err = ranks[1].communicate(timeout=30)
    assert ranks[1].returncode == 6, err
    assert "error: rank 0: has exited" in err


EXPIRED = """
import datetime, sys, time
import torch
import torch.distributed as dist
from cosmos_cli.errors import UserError
from cosmos_cli.train import process

rank = int(sys.argv[1])
store = dist.FileStore(sys.argv[2], 2)
wait = datetime.timedelta(seconds=2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
time.sleep(4 * rank)
try:
    with process.connection_errors():
        dist.all_reduce(torch.ones(2))
except UserError as error:
    print(type(error).__name__, int(error.code), error)
"""


def test_an_expired_time_out_is_one_line_and_not_a_bug(tmp_path):
    """The first rank waits too long, and the second finds that the first has gone."""
    both = [
        subprocess.Popen(
            [sys.executable, "-c", EXPIRED, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in both:
        (line,) = process.communicate(timeout=60)[0].splitlines()
        assert line.startswith("LostConnection 6 lost the connection to another rank, which hangs")
        assert line.endswith("; the same command resumes")
