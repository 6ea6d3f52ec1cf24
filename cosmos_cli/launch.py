"""Everything between `cosmos train` and its ranks: checks, then start, watch, stop. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from cosmos_cli import __version__, console, history, layout, mailbox, trackers
from cosmos_cli.errors import ExitCode, Interrupted, UserError
from cosmos_cli.layout import Dataset, Run
from cosmos_cli.model import plan

if TYPE_CHECKING:
    from cosmos_cli.keys import Recipe
    from cosmos_cli.recipe import LoadedRecipe

_CODES = {signal.SIGINT: ExitCode.SIGINT, signal.SIGTERM: ExitCode.SIGTERM}

# A resumed run must agree with its checkpoint on these: another value would be another run.
FIXED_KEYS = (
    "model", "base", "dataset_dir", "num_frames", "height", "width", "precision", "zero_stage",
    "global_batch_size", "text_dropout", "ema_rate", "seed", "lora_rank", "lora_alpha",
    "lora_targets",
)  # fmt: skip


def under_launcher() -> bool:
    """Whether torchrun or the like started this process as one rank of many."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def mute_all_but_first() -> None:
    """Has one of the ranks that a launcher started speak for all."""
    if under_launcher() and os.environ["RANK"] != "0":
        console.mute()


def world_size(r: Recipe) -> int:
    """How many ranks train: the launcher's number, the recipe's, one per GPU, or one on a CPU."""
    if under_launcher():
        return int(os.environ["WORLD_SIZE"])
    if r.num_processes != "auto":
        return int(r.num_processes)
    return max(len(gpu_names()), 1)


def gpus() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of the GPUs this process may use; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
    found = [
        (str(pynvml.nvmlDeviceGetName(gpu)), pynvml.nvmlDeviceGetCudaComputeCapability(gpu))
        for gpu in handles
    ]
    pynvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    # CUDA ignores what comes behind the first entry that is no device.
    listed = itertools.takewhile(lambda part: part.strip() not in ("", "-1"), visible.split(","))
    return found[: len(list(listed))]


def gpu_names() -> list[str]:
    """Their names alone."""
    return [name for name, _ in gpus()]


def known_gpu() -> plan.Gpu | None:
    """The kind of this machine's first GPU, where the planner knows it."""
    names = gpu_names()
    return plan.find_gpu(names[0]) if names else None


# --- checks before any process starts -------------------------------------------------------------


def check_dataset(r: Recipe) -> tuple[int, int]:
    """How many clips prep made for this recipe: to train on, and held out.

    Raises:
        UserError: prep has not run, or ran with other settings or other videos.
    """
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    where = str(dataset.manifest)
    manifest = dataset.read_manifest()
    for key, prepared in manifest["settings"].items():
        wanted = getattr(r, key, None)
        if wanted != prepared:
            raise UserError(
                f"was prepared with {key} = {prepared}, the recipe says {wanted}",
                code=ExitCode.DATASET,
                where=where,
                fix="run cosmos prep again",
            )
    listed = {video["path"]: video["bytes"] for video in manifest["videos"]}
    paths = {*listed, *(path.name for path in dataset.video_files())}
    present = {path: layout.size_of(dataset.videos / path) for path in paths}
    if changed := sorted(set(present.items()) ^ set(listed.items())):
        raise UserError(
            f"is older than the videos: {changed[0][0]} was added, removed or changed",
            code=ExitCode.DATASET,
            where=where,
            fix="run cosmos prep again",
        )
    clips, held_out = layout.split_clips(manifest)
    return len(clips), len(held_out)


def check_recipe(r: Recipe, ranks: int) -> None:
    """Refuses what cannot be trained on `ranks` processes.

    Raises:
        UserError: the model is for generation only, the batch does not divide, no base weights.
    """
    check_world(r, ranks)
    if int(os.environ.get("NNODES", "1")) > 1 and not under_launcher():
        raise UserError(
            f"NNODES is {os.environ['NNODES']}, and this command starts the ranks of one machine",
            code=ExitCode.USAGE,
            where="NNODES",
            fix="on every node: torchrun --nnodes ... -m cosmos_cli train RECIPE",
        )
    trackers.check(r)
    check_kernels(r)
    base = layout.model_files(r.spec, r.checkpoints_dir, r.base).dit
    if not base.exists():
        raise UserError(
            "the base weights are missing",
            code=ExitCode.ASSET,
            where=str(base),
            fix="run cosmos download, or set base",
        )


def check_world(r: Recipe, ranks: int) -> None:
    """Refuses what cannot be trained on `ranks` processes anywhere.

    Raises:
        UserError: the model is for generation only, or the processes or the batch do not divide.
    """
    if r.hpz_partition_size != "auto" and ranks % r.hpz_partition_size:
        raise UserError(
            f"{ranks} processes do not divide into groups of {r.hpz_partition_size}",
            code=ExitCode.USAGE,
            where="hpz_partition_size",
            fix="use a divisor of the number of processes, or auto",
        )
    if not r.spec.trainable:
        raise UserError(
            f"{r.model} is for generation only",
            code=ExitCode.USAGE,
            where="model",
            fix="use Cosmos-Predict1-7B-Text2World",
        )
    if ranks % r.sequence_parallel:
        raise UserError(
            f"{ranks} processes do not divide into groups of {r.sequence_parallel}",
            code=ExitCode.USAGE,
            where="sequence_parallel",
            fix="use a divisor of the number of processes",
        )
    at_once = ranks // r.sequence_parallel * r.micro_batch_size
    if r.global_batch_size % at_once:
        raise UserError(
            f"{r.global_batch_size} clips do not divide into micro batches of "
            f"{r.micro_batch_size} on {ranks} processes",
            code=ExitCode.USAGE,
            where="global_batch_size",
            fix=f"use a multiple of {at_once}",
        )


def check_kernels(r: Recipe) -> None:
    """Refuses kernels that this machine does not have.

    Raises:
        UserError: a package is not installed, or a GPU too old.
    """

    def missing(key: str, what: str, fix: str) -> UserError:
        return UserError(what, code=ExitCode.ENVIRONMENT, where=key, fix=fix)

    # The package called apex on PyPI is another one.
    if r.optimizer == "apex" and importlib.util.find_spec("amp_C") is None:
        fix = "run cosmos setup --install --with apex, or set optimizer: auto"
        raise missing("optimizer", "NVIDIA's Apex is not installed", fix)
    key = "transformer_engine"
    if r.transformer_engine == "off":
        return
    if importlib.util.find_spec("transformer_engine") is None:
        fix = "run cosmos setup --install --with transformer-engine, or set transformer_engine: off"
        raise missing(key, "Transformer Engine is not installed", fix)
    if min((capability for _, capability in gpus()), default=(0, 0)) < (8, 9):
        fix = "use GPUs of compute capability 8.9 or above, or set transformer_engine: off"
        raise missing(key, "these GPUs do not compute in fp8", fix)


def check_resume(r: Recipe, run: Run, ranks: int) -> int:
    """The step at which the run goes on, 0 for a new one.

    Raises:
        UserError: the saved run was another one.
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
        changes["num_processes"] = (saved["world_size"], ranks)
    dataset = Dataset.at(r.dataset_dir, r.videos_dir).manifest
    if saved["dataset"] != (now := layout.sha256_file(dataset)):
        changes["clips"] = (f"manifest {saved['dataset'][:12]}", f"manifest {now[:12]}")
        console.warn("the dataset has changed since this run was saved, and its order with it")
    if changes:
        rows = [(key, str(before), str(now), str(now)) for key, (before, now) in changes.items()]
        console.say(console.table(rows, ("key", "checkpoint", "recipe", "used")))
    return steps[-1]


def check_disk(r: Recipe, run: Run, start: int) -> None:
    """Refuses a run whose saves would not fit.

    Raises:
        UserError: less free than the remaining saves and min_free_disk_gb need.
    """
    layout.require_free(
        run.root,
        plan.disk_bytes(r, start)["whole run"] + r.min_free_disk_gb * 1e9,
        "the saves of the run",
        "free some space, save less often, or set output_root",
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
    # What `start` gives its ranks; torch, imported below, reads it.
    os.environ.update(environment(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if rank == 0:
        _prepare(loaded, run)
    from cosmos_cli.model import train

    shown = trackers.following(loaded.recipe, run) if rank == 0 else contextlib.nullcontext()
    with shown:
        outcome = train.run_rank(loaded.recipe)
    if outcome["exit_code"]:
        raise Interrupted(ExitCode(outcome["exit_code"]))
    return outcome


def start(loaded: LoadedRecipe, ranks: int) -> dict[str, Any]:
    """Runs the ranks to their end; the figures of the run's result.

    Raises:
        UserError: the first failure of a rank.
        Interrupted: a signal ended the run after a clean save.
    """
    run = Run(loaded.recipe.run_dir.absolute())
    command = [
        sys.executable, "-m", "cosmos_cli.model.elastic",
        "--nproc-per-node", str(ranks), "-m", "cosmos_cli.model.train", str(run.resolved),
    ]  # fmt: skip
    restarts = 0
    with _locked(run) as lock, mailbox.Mailbox() as box:
        while True:
            _prepare(loaded, run)
            with trackers.following(loaded.recipe, run):
                code, signal_seen = _run_to_the_end(
                    command,
                    env={**environment(ranks), mailbox.ADDRESS: box.address},
                    stdout=sys.stderr,
                    # The launcher holds the lock too: ranks may still save when this process is
                    # killed.
                    pass_fds=(lock,),
                )
            messages = box.read()
            if signal_seen:
                raise Interrupted(signal_seen)
            if run.result.exists():
                return _outcome(run)
            failure = _failure(messages, code)
            # What a rank explained, a full disk or a loss that is not finite, would come again.
            explained = any("error" in m and "lost" not in m for m in messages)
            if restarts == loaded.recipe.max_restarts or explained:
                raise failure
            restarts += 1
            console.warn(f"{failure}: restart {restarts} of {loaded.recipe.max_restarts}")


def _failure(messages: list[dict[str, Any]], launcher_code: int) -> UserError:
    """The failure to show: the first that a rank explained, else what torchrun saw first."""
    explained = next((m for m in messages if "error" in m), None)
    if explained:
        code = ExitCode(explained["code"])
        return UserError(explained["error"], code=code, where=f"rank {explained['rank']}")
    verdict = next((m for m in messages if "first" in m), {"first": 0, "process_code": None})
    rank, process_code = verdict["first"], verdict["process_code"]
    own = next((m for m in messages if m.get("rank") == rank), {})
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


class _Signals:
    """Passes signals on to the ranks.

    SIGUSR1 has them save and go on; SIGINT and SIGTERM, as SIGTERM, save and end. Twice kills them.
    """

    def __init__(self) -> None:
        self.seen: ExitCode | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            console.say("saving: the step ends and is saved, then training goes on")
            self.pass_on(number)
            return
        again, self.seen = self.seen, _CODES[signal.Signals(number)]
        if again:
            self.stop(signal.SIGKILL)
            return
        console.say("stopping: the step ends and is saved; once more to stop at once")
        self.stop(signal.SIGTERM)

    def stop(self, number: int) -> None:
        """Signals the ranks, or the launcher while it has not started them."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if not self.pass_on(number) or number == signal.SIGKILL:
                os.killpg(self.process.pid, number)

    def pass_on(self, number: int) -> bool:
        """Signals the ranks; whether there are any yet."""
        if self.process is None:
            return False
        ranks = []
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = psutil.Process(self.process.pid).children()
            for rank in ranks:
                rank.send_signal(number)
        return bool(ranks)


def _run_to_the_end(command: list[str], **options: Any) -> tuple[int, ExitCode | None]:
    """The exit code of a command, and that of the signal that was passed on to it, if any."""
    signals = _Signals()
    before = {number: signal.signal(number, signals) for number in (*_CODES, signal.SIGUSR1)}
    try:
        # A session of its own: Ctrl-C reaches us alone and is passed on to the ranks, not to
        # torchrun, which would kill them half a minute later, in the middle of a save.
        process = subprocess.Popen(command, start_new_session=True, **options)
        signals.process = process
        if signals.seen:
            signals.stop(signal.SIGTERM)
        process.wait()
        kill_group(process.pid)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode, signals.seen


def kill_group(group: int) -> None:
    """Ends every process of a group that is still there."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def environment(ranks: int) -> dict[str, str]:
    """The environment of `ranks` processes on this machine."""
    defaults = {
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks, 1)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        # Folders like datasets/ in the working directory must not pass for packages.
        "PYTHONSAFEPATH": "1",
    }
    if not gpu_names():
        # Without it DeepSpeed guesses, and prints the guess on stdout.
        defaults["DS_ACCELERATOR"] = "cpu"
    return {**defaults, **os.environ}


@contextmanager
def _locked(run: Run) -> Iterator[int]:
    """Holds the run against a second process; the descriptor of the lock.

    Raises:
        UserError: another process trains it.
    """
    with layout.disk_errors(run.root):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        stream = (run.root / ".lock").open("w")
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "another process is training this run",
                code=ExitCode.USAGE,
                where=str(run.root),
                fix="wait for it, or set name to start another run",
            ) from error
        yield stream.fileno()


def _prepare(loaded: LoadedRecipe, run: Run) -> None:
    """Clears what an earlier start left and writes what the run is made from."""
    from cosmos_cli import recipe

    with layout.disk_errors(run.root):
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        layout.remove_stale(run.checkpoints)
        run.result.unlink(missing_ok=True)
    if loaded.path is not None:
        layout.write_text(run.root / "recipe.yaml", loaded.path.read_text(encoding="utf-8"))
    layout.write_text(run.resolved, recipe.dump(loaded.recipe))
    step = (run.resumable_steps() or [0])[-1]
    with layout.disk_errors(run.samples):
        for path in run.samples.glob("step_*"):
            if int(path.name.split("_")[1]) > step:
                path.unlink()
    history.note(run, {"step": step, "max_steps": loaded.recipe.max_steps})
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
