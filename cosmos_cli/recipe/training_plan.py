"""Choose how to train on some clips with some GPUs, so that it fits and ends. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cosmos_cli import console
from cosmos_cli.recipe import plan
from cosmos_cli.recipe.gpu_models import GpuModel
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.recipe.plan import Plan
from cosmos_cli.spec import COSMOS_7B as SPEC

# A run should end within this time.
MOST_HOURS = 12
# With at least this many clips, all weights are trained. With fewer, a LoRA memorises them later.
FULL_FROM_CLIPS = 100
# A machine with one GPU of less memory is a desktop, which has DESKTOP_GB of CPU memory.
DESKTOP_GPU_GB, DESKTOP_GB = 40, 30
# How often the run shows each clip, within the limits on its number of steps.
PASSES = 50
FEWEST_STEPS, MOST_STEPS = 200, 2000
# Unit of a number of steps that the time limits.
STEP = 50
SAVES = 5
FULL_BATCH, LORA_BATCH = 8, 4
LORA_RANK = 16
# Lengths and sizes of smaller clips to fall back to, as shares of the first size.
SHORTER, SMALLER = (121, 57, 33), (1.0, 0.5)
CHECKPOINTING = {
    "attention": "everything but self-attention is recomputed in the backward pass, to save memory",
    "all": "all of a block is recomputed in the backward pass, to save more memory",
}


@dataclass(frozen=True)
class Machine:
    """The GPUs to train on; `found` says where the choice comes from."""

    count: int
    gpu: GpuModel
    found: str

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu.name}"


class Clip(NamedTuple):
    """The frames and the size of a clip."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Choice:
    """A way to train that fits: its clip, its recipe, what it needs, and its keys with reasons."""

    clip: Clip
    recipe: Recipe
    plan: Plan
    lines: list[tuple[str, Any, str]] = field(default_factory=list)

    @property
    def hours(self) -> float:
        """The predicted hours of the run."""
        assert self.plan.run_hours is not None
        return self.plan.run_hours


def choose_way(clip: Clip, lengths: Sequence[int], held_out: float, machine: Machine) -> Choice:
    """Return the first way to train that fits and ends within MOST_HOURS, the best first.

    If none ends in time, it is the fastest that fits; if none fits, the one that needs least.
    `lengths` are the frames of each video at the rate of the clips, `held_out` is the share of the
    videos that is held out.
    """
    ways: list[Choice] = []
    for smaller in _clips(clip):
        # As prep holds them out.
        held = min(max(round(held_out * len(lengths)), 1), len(lengths) - 1) if held_out else 0
        videos = len(lengths) - held
        clips = max(sum(n // smaller.frames for n in lengths) * videos // len(lengths), 1)
        for settings in _methods(clips, machine):
            for way in _schedules(smaller, clips, settings, machine):
                if _fits(way, machine) and way.hours <= MOST_HOURS:
                    return way
                ways.append(way)
    fitting = [way for way in ways if _fits(way, machine)]
    if fitting:
        return min(fitting, key=lambda way: way.hours)
    return min(ways, key=lambda way: way.plan.total_gb)


def _clips(clip: Clip) -> Iterator[Clip]:
    """Yield the clip and smaller ones, each with fewer tokens."""
    step = SPEC.size_multiple
    lengths = [clip.frames, *(n for n in SHORTER if n < clip.frames)]
    for share in SMALLER:
        size = [max(int(side * share) // step, 1) * step for side in clip[1:]]
        for frames in lengths:
            yield Clip(frames, *size)


def _methods(clips: int, machine: Machine) -> list[dict[str, Any]]:
    """Return settings in the order to try them: fast ones before those that save memory."""
    several = machine.count > 1
    full: list[dict[str, Any]] = [
        {"zero_stage": 3, "activation_checkpointing": mode, "offload": offload}
        for offload in ("none", "optimizer")
        for mode in ("attention", "all")
    ]
    common = {"lora_rank": LORA_RANK, "lora_targets": "attention_mlp", "weight_decay": 0.0}
    lora: list[dict[str, Any]] = [
        {**common, "zero_stage": stage, "activation_checkpointing": mode, "offload": "none"}
        for stage in ((1, 3) if several else (1,))
        for mode in ("attention", "all")
    ]
    if not several:
        lora += [{**way, "offload": "weights"} for way in lora]
    return [*full, *lora] if clips >= FULL_FROM_CLIPS else lora


def _schedules(
    clip: Clip, clips: int, settings: dict[str, Any], machine: Machine
) -> Iterator[Choice]:
    """Yield ways to train with these settings: with large batches first, then with fewer clips."""
    usual = LORA_BATCH if "lora_rank" in settings else FULL_BATCH
    batch = machine.count * -(-usual // machine.count)
    batches = [batch, *(n * machine.count for n in (2, 1) if n * machine.count < batch)]
    for size in batches if "lora_rank" in settings else batches[:1]:
        wanted = int(min(max(round(clips * PASSES / size, -2), FEWEST_STEPS), MOST_STEPS))
        way = _way(clip, clips, settings, machine, (size, wanted))
        if way.hours > MOST_HOURS:
            ending = int(wanted * MOST_HOURS / way.hours) // STEP * STEP
            way = _way(clip, clips, settings, machine, (size, max(ending, FEWEST_STEPS)))
        yield way


def _way(
    clip: Clip, clips: int, settings: dict[str, Any], machine: Machine, schedule: tuple[int, int]
) -> Choice:
    batch, steps = schedule
    rate = 2e-4 if "lora_rank" in settings else 4.957595e-5
    values = {
        **settings, "learning_rate": rate, "warmup_steps": steps // 20, "max_steps": steps,
        "save_every_steps": steps // SAVES, "keep_models": 2, "global_batch_size": batch,
        "micro_batch_size": 1, "num_processes": machine.count, "precision": "bf16",
    }  # fmt: skip
    size = {"num_frames": clip.frames, "height": clip.height, "width": clip.width}
    recipe = Recipe.model_validate({"model": SPEC.name, "dataset_dir": "d", **size, **values})
    found = plan.plan(recipe, machine.count, machine.gpu)
    lines = [(key, values[key], reason) for key, reason in _reasons(values, clips, machine).items()]
    return Choice(clip, recipe, found, lines)


def _fits(way: Choice, machine: Machine) -> bool:
    """True if the GPUs have room to spare, and the CPU memory of such a machine suffices."""
    if way.plan.total_gb > machine.gpu.memory_gb * plan.COMFORTABLE:
        return False
    is_desktop = machine.count == 1 and machine.gpu.memory_gb < DESKTOP_GPU_GB
    return not is_desktop or way.plan.cpu_gb <= DESKTOP_GB


def _reasons(values: dict[str, Any], clips: int, machine: Machine) -> dict[str, str]:
    """Return the reason for each value that the recipe sets."""
    steps, batch = values["max_steps"], values["global_batch_size"]
    reasons: dict[str, str] = {}
    if "lora_rank" in values:
        few = f"{clips} clips are few for 7 billion weights" if clips < FULL_FROM_CLIPS else (
            f"training all weights does not fit on {machine} or does not end in time"
        )  # fmt: skip
        reasons |= {
            "lora_rank": f"{few}, so two small factors of each linear are trained",
            "lora_targets": "it learns more than attention alone, for little memory",
            "weight_decay": "the weights are frozen; decay would only shrink the change",
        }
    offload = {
        "none": f"everything fits in the memory of {machine}",
        "optimizer": "the optimizer state does not fit on the GPU",
        "weights": "frozen weights that do not fit on the GPU are streamed from CPU memory",
    }[values["offload"]]
    stage = "the weights and their state are sharded over the GPUs" if machine.count > 1 else (
        "one GPU has nothing to shard"
    )  # fmt: skip
    if values["zero_stage"] == 1 and machine.count > 1:
        stage = "each GPU can hold all frozen weights, which is the fastest"
    return {
        **reasons,
        "zero_stage": stage,
        "activation_checkpointing": CHECKPOINTING[values["activation_checkpointing"]],
        "offload": offload,
        "learning_rate": "it is usual for a LoRA" if reasons else "NVIDIA's own training uses it",
        "warmup_steps": "it is a twentieth of the run",
        "max_steps": f"each of {clips} clips is seen {steps * batch / clips:.0f} times",
        "save_every_steps": f"{SAVES} checkpoints can be compared",
        "keep_models": "older model files than these and the best one are deleted",
        "global_batch_size": "it is a multiple of the number of GPUs",
        "micro_batch_size": "one clip at a time needs the least memory",
        "num_processes": machine.found,
        "precision": "the weights are in bf16, and NVIDIA GPUs since 2020 compute in it",
    }


def describe_way(way: Choice, machine: Machine) -> list[str]:
    """Return the lines that say what the run needs, and why it may not end in time."""
    found, disk = way.plan, plan.disk(way.recipe, 0).run_bytes / 1e9
    time = f"{way.hours:.1f} hours" if way.hours >= 0.1 else console.duration(way.hours * 3600)
    lines = [
        f"On {machine}: {found.total_gb:.1f} GB of {machine.gpu.memory_gb:.1f} GB of each GPU, "
        f"{found.cpu_gb:.0f} GB of CPU memory,",
        f"{disk:.0f} GB of disk for the run, {time} (predicted).",
    ]
    if not found.fits:
        lines.append(f"It does not fit on {machine}. Use a GPU with more memory: see --gpus.")
    elif way.hours > MOST_HOURS:
        lines.append(f"It does not end within {MOST_HOURS} hours: use more GPUs, see --gpus.")
    return lines
