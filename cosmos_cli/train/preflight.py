"""Check what `cosmos train` needs before any process starts. Does not import torch."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from cosmos_cli import archives, console, cpu_memory, files, gpus
from cosmos_cli.errors import asset_error, dataset_error, environment_error, usage_error
from cosmos_cli.gpus import gpu_names
from cosmos_cli.paths import Dataset, Run
from cosmos_cli.prep import holdout
from cosmos_cli.ranks import under_launcher
from cosmos_cli.recipe import advice, gpu_models, plan
from cosmos_cli.spec import COSMOS_7B
from cosmos_cli.train import resumes, status, trackers

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


# The least that a run can keep on disk, next to its best save.
FEWEST_FILES = {"keep_models": 1, "keep_last": 1, "keep_every_steps": 0}


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


def check_training(r: Recipe, run: Run, ranks: int, command: resumes.CommandLine | None) -> Ready:
    """Check everything that a training needs. `command` is None with --overwrite.

    Raises:
        UserError: something is missing, does not fit, or would be overwritten.
    """
    check_recipe(r, ranks)
    clips, held_out = check_dataset(r)
    start = resumes.check_resume(r, run, ranks)
    deletes = resumes.deleted_by_overwriting(run, start) if command is None else ()
    if command is not None:
        resumes.check_overwrite(r, run, start, command)
    finished = start >= r.max_steps and status.is_finished(run)
    if not finished:
        check_disk(r, run, start, sum(map(files.size_of, deletes)))
    return Ready(clips, held_out, start, finished, deletes)


def check_dataset(r: Recipe) -> tuple[int, int]:
    """Return the number of training clips and of held-out clips that prep made for this recipe.

    Raises:
        UserError: prep has not run, or ran with other settings or other videos.
    """
    dataset = r.dataset
    where = str(dataset.manifest)
    manifest = dataset.read_manifest()
    if what := other_setting(r, manifest):
        raise dataset_error(where, what, "run `cosmos prep RECIPE` again")
    for video in manifest["videos"]:
        caption, source = video.get("caption", ""), video.get("caption_source")
        words, wanted = caption.split(), (r.prompt or "").split()
        # A model's description follows the prompt. A prompt may have been given to prep alone.
        same = words == wanted if source == "prompt" else words[: len(wanted)] == wanted
        if caption and wanted and source in ("prompt", "vlm") and not same:
            what = f"has the caption {caption[:80]!r}, made with another prompt than {r.prompt!r}"
            fix = "run `cosmos prep RECIPE` again"
            if source == "prompt":
                fix += f", or add `--set {quote(f'prompt={caption}')}`"
            raise dataset_error(f"{where}: {video['file']}", what, fix)
    listed = {video["path"]: video["bytes"] for video in manifest["videos"]}
    names = {
        *listed,
        *(path.relative_to(dataset.videos).as_posix() for path in dataset.video_files()),
    }
    present = {path: files.size_of(dataset.videos / path) for path in names}
    if changed := sorted(set(present.items()) ^ set(listed.items())):
        what = f"is older than the videos: {changed[0][0]} was added, removed or changed"
        raise dataset_error(where, what, "run `cosmos prep RECIPE` again")
    _require_captions(dataset, manifest)
    clips, held_out = holdout.split_clips(manifest)
    return len(clips), len(held_out)


def _require_captions(dataset: Dataset, manifest: dict[str, Any]) -> None:
    captions = {video["file"]: video.get("caption", "") for video in manifest["videos"]}
    texts = {Path(clip["text"]).stem: captions.get(clip["video"]) for clip in manifest["clips"]}
    for stem, embedded in texts.items():
        meta = dataset.metas / f"{stem}.txt"
        if embedded and meta.exists():
            now = files.read_text(meta, files.CAPTION)
            if now.split() != embedded.split():
                what = "was edited since prep, which embedded another caption"
                raise dataset_error(meta, what, "run `cosmos prep RECIPE` again")


def other_setting(r: Recipe, manifest: dict[str, Any]) -> str:
    """Return in words a setting in which dataset and recipe differ, "" if none does."""
    wanted_settings = r.dataset_settings
    for key, prepared in manifest["settings"].items():
        wanted = wanted_settings.get(key, getattr(r, key, None))
        if wanted != prepared:
            return f"was prepared with {key} = {prepared}, the recipe needs {wanted}"
    return ""


def check_recipe(r: Recipe, ranks: int) -> None:
    """Refuse a recipe that this machine cannot train on `ranks` processes.

    Raises:
        UserError: the model is for generation only, the batch does not divide, a tracker or kernel
            is not installed, or weights are missing.
    """
    check_world(r, ranks)
    if unsafe := set("*?[") & {*str(r.run_dir)}:
        what = f"contains {min(unsafe)!r}: DeepSpeed globs this path and finds no checkpoint"
        raise usage_error(r.run_dir, what, "choose another folder with `--set output_root=FOLDER`")
    if os.environ.get("NNODES", "1") != "1" and not under_launcher():
        what = f"is {os.environ['NNODES']!r}, but this command starts ranks on one machine only"
        fix = "start it on every node with torchrun or recipes/slurm.sh, or run `unset NNODES`"
        raise usage_error("NNODES", what, fix)
    trackers.check_tracker(r)
    check_kernels(r)
    check_cpu_memory(r, ranks)
    base = r.model_files.dit
    if not base.exists():
        fix = (
            "give a file of weights: `--set base=FILE`"
            if r.base
            else "run `cosmos download RECIPE --for train`, or use `--set base=FILE`"
        )
        raise asset_error(base, "the base weights are missing", fix)
    tokenizer = r.model_files.tokenizer
    if (r.preview_every_steps or r.sample_every_saves) and not tokenizer.exists():
        what = "the video tokenizer is missing, and previews and samples need it"
        fix = (
            "run `cosmos download RECIPE --for prep`, or add "
            "`--set preview_every_steps=0 --set sample_every_saves=0`"
        )
        raise asset_error(tokenizer, what, fix)
    # The ranks would find damage only after they have imported everything.
    for path in sorted(base.rglob("*.safetensors")) if base.is_dir() else [base]:
        archives.check_weights(path)


def check_world(r: Recipe, ranks: int) -> None:
    """Refuse a recipe that no machine can train on `ranks` processes.

    Raises:
        UserError: the model is for generation only, or the processes or the batch do not divide.
    """
    if not r.spec.trainable:
        fix = f"use `--set model={COSMOS_7B.name}`"
        raise usage_error("model", f"{r.model} is for generation only", fix)
    for key in ("hpz_partition_size", "sequence_parallel"):
        size = getattr(r, key)
        if size != "auto" and ranks % size:
            what = f"{ranks} processes do not divide into groups of {size}"
            raise usage_error(key, what, f"use `--set {key}={math.gcd(ranks, size)}`")
    if r.offload == "weights" and ranks > 1:
        fix = "use `--set num_processes=1`, or `--set zero_stage=3 --set offload=none`"
        what = f"weights are streamed to one GPU, found {ranks} processes"
        raise usage_error("offload", what, fix)
    at_once = ranks // r.sequence_parallel * r.micro_batch_size
    if r.global_batch_size % at_once:
        what = (
            f"{r.global_batch_size} clips do not divide into micro batches of "
            f"{r.micro_batch_size} on {ranks} processes"
        )
        next_multiple = -(-r.global_batch_size // at_once) * at_once
        count = "" if r.num_processes in ("auto", ranks) else f" --set num_processes={ranks}"
        fix = f"use `--set global_batch_size={next_multiple}{count}`"
        raise usage_error("global_batch_size", what, fix)


def check_cpu_memory(r: Recipe, ranks: int) -> None:
    """Refuse a run whose offloaded state does not fit in CPU memory.

    Raises:
        UserError: (ASSET) less CPU memory is available than the plan needs.
    """
    needed = 1e9 * plan.plan(r, ranks, smallest_gpu()).host_gb
    available = cpu_memory.available_bytes()
    if needed > available:
        what = (
            f"offload {r.offload} needs {console.size(needed)} of CPU memory, "
            f"{console.size(available)} are available"
        )
        raise asset_error(r.name, what, _less_cpu_memory(r))


def _less_cpu_memory(r: Recipe) -> str:
    if r.offload == "weights" and r.activation_checkpointing == "attention":
        return "add `--set activation_checkpointing=all`, which stores half as many activations"
    return f"close other programs, or use {advice.smaller_clip(r)}"


def check_kernels(r: Recipe) -> None:
    """Refuse a recipe whose kernels this machine cannot run.

    Raises:
        UserError: a package is not installed, or a GPU is too old.
    """
    # PyPI has an unrelated package named apex, so look for a module that only NVIDIA's has.
    if r.optimizer == "apex" and importlib.util.find_spec("amp_C") is None:
        fix = "run `cosmos setup RECIPE --install --with apex`, or add `--set optimizer=auto`"
        raise environment_error("optimizer", "NVIDIA's Apex is not installed", fix)
    key = "transformer_engine"
    if r.transformer_engine == "off":
        return
    if importlib.util.find_spec("transformer_engine") is None:
        fix = (
            "run `cosmos setup RECIPE --install --with transformer-engine`, "
            "or add `--set transformer_engine=off`"
        )
        raise environment_error(key, "Transformer Engine is not installed", fix)
    fix = "use GPUs of compute capability 8.9 or above, or add `--set transformer_engine=off`"
    shown = gpus.visible()
    if not shown.gpus:
        raise environment_error(key, f"fp8 needs a GPU, and none was found{_because(shown)}", fix)
    if old := [gpu for gpu in shown.gpus if gpu.capability < (8, 9)]:
        what = f"GPU {old[0].index}, {old[0].name}, does not compute in fp8"
        raise environment_error(key, what, fix)


def check_gpus(r: Recipe, ranks: int) -> None:
    """Refuse to start more processes than this machine has GPUs.

    The tiny model may run on a CPU.

    Raises:
        UserError: the machine has fewer GPUs.
    """
    found = len(gpu_names())
    if found < ranks and (found or not r.spec.embedded):
        what = f"{ranks} processes need {ranks} GPUs, found {found}{_because(gpus.visible())}"
        fix = "add `--set num_processes=auto` and a global_batch_size that fits, or see `--plan`"
        raise environment_error("num_processes", what, fix)


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


def check_disk(r: Recipe, run: Run, start: int, freed: int = 0) -> None:
    """Refuse a run whose saves do not fit on the disk, even after `freed` bytes are deleted.

    Training also deletes what a killed run left of a save.

    Raises:
        UserError: less space is free than the remaining saves plus min_free_disk_gb.
    """
    freed += sum(map(files.size_within, files.stale(run.checkpoints)))
    keep = r.keep_every_steps
    replaced = sum(not keep or step % keep > 0 for step in run.resumable_steps()[-r.keep_last :])
    needed, free = plan.disk(r, start, replaced).run_bytes, files.free_bytes(run.root) + freed
    if free >= needed + r.min_free_disk_gb * 1e9:
        return
    ways = ["`--set output_root=FOLDER` on a larger disk"]
    if spare := max(free - needed, 0) // 1e8 / 10:
        ways.append(f"`--set min_free_disk_gb={spare:g}`")
    elif plan.disk(r.model_copy(update=FEWEST_FILES), start).run_bytes < min(needed, free):
        options = " ".join(f"--set {key}={value}" for key, value in FEWEST_FILES.items())
        ways.append(f"`{options} --set min_free_disk_gb=0`")
    what = (
        f"the run needs {console.size(needed)}, and min_free_disk_gb keeps "
        f"{r.min_free_disk_gb:g} GB free; {console.size(free)} are free"
    )
    raise asset_error(run.root, what, f"free some space, or use {' or '.join(ways)}")
