"""Check what `cosmos train` needs before any process starts. Does not import torch."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import psutil

from cosmos_cli import archives, console, files, gpus, paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.gpus import gpu_names
from cosmos_cli.paths import Dataset, Run
from cosmos_cli.prep import holdout
from cosmos_cli.ranks import under_launcher
from cosmos_cli.recipe import advice, gpu_models, plan
from cosmos_cli.spec import COSMOS_7B
from cosmos_cli.train import status, trackers

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


# The least that a run can keep on disk, next to its best save.
FEWEST_FILES = {"keep_models": 1, "keep_last": 1, "keep_every_steps": 0}
# Return the command line of a verb on the user's recipe, given the verb and `extra` arguments.
CommandLine = Callable[..., str]


@dataclass(frozen=True)
class Ready:
    """Describe a training that may start.

    `clips` and `held_out` are numbers of clips. `start` is the step it resumes from. `deletes` are
    the files that --overwrite deletes.
    """

    clips: int
    held_out: int
    start: int
    finished: bool
    deletes: tuple[Path, ...]


def check_training(r: Recipe, run: Run, ranks: int, command: CommandLine | None) -> Ready:
    """Check everything that a training needs. `command` is None with --overwrite.

    Raises:
        UserError: something is missing, does not fit, or would be overwritten.
    """
    check_recipe(r, ranks)
    clips, held_out = check_dataset(r)
    start = check_resume(r, run, ranks)
    deletes = _deleted_by_overwriting(run, start) if command is None else ()
    if command is not None:
        check_overwrite(r, run, start, command)
    finished = start >= r.max_steps and status.is_finished(run)
    if not finished:
        check_disk(r, run, start, sum(map(files.size_of, deletes)))
    return Ready(clips, held_out, start, finished, deletes)


def check_dataset(r: Recipe) -> tuple[int, int]:
    """Return the number of training clips and of held-out clips that prep made for this recipe.

    Raises:
        UserError: prep has not run, or ran with other settings or other videos.
    """
    dataset = Dataset.at(r.dataset_dir, r.videos_dir)
    where = str(dataset.manifest)
    manifest = dataset.read_manifest()
    wanted_settings = r.dataset_settings
    for key, prepared in manifest["settings"].items():
        wanted = wanted_settings.get(key, getattr(r, key, None))
        if wanted != prepared:
            raise UserError(
                f"was prepared with {key} = {prepared}, the recipe says {wanted}",
                code=ExitCode.DATASET,
                where=where,
                fix="run `cosmos prep RECIPE` again",
            )
    listed = {video["path"]: video["bytes"] for video in manifest["videos"]}
    names = {
        *listed,
        *(path.relative_to(dataset.videos).as_posix() for path in dataset.video_files()),
    }
    present = {path: files.size_of(dataset.videos / path) for path in names}
    if changed := sorted(set(present.items()) ^ set(listed.items())):
        raise UserError(
            f"is older than the videos: {changed[0][0]} was added, removed or changed",
            code=ExitCode.DATASET,
            where=where,
            fix="run `cosmos prep RECIPE` again",
        )
    clips, held_out = holdout.split_clips(manifest)
    return len(clips), len(held_out)


def check_recipe(r: Recipe, ranks: int) -> None:
    """Refuse a recipe that this machine cannot train on `ranks` processes.

    Raises:
        UserError: the model is for generation only, the batch does not divide, a tracker or kernel
            is not installed, or weights are missing.
    """
    check_world(r, ranks)
    if unsafe := set("*?[") & {*str(r.run_dir)}:
        raise UserError(
            f"contains {min(unsafe)!r}: DeepSpeed globs this path and finds no checkpoint",
            code=ExitCode.USAGE, where=str(r.run_dir),
            fix="choose another folder with `--set output_root=FOLDER`",
        )  # fmt: skip
    if os.environ.get("NNODES", "1") != "1" and not under_launcher():
        raise UserError(
            f"is {os.environ['NNODES']!r}, but this command starts ranks on one machine only",
            code=ExitCode.USAGE,
            where="NNODES",
            fix="start it on every node with torchrun or recipes/slurm.sh, or run `unset NNODES`",
        )
    trackers.check_tracker(r)
    check_kernels(r)
    check_cpu_memory(r, ranks)
    base = r.model_files.dit
    if not base.exists():
        raise UserError(
            "the base weights are missing",
            code=ExitCode.ASSET,
            where=str(base),
            fix="give a file of weights: `--set base=FILE`"
            if r.base
            else "run `cosmos download RECIPE --for train`, or use `--set base=FILE`",
        )
    # The ranks would find damage only after they have imported everything.
    for path in sorted(base.rglob("*.safetensors")) if base.is_dir() else [base]:
        archives.check_weights(path)
    tokenizer = r.model_files.tokenizer
    if (r.preview_every_steps or r.sample_every_saves) and not tokenizer.exists():
        raise UserError(
            "the video tokenizer is missing, and previews and samples need it",
            code=ExitCode.ASSET,
            where=str(tokenizer),
            fix="run `cosmos download RECIPE --for prep`, or add "
            "`--set preview_every_steps=0 --set sample_every_saves=0`",
        )


def check_world(r: Recipe, ranks: int) -> None:
    """Refuse a recipe that no machine can train on `ranks` processes.

    Raises:
        UserError: the model is for generation only, or the processes or the batch do not divide.
    """

    def bad(key: str, what: str, fix: str) -> UserError:
        return UserError(what, code=ExitCode.USAGE, where=key, fix=fix)

    if not r.spec.trainable:
        fix = f"use `--set model={COSMOS_7B.name}`"
        raise bad("model", f"{r.model} is for generation only", fix)
    for key in ("hpz_partition_size", "sequence_parallel"):
        size = getattr(r, key)
        if size != "auto" and ranks % size:
            what = f"{ranks} processes do not divide into groups of {size}"
            raise bad(key, what, f"use `--set {key}={math.gcd(ranks, size)}`")
    if r.offload == "weights" and ranks > 1:
        fix = "use `--set num_processes=1`, or `--set zero_stage=3 --set offload=none`"
        raise bad("offload", f"weights are streamed to one GPU, found {ranks} processes", fix)
    at_once = ranks // r.sequence_parallel * r.micro_batch_size
    if r.global_batch_size % at_once:
        what = (
            f"{r.global_batch_size} clips do not divide into micro batches of "
            f"{r.micro_batch_size} on {ranks} processes"
        )
        raise bad(
            "global_batch_size",
            what,
            f"use `--set global_batch_size={-(-r.global_batch_size // at_once) * at_once}`",
        )


def check_cpu_memory(r: Recipe, ranks: int) -> None:
    """Refuse a run whose offloaded state does not fit in CPU memory.

    Raises:
        UserError: (ASSET) less CPU memory is available than the plan needs.
    """
    needed = 1e9 * plan.plan(r, ranks, smallest_gpu()).host_gb
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"offload {r.offload} needs {console.size(needed)} of CPU memory, "
            f"{console.size(available)} are available",
            code=ExitCode.ASSET, where=r.name, fix=_less_cpu_memory(r),
        )  # fmt: skip


def _less_cpu_memory(r: Recipe) -> str:
    if r.offload == "weights" and r.activation_checkpointing == "attention":
        return "add `--set activation_checkpointing=all`, which stores half as many activations"
    return f"close other programs, or use {advice.smaller_clip(r)}"


def check_kernels(r: Recipe) -> None:
    """Refuse a recipe whose kernels this machine cannot run.

    Raises:
        UserError: a package is not installed, or a GPU is too old.
    """

    def missing(key: str, what: str, fix: str) -> UserError:
        return UserError(what, code=ExitCode.ENVIRONMENT, where=key, fix=fix)

    # PyPI has an unrelated package named apex, so look for a module that only NVIDIA's has.
    if r.optimizer == "apex" and importlib.util.find_spec("amp_C") is None:
        fix = "run `cosmos setup RECIPE --install --with apex`, or add `--set optimizer=auto`"
        raise missing("optimizer", "NVIDIA's Apex is not installed", fix)
    key = "transformer_engine"
    if r.transformer_engine == "off":
        return
    if importlib.util.find_spec("transformer_engine") is None:
        fix = (
            "run `cosmos setup RECIPE --install --with transformer-engine`, "
            "or add `--set transformer_engine=off`"
        )
        raise missing(key, "Transformer Engine is not installed", fix)
    fix = "use GPUs of compute capability 8.9 or above, or add `--set transformer_engine=off`"
    shown = gpus.visible()
    if not shown.gpus:
        raise missing(key, f"fp8 needs a GPU, and none was found{_because(shown)}", fix)
    if old := [gpu for gpu in shown.gpus if gpu.capability < (8, 9)]:
        raise missing(key, f"GPU {old[0].index}, {old[0].name}, does not compute in fp8", fix)


def check_gpus(r: Recipe, ranks: int) -> None:
    """Refuse to start more processes than this machine has GPUs.

    The tiny model may run on a CPU.

    Raises:
        UserError: the machine has fewer GPUs.
    """
    found = len(gpu_names())
    if found < ranks and (found or not r.spec.embedded):
        raise UserError(
            f"{ranks} processes need {ranks} GPUs, found {found}{_because(gpus.visible())}",
            code=ExitCode.ENVIRONMENT, where="num_processes",
            fix="add `--set num_processes=auto` and a global_batch_size that fits, or see `--plan`",
        )  # fmt: skip


def smallest_gpu() -> gpu_models.GpuModel | None:
    """Return the kind of this machine's GPUs. If they differ, the smallest one that is known."""
    kinds = filter(None, map(gpu_models.find_gpu, gpu_names()))
    return min(kinds, key=lambda gpu: gpu.memory_gb, default=None)


def warn_of_hidden_gpus() -> None:
    """Warn if CUDA_VISIBLE_DEVICES or MIG leaves other GPUs than the user may expect."""
    if remark := gpus.visible().remark:
        console.warn(remark)


def _because(shown: gpus.Selection) -> str:
    return f" ({shown.remark})" if shown.remark else ""


def check_resume(r: Recipe, run: Run, ranks: int) -> int:
    """Return the step from which the run resumes, 0 for a new run.

    Raises:
        UserError: the saved run has other base weights, or other values of keys that decide a run.
    """
    steps = run.resumable_steps()
    if not steps:
        return 0
    folder = run.resume_state(steps[-1])
    saved = files.read_json(folder / paths.MANIFEST_FILE)
    changes = _changes(r, saved)
    for key in r.deciding("run"):
        before, now = changes.get(key, (None, None))
        if before != now and not _are_equivalent(key, before, now, "clips" not in changes):
            if key == "base" and ("base" in saved or _is_moved(before, now)):
                continue
            clips = ", whose clips differ" if key == "dataset_dir" else ""
            raise _another_run(folder, f"{key} = {before}, the recipe says {now}{clips}")
    if "base" in saved:
        base = r.model_files.dit
        if files.sha256_path(base) != saved["base"]:
            raise _another_run(folder, f"other base weights than those now in {base}")
    if saved["world_size"] != ranks:
        changes["num_processes"] = (saved["world_size"], ranks)
    if "clips" in changes:
        console.warn(
            "the dataset has changed since this run was saved, and so has the order of its clips"
        )
    if changes:
        rows = [(key, str(before), str(now), str(now)) for key, (before, now) in changes.items()]
        console.say(console.table(rows, ("key", "checkpoint", "recipe", "used")))
    return steps[-1]


def _changes(r: Recipe, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ from a saved run, each with its saved and its present value.

    The pseudo-key "clips" stands for the manifest of the dataset.
    """
    changes = {
        key: (value, getattr(r, key))
        for key, value in saved["recipe"].items()
        if hasattr(r, key) and getattr(r, key) != value
    }
    dataset = Dataset.at(r.dataset_dir, r.videos_dir).manifest
    now = files.sha256_file(dataset) if dataset.exists() else "is missing"
    if saved["dataset"] != now:
        changes["clips"] = (f"manifest {saved['dataset'][:12]}", f"manifest {now[:12]}")
    return changes


def check_overwrite(r: Recipe, run: Run, start: int, command: CommandLine) -> None:
    """Refuse to replace the weights that an earlier training of this run saved after `start`.

    A resumed run reproduces the weights after its resume state bit for bit. So they are protected
    only if the recipe or the clips changed. Model files of an incomplete save do not count.

    Raises:
        UserError: weights or metrics would be overwritten, and --overwrite was not given.
    """
    newest = status.saved_step(run)
    if newest <= start or start >= r.max_steps:
        return
    later = [step for step in run.weight_files(start) if step <= newest]
    if start:
        saved = files.read_json(run.resume_state(start) / paths.MANIFEST_FILE)
        changed = {*r.deciding("steps"), "clips"} & _changes(r, saved).keys()
        if r.lr_end_factor == 1:
            changed -= {"max_steps"}
        if not later or not changed:
            return
        why = f"would resume at step {start} with another {', '.join(sorted(changed))}"
    elif later or status.rows(run):
        why = "has no complete resume state and would start again at step 0"
    else:
        return
    lost = f"the weights of {_steps(later)}" if later else "the metrics of the earlier training"
    raise UserError(
        f"this run {why}, overwriting {lost}", code=ExitCode.USAGE, where=str(run.root),
        fix=_suggestions(r, run, later, command),
    )  # fmt: skip


def warn_of_overwriting(r: Recipe, run: Run, command: CommandLine) -> None:
    """Warn in a plan if an earlier run's weights would keep the run from starting."""
    try:
        check_overwrite(r, run, run.last_step, command)
    except UserError as error:
        console.warn(str(error))


def _deleted_by_overwriting(run: Run, start: int) -> tuple[Path, ...]:
    """Return and report the weight files that --overwrite deletes."""
    if start:
        console.say(f"--overwrite: the run resumes at step {start}, nothing up to it is deleted")
    written = tuple(path for written in run.weight_files(start).values() for path in written)
    if written:
        console.say(f"--overwrite deletes {len(written)} model files of steps after {start}")
    return written


def _steps(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} saves, steps {steps[0]} to {steps[-1]}"


def free_name(run: Run) -> str:
    """Return a name for another run next to this one."""
    names = (f"{run.root.name[:90]}-{number}" for number in itertools.count(2))
    return next(name for name in names if not run.root.with_name(name).exists())


def _suggestions(r: Recipe, run: Run, later: list[int], command: CommandLine) -> str:
    """Return the commands to choose from: a new run, a run from these weights, or --overwrite."""
    another = command("train", extra=f"--set name={free_name(run)}")
    ways = [f"another run: `{another}`"]
    if later:
        newest = run.weight_files()[later[-1]][0]
        base, first = newest, ""
        if newest == run.lora(later[-1], "ema") or newest == run.lora(later[-1], "reg"):
            # A LoRA is not a base by itself: promote merges it into the weights it was trained on.
            kind = "ema" if newest == run.lora(later[-1], "ema") else "reg"
            first = command("promote", extra=f"--step {later[-1]} --weights {kind}") + " && "
            base = paths.promoted_dir(r.spec, r.checkpoints_dir) / paths.MODEL_FILE
        ways.append(f"one that starts from them: `{first}{another} --set {quote(f'base={base}')}`")
    ways.append(f"delete them and start again: `{command('train', extra='--overwrite')}`")
    return "; ".join(ways)


def _are_equivalent(key: str, before: Any, now: Any, same_clips: bool) -> bool:
    """True if two values of a key mean the same. A dataset with the same clips is the same."""
    if key == "optimizer":
        return {before, now} == {"auto", "torch"}
    if key != "dataset_dir":
        return False
    return same_clips or os.path.abspath(before) == os.path.abspath(now)  # noqa: PTH100


def _is_moved(before: str | None, now: str | None) -> bool:
    """True if base weights, of which the run saved no hash, may be the same file at a new path.

    A resumed run of all weights takes nothing from its base, so the file need not be known.
    """
    if not before or not now:
        return False
    old, new = (paths.weights_in(Path(path).absolute()) for path in (before, now))
    if old.exists():
        return files.sha256_path(old) == files.sha256_path(new)
    console.warn(f"base was {before}, which is not there: the run continues from its own weights")
    return True


def _another_run(folder: Path, with_what: str) -> UserError:
    return UserError(
        f"this run was started with {with_what}", code=ExitCode.USAGE, where=str(folder),
        fix=f"start another: `cosmos train RECIPE --set name={free_name(Run(folder.parents[1]))}`",
    )  # fmt: skip


def check_disk(r: Recipe, run: Run, start: int, freed: int = 0) -> None:
    """Refuse a run whose saves do not fit on the disk, even after `freed` bytes are deleted.

    Training also deletes what a killed run left of a save.

    Raises:
        UserError: less space is free than the remaining saves plus min_free_disk_gb.
    """
    freed += sum(map(files.size_within, files.stale(run.checkpoints)))
    needed, free = plan.disk(r, start).run_bytes, files.free_bytes(run.root) + freed
    if free >= needed + r.min_free_disk_gb * 1e9:
        return
    ways = ["`--set output_root=FOLDER` on a larger disk"]
    if spare := max(free - needed, 0) // 1e8 / 10:
        ways.append(f"`--set min_free_disk_gb={spare:g}`")
    elif plan.disk(r.model_copy(update=FEWEST_FILES), start).run_bytes < min(needed, free):
        options = " ".join(f"--set {key}={value}" for key, value in FEWEST_FILES.items())
        ways.append(f"`{options} --set min_free_disk_gb=0`")
    raise UserError(
        f"the run needs {needed / 1e9:,.1f} GB, and min_free_disk_gb keeps {r.min_free_disk_gb:g} "
        f"GB free; {free / 1e9:,.1f} GB are free",
        code=ExitCode.ASSET, where=str(run.root),
        fix=f"free some space, or use {' or '.join(ways)}",
    )  # fmt: skip
