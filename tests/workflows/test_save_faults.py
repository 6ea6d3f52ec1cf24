"""A save that the disk refuses: one line, exit 4, and the save before it is as it was."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_cli.paths import Run
from tests.helpers.command import Cosmos
from tests.helpers.runs import losses, train

pytestmark = pytest.mark.workflow


@pytest.fixture
def strace(tmp_path):
    """strace, where there is one that may do its work."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    log = tmp_path / "strace"
    command = ["strace", "-o", log, "-e", "inject=fsync:error=EIO", "true"]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()}")


@pytest.mark.parametrize("sample", [10, pytest.param(None, marks=pytest.mark.slow)])
def test_after_any_failed_system_call_the_previous_save_loads(strace, tmp_path, sample):
    script = Path(__file__).parents[1] / "helpers/faulty_saves.py"
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path, *([str(sample)] if sample else [])],
        env={**os.environ, **ranks, **where},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # DeepSpeed says there too what went wrong.
    found = (line for line in done.stdout.splitlines() if line.startswith("{"))
    counts, *rows = map(json.loads, found)
    of_main, of_writer = counts["counts"].values()
    assert {"openat", "write", "fsync", "rename"} <= of_writer.keys()
    assert len(rows) == (sample or 2 * sum([*of_main.values(), *of_writer.values()]))
    for row in rows:
        assert row["injected"], row
        assert row["whole"], row
        # What is on its way out is out of sight, and goes with the next start.
        assert not {*row["left"]} - {".iter_000000001.tmp"}, row
        # A folder that cannot be made is made once more, and nobody need read what is said.
        harmless = row["call"] == "mkdir" or row["at"].startswith("write(2,")
        assert row["code"] == 4 if "code" in row else harmless, row
        assert "\n" not in row.get("line", "")


@pytest.fixture
def disk(prepared, tmp_path):
    """A small disk of its own, and the datasets next to it."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", path]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a small disk cannot be made here: {tried.stderr.strip()}")
    shutil.copytree(prepared / "datasets", tmp_path / "datasets")
    yield path
    subprocess.run(["umount", path], check=True)


def fill(disk, but):
    """Takes all but some bytes of a disk."""
    with (disk / "ballast").open("ab", buffering=0) as stream, contextlib.suppress(OSError):
        while (free := shutil.disk_usage(disk).free) > but:
            stream.write(bytes(min(free - but, 2**23)))


def limit_files(disk, more):
    """Lets a disk take so many more files, or any number for None; its bytes stay free."""
    used = os.statvfs(disk).f_files - os.statvfs(disk).f_ffree
    limit = f"remount,size=1g,nr_inodes={0 if more is None else used + more}"
    subprocess.run(["mount", "-o", limit, disk], check=True)


def one_more_step(cosmos, run, pairs, code, left=0):
    """Return the output of a run that makes one more step and ends with a code."""
    pairs = (*pairs, f"max_steps={run.resumable_steps()[-1] + 1 + left}")
    said = train(cosmos, "full", *pairs, code=code).stderr
    assert "Traceback" not in said
    assert not list(run.checkpoints.glob(".*"))
    return said


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_in_one_line_and_space_lets_it_resume(disk, ranks):
    cosmos = Cosmos(disk.parent)
    pairs = (
        f"num_processes={ranks}",
        "micro_batch_size=1",
        "output_root=disk",
        "min_free_disk_gb=0",
        "save_every_steps=1",
    )
    # Room for two saves of 140 MB and the state that goes.
    train(cosmos, "full", *pairs, "max_steps=2")
    run = Run(next(disk.glob("*/*/full")))
    fill(disk, 100_000_000)
    before_the_save = one_more_step(cosmos, run, pairs, code=4)
    (disk / "ballast").unlink()
    limit_files(disk, 4)
    # It fails while the next steps are computed, which then have no save.
    in_the_save = one_more_step(cosmos, run, pairs, code=4, left=3)
    for said, words in ((before_the_save, "are free"), (in_the_save, "cannot be written")):
        (line,) = [line for line in said.splitlines() if line.startswith("error")]
        assert words in line
    assert run.resumable_steps() == [1, 2]
    limit_files(disk, None)
    assert "resumed at step 2" in one_more_step(cosmos, run, pairs, code=0)
    assert [row[0] for row in losses(run)] == [1, 2, 3]
