"""Everything between `cosmos train` and its ranks: checks, then start, watch, stop. No torch."""

from __future__ import annotations

import fcntl
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

from cosmos_cli import __version__, console, layout, mailbox
from cosmos_cli.errors import ExitCode, Interrupted, UserError
from cosmos_cli.layout import Dataset, Run

if TYPE_CHECKING:
    from cosmos_cli.recipe import LoadedRecipe, Recipe

# A resumed run must agree with its checkpoint on these: another value would be another run.
FIXED_KEYS = (
    "model", "base", "dataset_dir", "num_frames", "height", "width", "precision", "zero_stage",
    "global_batch_size", "text_dropout", "ema_rate", "seed",
)  # fmt: skip


def under_launcher() -> bool:
    """Whether torchrun or the like started this process as one rank of many."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def world_size(r: Recipe) -> int:
    """How many ranks train: the launcher's number, the recipe's, one per GPU, or one on a CPU."""
    if under_launcher():
        return int(os.environ["WORLD_SIZE"])
    if r.num_processes != "auto":
        return int(r.num_processes)
    return max(len(gpu_names()), 1)


def gpu_names() -> list[str]:
    """The names of the GPUs this process may use, without torch; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    names = [
        str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)))
        for i in range(pynvml.nvmlDeviceGetCount())
    ]
    pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return names
    return names[: len([part for part in visible.split(",") if part.strip()])]


# --- checks before any process starts -------------------------------------------------------------


def check_dataset(r: Recipe) -> list[dict[str, Any]]:
    """The clips that prep made for this recipe.

    Raises:
        UserError: prep has not run, or ran with other settings or other videos.
    """
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    where = str(dataset.manifest)
    if not dataset.manifest.exists():
        raise UserError(
            "the dataset is not prepared",
            code=ExitCode.DATASET,
            where=where,
            fix="run cosmos prep first",
        )
    manifest = layout.read_json(dataset.manifest)
    for key, prepared in manifest["settings"].items():
        wanted = getattr(r, key, None)
        if wanted != prepared:
            raise UserError(
                f"was prepared with {key} = {prepared}, the recipe says {wanted}",
                code=ExitCode.DATASET,
                where=where,
                fix="run cosmos prep again",
            )
    present = {path.name: layout.size_of(path) for path in dataset.video_files()}
    listed = {video["file"]: video["bytes"] for video in manifest["videos"]}
    if changed := sorted(set(present.items()) ^ set(listed.items())):
        raise UserError(
            f"is older than the videos: {changed[0][0]} was added, removed or changed",
            code=ExitCode.DATASET,
            where=where,
            fix="run cosmos prep again",
        )
    clips: list[dict[str, Any]] = manifest["clips"]
    return clips


def check_recipe(r: Recipe, ranks: int) -> None:
    """Refuses what cannot be trained on `ranks` processes.

    Raises:
        UserError: the model is for generation only, the batch does not divide, no base weights.
    """
    if not r.spec.trainable:
        raise UserError(
            f"{r.model} is for generation only",
            code=ExitCode.USAGE,
            where="model",
            fix="use Cosmos-Predict1-7B-Text2World",
        )
    if r.global_batch_size % (ranks * r.micro_batch_size):
        raise UserError(
            f"{r.global_batch_size} clips do not divide into micro batches of "
            f"{r.micro_batch_size} on {ranks} processes",
            code=ExitCode.USAGE,
            where="global_batch_size",
            fix=f"use a multiple of {ranks * r.micro_batch_size}",
        )
    base = layout.model_files(r.spec, r.checkpoints_dir, r.base).dit
    if not base.exists():
        raise UserError(
            "the base weights are missing",
            code=ExitCode.ASSET,
            where=str(base),
            fix="run cosmos download, or set base",
        )


def check_resume(r: Recipe, run: Run, ranks: int) -> int:
    """The step at which the run goes on, 0 for a new one.

    Raises:
        UserError: the saved run was another one, or used another number of processes.
    """
    steps = run.resumable_steps()
    if not steps:
        return 0
    folder = run.resume_state(steps[-1])
    saved = layout.read_json(folder / layout.MANIFEST_FILE)
    changes = {
        key: (value, getattr(r, key))
        for key, value in saved["recipe"].items()
        if hasattr(r, key) and getattr(r, key) != value
    }
    for key in FIXED_KEYS:
        if key in changes:
            before, now = changes[key]
            raise UserError(
                f"this run was started with {key} = {before}, the recipe says {now}",
                code=ExitCode.USAGE,
                where=str(folder),
                fix="set name to start another run",
            )
    if saved["world_size"] != ranks:
        raise UserError(
            f"was saved by {saved['world_size']} processes, not {ranks}",
            code=ExitCode.USAGE,
            where=str(folder),
            fix=f"set num_processes to {saved['world_size']}, or name to start another run",
        )
    if changes:
        rows = [(key, str(before), str(now), str(now)) for key, (before, now) in changes.items()]
        console.say(console.table(rows, ("key", "checkpoint", "recipe", "used")))
    return steps[-1]


def checkpoint_bytes(r: Recipe) -> int:
    """Disk that one save takes: bf16 and fp32 model files, fp32 masters and moments."""
    parameters = r.spec.dit.parameters
    return parameters * (r_bytes(r) + 4 + 12)


def r_bytes(r: Recipe) -> int:
    """Bytes of one weight in the recipe's precision."""
    return 2 if r.precision == "bf16" else 4


def check_disk(r: Recipe, run: Run, start: int) -> None:
    """Refuses a run whose saves would not fit.

    Raises:
        UserError: less free than the remaining saves and min_free_disk_gb need.
    """
    saves = max(-(-(r.max_steps - start) // r.save_every_steps), 1)
    per_model = r.spec.dit.parameters * (r_bytes(r) + 4)
    states = min(saves, r.keep_last + 1)
    needed = saves * per_model + states * r.spec.dit.parameters * 12 + r.min_free_disk_gb * 1e9
    existing = next(path for path in [run.root, *run.root.parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{saves} saves need {console.size(needed)}, {console.size(free)} are free",
            code=ExitCode.ASSET,
            where=str(existing),
            fix="free some space, save less often, or set output_root",
        )


# --- start, watch, stop ---------------------------------------------------------------------------


def join(loaded: LoadedRecipe) -> dict[str, Any]:
    """Runs this process as the rank that a launcher made it; the figures of the run's result.

    Raises:
        UserError: what ended this rank.
        Interrupted: a signal ended the run after a clean save.
    """
    run = Run(loaded.recipe.run_dir.absolute())
    rank = int(os.environ["RANK"])
    if rank == 0:
        _prepare(loaded, run)
    from cosmos_cli.model import train

    train.run_rank(loaded.recipe)
    return _outcome(run) if rank == 0 else {}


def start(loaded: LoadedRecipe, ranks: int) -> dict[str, Any]:
    """Runs the ranks to their end; the figures of the run's result.

    Raises:
        UserError: the first failure of a rank.
        Interrupted: a signal ended the run after a clean save.
    """
    run = Run(loaded.recipe.run_dir.absolute())
    box = mailbox.Mailbox()
    with _locked(run):
        _prepare(loaded, run)
        command = [
            sys.executable, "-m", "cosmos_cli.model.elastic",
            "--nproc-per-node", str(ranks), "-m", "cosmos_cli.model.train", str(run.resolved),
        ]  # fmt: skip
        # A session of its own: Ctrl-C reaches us alone and is passed on to the ranks, not to
        # torchrun, which would kill them half a minute later, in the middle of a save.
        process = subprocess.Popen(
            command,
            env={**_environment(ranks), mailbox.ADDRESS: box.address},
            stdout=sys.stderr,
            start_new_session=True,
        )
        signal_seen = _watch(process)
    if run.result.exists():
        return _outcome(run)
    if signal_seen:
        raise Interrupted(signal_seen)
    raise _failure(box.read(), process.returncode)


def _failure(messages: list[dict[str, Any]], launcher_code: int) -> UserError:
    """The failure of the rank that failed first."""
    verdict = next((m for m in messages if "first" in m), {"first": 0, "process_code": None})
    rank, process_code = verdict["first"], verdict["process_code"]
    own = next((m for m in messages if m.get("rank") == rank), {})
    if "error" in own:
        return UserError(own["error"], code=ExitCode(own["code"]), where=f"rank {rank}")
    if "traceback" in own:
        print(own["traceback"], file=sys.stderr)
        what, code = "failed; its traceback stands above", ExitCode.BUG
    elif process_code is None:
        what, code = f"the launcher ended with code {launcher_code}", ExitCode.TRAINING
    elif process_code == -signal.SIGKILL:
        what = "was killed; if nobody did it, host memory ran out (see dmesg); start it again"
        code = ExitCode.TRAINING
    else:
        what, code = f"ended with code {process_code}; start it again", ExitCode.TRAINING
    return UserError(what, code=code, where=f"rank {rank}")


def _outcome(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = layout.read_json(run.result)
    if result["exit_code"]:
        raise Interrupted(ExitCode(result["exit_code"]))
    return result


def _watch(process: subprocess.Popen[bytes]) -> ExitCode | None:
    """Waits for torchrun; passes signals on to the ranks; the exit code of the signal seen."""
    seen: list[ExitCode] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        code = ExitCode.SIGTERM if number == signal.SIGTERM else ExitCode.SIGINT
        if seen:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            console.say("stopping: the step ends and is saved; once more to stop at once")
            for rank in psutil.Process(process.pid).children():
                rank.send_signal(number)
        seen.append(code)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _kill_group(process.pid)
    return seen[0] if seen else None


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _environment(ranks: int) -> dict[str, str]:
    defaults = {
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks, 1)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
    }
    if not gpu_names():
        # Without it DeepSpeed guesses, and prints the guess on stdout.
        defaults["DS_ACCELERATOR"] = "cpu"
    return {**defaults, **os.environ}


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    """Holds the run against a second process.

    Raises:
        UserError: another process trains it.
    """
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    with (run.root / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "another process is training this run",
                code=ExitCode.USAGE,
                where=str(run.root),
                fix="wait for it, or set name to start another run",
            ) from error
        yield


def _prepare(loaded: LoadedRecipe, run: Run) -> None:
    """Clears what an earlier start left and writes what the run is made from."""
    from cosmos_cli import recipe

    run.checkpoints.mkdir(parents=True, exist_ok=True)
    layout.remove_stale(run.checkpoints)
    run.result.unlink(missing_ok=True)
    if loaded.path is not None:
        layout.write_text(run.root / "recipe.yaml", loaded.path.read_text(encoding="utf-8"))
    layout.write_text(run.resolved, recipe.dump(loaded.recipe))
    facts = {
        "cosmos": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "gpus": gpu_names(),
        "command": sys.argv,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    layout.write_text(run.root / "env.json", json.dumps(facts, indent=1) + "\n")
