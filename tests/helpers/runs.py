"""Small training runs, and what they leave."""

import json
import subprocess
import sys
import time

import pytest
import torch

from cosmos_cli.paths import Run
from tests.helpers.command import settings

FAST = (
    "global_batch_size=2",
    "log_every_steps=1",
    "save_every_steps=3",
    "learning_rate=1e-3",
    "warmup_steps=2",
    "min_free_disk_gb=0.1",
    "preview_every_steps=0",
    "sample_every_saves=0",
)


def options(name, *pairs):
    return settings(*FAST, f"name={name}", *pairs)


def find_run(cosmos, name):
    (path,) = (cosmos.cwd / "outputs").glob(f"*/*/{name}")
    return Run(path)


def losses(run):
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    return [(row["step"], row["loss"], row["edm"], row["grad_norm"]) for row in rows]


def weights(run, step, kind):
    return torch.load(run.model(step, kind), weights_only=True)


def assert_same_model(first, second, step):
    for kind in ("reg", "ema"):
        a, b = weights(first, step, kind), weights(second, step, kind)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def under_torchrun(cosmos, name, *pairs):
    """The ranks of a launcher of the user's own."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "cosmos_cli", "train", "tiny", *options(name, "micro_batch_size=1", *pairs)]
    return subprocess.run(
        [sys.executable, *torchrun, *words],
        cwd=cosmos.cwd,
        env=cosmos.environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def wait_for_step(run_glob, process, step=1):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for path in run_glob():
            if path.exists() and path.read_text().count('"loss"') >= step:
                return
        time.sleep(0.2)
    pytest.fail(f"no step {step} before the process ended: {process.communicate()}")
