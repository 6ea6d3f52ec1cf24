"""Small training runs, and what they leave."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch

from cosmos_cli.paths import Run
from tests.helpers.command import Cosmos, settings

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


def copy_of(prepared, root):
    """A folder of its own with the prepared dataset."""
    shutil.copytree(prepared / "datasets", root / "datasets")
    return Cosmos(root)


def options(name, *pairs):
    return settings(*FAST, f"name={name}", *pairs)


def find_run(cosmos, name):
    (path,) = (cosmos.cwd / "outputs").glob(f"*/*/{name}")
    return Run(path)


def train(cosmos, name, *pairs, words=(), code=0):
    """Trains as the ranks of a launcher, and returns what rank 0 said."""
    counts = [pair.partition("=")[2] for pair in pairs if pair.startswith("num_processes=")]
    words = ("train", "tiny", *options(name, *pairs), *words)
    return cosmos.ranks(int([1, *counts][-1]), *words, code=code, seconds=900)[0]


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


def wait_for_step(cosmos, name, process, step=1):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for path in cosmos.cwd.glob(f"outputs/*/*/{name}/metrics.jsonl"):
            if path.read_text().count('"loss"') >= step:
                return
        time.sleep(0.2)
    pytest.fail(f"no step {step} before the process ended: {process.communicate()}")


def start_training(cosmos, name, *pairs, step=1):
    """Starts the command and its ranks, and waits for a step."""
    process = cosmos.start("train", "tiny", *options(name, *pairs))
    wait_for_step(cosmos, name, process, step)
    return process
