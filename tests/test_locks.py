"""Locks against other processes, and the one answer to a disk that has none."""

import fcntl
import os
import shutil
import subprocess
import sys
import threading

import pytest

from cosmos_cli import locks

# Takes both kinds of lock twice, as two processes would that do not see one another.
BOTH = """
import fcntl, os
from pathlib import Path
from cosmos_cli import locks

here = Path("here")
for _ in range(2):
    with locks.held(here / "lock", "cosmos train") as lock:
        assert lock is not None
    file = os.open(here / "lock", os.O_RDWR)
    assert locks.lock_byte(file, 3, fcntl.LOCK_EX | fcntl.LOCK_NB, here, "cosmos prep")
"""

SHARED = """
from pathlib import Path
from cosmos_cli.prep import work_sharing

for folder in ("here", "there"):
    with work_sharing.workers(Path(folder, "lock"), "job") as workers:
        print(workers.can_share)
"""


def test_a_lock_is_refused_while_another_open_file_holds_it(tmp_path):
    with locks.held(tmp_path / "lock", "x") as first, locks.held(tmp_path / "lock", "x") as second:
        assert first is not None
        assert second is None
    with locks.held(tmp_path / "lock", "x") as again:
        assert again is not None


def test_a_process_that_may_wait_says_so_and_then_gets_the_lock(tmp_path, capsys):
    released = threading.Event()
    with (tmp_path / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: (released.set(), stream.close())).start()
        with locks.held(tmp_path / "lock", "x", "waiting for it") as lock:
            assert lock is not None
            assert released.is_set()
    assert capsys.readouterr().err == "waiting for it\n"


def run_without_locks(tmp_path, world_size, script=BOTH):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    lacking = ("-P", tmp_path / "here" / "lock", "-e", "inject=flock,fcntl:error=ENOLCK")
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", "log", *lacking, sys.executable, "-c", script],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "WORLD_SIZE": world_size},
    )  # fmt: skip
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    return done


def test_a_disk_without_locks_gets_one_warning_for_each_command(tmp_path):
    done = run_without_locks(tmp_path, "1")
    why = "cannot be locked (No locks available): make sure that only one"
    expected = [f"warning: here: {why} `cosmos {verb}` runs there" for verb in ("train", "prep")]
    assert done.stderr.splitlines() == expected


def test_several_ranks_are_refused_on_a_disk_without_locks(tmp_path):
    done = run_without_locks(tmp_path, "2")
    said = done.stderr.splitlines()[-1]
    assert said.startswith("cosmos_cli.errors.UserError: here: cannot be locked (No locks availab")
    assert "and WORLD_SIZE is 2; use a disk with locks" in said
    assert "`cosmos train RECIPE` without a launcher" in said


def test_no_process_helps_prep_on_a_disk_without_locks(tmp_path):
    done = run_without_locks(tmp_path, "1", SHARED)
    assert done.stdout.split() == ["False", "True"]
