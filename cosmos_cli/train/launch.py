"""Start, watch and stop the ranks of `cosmos train`. Does not import torch."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from cosmos_cli import __version__, console, files, gpus, locks, ranks, signals
from cosmos_cli.errors import ExitCode, Interrupted, UserError, environment_error, usage_error
from cosmos_cli.paths import Run
from cosmos_cli.train import resumes, status, trackers

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe
    from cosmos_cli.recipe.loading import LoadedRecipe


def world_size(r: Recipe) -> int:
    """Return the number of ranks: the launcher's, the recipe's, one per GPU, or 1 without a GPU."""
    if ranks.under_launcher():
        return int(os.environ["WORLD_SIZE"])
    if r.num_processes != "auto":
        return int(r.num_processes)
    return max(len(gpus.gpu_names()), 1)


# --- start, watch, stop ---------------------------------------------------------------------------


def join(loaded: LoadedRecipe, overwrite: bool) -> dict[str, Any]:
    """Train in this process as one rank of a launcher, and return the figures of the run's result.

    `overwrite` first deletes what an earlier run saved after the step that this one starts from.

    Raises:
        UserError: training failed on this rank.
        Interrupted: a signal ended the run after a clean save.
    """
    run = Run(loaded.recipe.run_dir)
    rank = int(os.environ["RANK"])
    # Ranks of `start` get the same environment. Torch reads it when it is imported below.
    os.environ.update(ranks.environment(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if missing := {"MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        fix = "start it with torchrun or recipes/slurm.sh, or run `unset RANK`"
        raise environment_error(min(missing), "is not set, but RANK is", fix)
    with contextlib.ExitStack() as stack:
        if rank == 0:
            stack.enter_context(_locked(run))
            if overwrite:
                _discard(run)
            _prepare(loaded, run)
            stack.enter_context(trackers.following(loaded.recipe, run))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun forwards SIGHUP even under nohup, and kills ranks that are still alive half a
            # minute later. The terminal itself sends its ranks no SIGHUP.
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        from cosmos_cli.train.process import run_rank

        try:
            outcome = run_rank(loaded.recipe)
        except UserError as error:
            if rank:
                # The other ranks see only that this one is gone, not why.
                console.unmute()
                console.say(f"error: rank {rank}: {error}")
                console.mute()
            error.told = True
            raise
    if outcome["exit_code"]:
        raise Interrupted(ExitCode(outcome["exit_code"]))
    return outcome


def start(loaded: LoadedRecipe, processes: int, overwrite: bool) -> dict[str, Any]:
    """Start the ranks, wait for them, and return the figures of the run's result.

    `overwrite` first deletes what an earlier run saved after the step that this one starts from.

    Raises:
        UserError: the first failure of a rank.
        Interrupted: a signal ended the run after a clean save.
    """
    run = Run(loaded.recipe.run_dir)
    command = [
        sys.executable, "-m", "cosmos_cli.ranks",
        "--nproc-per-node", str(processes), "-m", "cosmos_cli.train.process", str(run.resolved),
    ]  # fmt: skip
    restarts = 0
    with _locked(run) as lock, ranks.RankErrors() as box:
        if overwrite:
            _discard(run)
        while True:
            _prepare(loaded, run)
            count = "a process" if processes == 1 else f"{processes} processes"
            console.say(f"starting {count}, loading PyTorch and DeepSpeed")
            with trackers.following(loaded.recipe, run):
                code, signal_seen = _run_command(
                    command,
                    env={**ranks.environment(processes), ranks.ADDRESS: box.address},
                    stdout=sys.stderr,
                    # The launcher holds the lock too: if this process is killed, its ranks may
                    # still be saving.
                    pass_fds=(lock,),
                )
            messages = box.read()
            if run.result.exists() and (not signal_seen or status.is_finished(run)):
                return _outcome(run)
            # A failure that a rank could explain (disk full, non-finite loss) would recur, so do
            # not restart.
            explained = any("error" in m and "lost" not in m for m in messages)
            if signal_seen and not explained:
                raise Interrupted(signal_seen)
            failure = _failure(messages, code)
            if restarts == loaded.recipe.max_restarts or explained:
                raise failure
            restarts += 1
            console.warn(f"{failure}: restart {restarts} of {loaded.recipe.max_restarts}")


def _failure(messages: list[dict[str, Any]], launcher_code: int) -> UserError:
    """Return the first error that a rank explained, else the first failure that torchrun saw."""
    explained = next((m for m in messages if "error" in m), None)
    if explained:
        code = ExitCode(explained["code"])
        return UserError(explained["error"], code=code, where=f"rank {explained['rank']}")
    verdict = next((m for m in messages if "first" in m), {"first": 0, "process_code": None})
    rank, process_code = verdict["first"], verdict["process_code"]
    own = next((m for m in messages if m.get("rank") == rank), {})
    if "traceback" in own:
        print(own["traceback"], file=sys.stderr)
        what, code = "failed with the traceback above", ExitCode.BUG
    elif "connection" in own:
        what, code = own["connection"], ExitCode.TRAINING
    elif process_code is None:
        what, code = f"the launcher exited with code {launcher_code}", ExitCode.TRAINING
    elif process_code == -signal.SIGKILL:
        what = f"{ranks.KILLED}; run train again"
        code = ExitCode.TRAINING
    else:
        what, code = f"exited with code {process_code}; run train again", ExitCode.TRAINING
    return UserError(what, code=code, where=f"rank {rank}")


def _outcome(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = files.read_json(run.result, files.FIGURES)
    if result["exit_code"]:
        raise Interrupted(ExitCode(result["exit_code"]))
    return result


class _SignalForwarder:
    """Handler that forwards signals to the ranks.

    On SIGUSR1 they save and continue. SIGINT, SIGTERM and SIGHUP are forwarded as SIGTERM: the
    ranks save and stop. A second stop request kills them.
    """

    def __init__(self) -> None:
        self.codes = signals.ending()
        self.seen: ExitCode | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            console.say("saving after this step; training then continues")
            self.forward(number)
            return
        request = signals.requests.note(number)
        if not request:
            return
        self.seen = self.codes[signal.Signals(number)]
        if request > 1:
            self.stop(signal.SIGKILL)
            return
        console.say("stopping after this step, which is saved; repeat the signal to stop at once")
        self.stop(signal.SIGTERM)

    def stop(self, number: int) -> None:
        """Signal the ranks, or the launcher if it has not started them yet."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if not self.forward(number) or number == signal.SIGKILL:
                os.killpg(self.process.pid, number)

    def forward(self, number: int) -> bool:
        """Signal the ranks. True if there were any."""
        if self.process is None:
            return False
        ranks = []
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = psutil.Process(self.process.pid).children()
            for rank in ranks:
                rank.send_signal(number)
        return bool(ranks)


def _run_command(command: list[str], **options: Any) -> tuple[int, ExitCode | None]:
    """Run a command. Return its exit code, and the exit code of a forwarded stop signal if any."""
    forwarder = _SignalForwarder()
    handled = (*forwarder.codes, signal.SIGUSR1)
    before = {number: signal.signal(number, forwarder) for number in handled}
    try:
        # The launcher gets a session of its own, so Ctrl-C and a closed window reach this process
        # only. They are forwarded to the ranks, not to torchrun: torchrun would kill the ranks half
        # a minute later, in the middle of a save.
        process = subprocess.Popen(command, start_new_session=True, **options)
        forwarder.process = process
        if forwarder.seen:
            forwarder.stop(signal.SIGTERM)
        process.wait()
        ranks.kill_group(process.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode, forwarder.seen


@contextmanager
def _locked(run: Run) -> Iterator[int]:
    """Lock the run against a second process, and yield the file descriptor of the lock.

    Raises:
        UserError: another process trains it.
    """
    with locks.held(run.root / ".lock", "cosmos train") as lock:
        if lock is None:
            fix = (
                "wait for it, or start another run: "
                f"`cosmos train RECIPE --set name={resumes.free_name(run)}`"
            )
            raise usage_error(run.root, "another process is training this run", fix)
        yield lock


def _discard(run: Run) -> None:
    """Delete the weights saved after the newest resume state, or the whole run if there is none.

    status.json is deleted last: until then, a start without --overwrite is still refused.
    """
    start = run.last_step
    with files.disk_errors(run.root):
        for written in run.weight_files(start).values():
            for path in written:
                path.unlink()
                console.say(f"deleted {path}")
        run.scores.unlink(missing_ok=True)
        if start:
            return
        for folder in run.checkpoints.glob("iter_" + "[0-9]" * 9):
            # What remains here is a resume state without its manifest.
            shutil.rmtree(folder)
        if run.samples.exists():
            shutil.rmtree(run.samples)
        for path in (run.metrics, run.result, run.report, run.status):
            path.unlink(missing_ok=True)


def _prepare(loaded: LoadedRecipe, run: Run) -> None:
    """Delete the leftovers of an earlier start, and write the recipe, status.json and env.json."""
    from cosmos_cli.recipe import loading

    with files.disk_errors(run.root):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        files.remove_stale(run.checkpoints)
        run.result.unlink(missing_ok=True)
    if loaded.path is not None:
        files.write_text(run.root / "recipe.yaml", files.read_text(loaded.path, files.RECIPE))
    files.write_text(run.resolved, loading.dump(loaded.recipe))
    resumes.drop_errors_of_other_clips(loaded.recipe, run)
    step = run.last_step
    with files.disk_errors(run.samples):
        for path in run.samples.glob("step_" + "[0-9]" * 9 + "*"):
            if int(path.name[5:14]) > step:
                path.unlink()
    saved = max(step, status.saved_step(run))
    status.note(
        run, {"step": step, "max_steps": max(step, loaded.recipe.max_steps), "saved_step": saved}
    )
    facts = {
        "cosmos": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": gpus.gpu_names(),
        "cuda_visible_devices": os.environ.get(gpus.VARIABLE),
        "command": sys.argv,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    files.write_text(run.root / "env.json", json.dumps(facts, indent=1) + "\n")
