"""Say what a plan means: its text, and the changes that make a recipe fit. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cosmos_cli import console
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.recipe.gpu_models import GPUS, GpuModel
from cosmos_cli.recipe.plan import (
    COMFORTABLE,
    USABLE,
    Plan,
    activation_bytes,
    disk,
    model_tflop,
    plan,
)

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# Changes that save memory, in the order to try them.
GPU_SAVERS = (
    {"zero_stage": 3},
    {"activation_checkpointing": "attention"},
    {"activation_checkpointing": "all"},
    {"micro_batch_size": 1},
    {"sequence_parallel": 2},
)
SAVERS = (
    *GPU_SAVERS,
    {"offload": "weights", "zero_stage": 1},
    {"offload": "ema"},
    {"offload": "optimizer"},
    {"offload": "parameters", "zero_stage": 3},
)
LORA = {"lora_rank": 16, "learning_rate": 2e-4}
# Shorter clips to try. Their length must be 8k + 1.
SHORTER = (57, 33)


def require_fit(r: Recipe, gpu: GpuModel) -> None:
    """Refuse a streamed training that does not fit on a GPU although everything else is streamed.

    Raises:
        UserError: (GPU_MEMORY) the error names what is needed and the next smaller clip.
    """
    found = plan(r, 1, gpu)
    if found.total_gb > gpu.memory_gb:
        raise UserError(
            f"needs {found.total_gb:.1f} GB of GPU memory even with streamed weights, "
            f"{gpu.memory_gb:.1f} GB are free",
            code=ExitCode.GPU_MEMORY, where=r.name, fix=f"add {smaller_clip(r)}",
        )  # fmt: skip


def remedies(r: Recipe, ranks: int, gpu: GpuModel) -> list[tuple[str, Plan]]:
    """Return the --set options that make the recipe fit, with their plans, the best first.

    Each keeps the clips as large as possible: with all weights trained and with a LoRA, in GPU
    memory alone and with state in CPU memory.
    """
    found: dict[str, Plan] = {}
    # A recipe for another machine than the one that is planned for.
    count = {} if r.num_processes in ("auto", ranks) else {"num_processes": ranks}
    for method in ({},) if r.lora_rank else ({}, LORA):
        for savers in (GPU_SAVERS, SAVERS):
            for clip in _clips(r):
                changes = _fit(r, {**count, **method, **clip}, savers, ranks, gpu)
                if changes is not None:
                    less = plan(r.model_copy(update=changes), ranks, gpu)
                    options = (f"--set {k}={v}" for k, v in changes.items() if v != getattr(r, k))
                    found.setdefault(" ".join(options), less)
                    break
    # The same clips first; else what needs the least CPU memory.
    smaller = {words for words in found if "num_frames" in words or "height" in words}
    return sorted(found.items(), key=lambda way: way[0] in smaller and way[1].cpu_gb)


def smaller_clip(r: Recipe) -> str:
    """Return the --set options of the next smaller clip."""
    smaller = _clips(r)[1]
    return f"`{' '.join(f'--set {key}={value}' for key, value in smaller.items())}`"


def relief(r: Recipe, ranks: int) -> str:
    """Return what to change when a GPU's memory ran out in spite of the plan."""
    ways = []
    if _saves(r, {"activation_checkpointing": "all"}, ranks):
        ways.append("`--set activation_checkpointing=all`")
    if _saves(r, {"offload": "optimizer"}, ranks):
        cpu_gb = plan(r.model_copy(update={"offload": "optimizer"}), ranks, None).cpu_gb
        ways.append(f"`--set offload=optimizer` (it takes {cpu_gb:.0f} GB of CPU memory)")
    return f"use {' or '.join([*ways, smaller_clip(r)])}"


def _clips(r: Recipe) -> list[dict[str, int]]:
    """Return the changes of the clips to try, from none to the smallest clip."""
    step = r.spec.size_multiple
    half = {key: max(getattr(r, key) // 2 // step, 1) * step for key in ("height", "width")}
    lengths = [{}, *({"num_frames": n} for n in SHORTER if n < r.num_frames)]
    clips: list[dict[str, int]] = [{**length, **size} for length in lengths for size in ({}, half)]
    return sorted(clips, key=lambda clip: -activation_bytes(r.model_copy(update=clip)))


def _fit(
    r: Recipe, changes: dict[str, Any], savers: Sequence[dict[str, Any]], ranks: int, gpu: GpuModel
) -> dict[str, Any] | None:
    """Return `changes` with the fewest savers that make the recipe fit, or None if none do."""
    # With smaller clips there is a choice, so leave a margin for the error of the plan.
    margin = COMFORTABLE if {"num_frames", "height"} & changes.keys() else USABLE

    def joined(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**changes, **{key: saver[key] for saver in chosen for key in saver}}

    def fits(chosen: Sequence[dict[str, Any]]) -> bool:
        changed = r.model_copy(update=joined(chosen))
        total_gb = plan(changed, ranks, gpu).total_gb
        return _is_valid(changed, ranks) and total_gb <= gpu.memory_gb * margin

    used: list[dict[str, Any]] = []
    for saver in savers:
        if not fits(used) and _saves(r.model_copy(update=joined(used)), saver, ranks, gpu):
            used.append(saver)
    for saver in tuple(used):
        fewer = [other for other in used if other is not saver]
        if fits(fewer):
            used = fewer
    return joined(used) if fits(used) else None


def _saves(r: Recipe, change: dict[str, Any], ranks: int, gpu: GpuModel | None = None) -> bool:
    """True if a change is valid and saves GPU memory."""
    less = r.model_copy(update=change)
    before, after = (plan(one, ranks, gpu).total_gb for one in (r, less))
    return after < before and _is_valid(less, ranks)


def _is_valid(r: Recipe, ranks: int) -> bool:
    from cosmos_cli.recipe import rules

    # The plan is for `ranks` processes, whatever the recipe says.
    asked = r.model_copy(update={"num_processes": "auto"})
    if ranks % r.sequence_parallel or (r.offload == "weights" and ranks > 1):
        return False
    return not any(rules.conflicts(asked))


def describe(r: Recipe, ranks: int, gpu: GpuModel | None) -> str:
    """Return the plan as text."""
    found, space = plan(r, ranks, gpu), disk(r, 0)
    rows = [(part, _gb(size)) for part, size in found.memory_gb.items()]
    if gpu is None or found.available_gb is None:
        rows.append(("total", _gb(found.total_gb)))
    else:
        total, usable = _apart(found.total_gb, found.available_gb)
        verdict = "fits" if found.fits else "does not fit"
        if gpu.memory_gb * COMFORTABLE < found.total_gb and found.fits:
            verdict = "fits, with less than 5 % of the memory to spare"
        rows.append(("total", f"{total}: {verdict}"))
        whole = f"{gpu.memory_gb:.1f} GB ({gpu.memory_gb * 1e9 / 2**30:.1f} GiB)"
        rows.append(("usable", f"{usable} of the GPU's {whole}"))
    rows.append(("CPU memory", f"{_gb(found.cpu_gb)} for all processes together, an estimate"))
    if found.staged_gb:
        counted = f"{_gb(space.model_bytes / 1e9)} of it counted above"
        rows.append(("copy of a save", f"{_gb(found.staged_gb)} in CPU memory, {counted};"))
        rows.append(("", "without it, training waits while a save is written"))
    rows.append(("disk of the run", _gb(space.run_bytes / 1e9)))
    saves = f"{space.models} x {_gb(space.model_bytes / 1e9)} of model files"
    states = f"{space.states} x {_gb(space.state_bytes / 1e9)} of resume states"
    rows.append(("", f"{saves}, {states}"))
    if gpu is None or found.step_seconds is None:
        rows.append(("time", "not predicted without a GPU: add `--gpus 1xH100-80GB`"))
        names = [known.name for known in GPUS]
        lines = [", ".join(names[i : i + 5]) for i in range(0, len(names), 5)]
        rows += [("known GPUs" if i == 0 else "", line) for i, line in enumerate(lines)]
    else:
        share = model_tflop(r) / (found.step_seconds * ranks * gpu.tflops)
        rows.append(("step", f"{found.step_seconds:.1f} s predicted, {share:.0%} MFU"))
        assert found.run_hours is not None
        hours = found.run_hours
        took = f"{hours:.1f} h" if hours >= 0.1 else console.duration(hours * 3600)
        rows.append(("run", f"{took} for {r.max_steps} steps"))
    count = "1 process" if ranks == 1 else f"{ranks} processes"
    name = f"{ranks} x {gpu.name}" if gpu else f"{count}, no GPU"
    lines = [console.table(rows, (name, ""))]
    if gpu and not found.fits:
        for words, less in remedies(r, ranks, gpu):
            assert less.step_seconds is not None
            figures = f"{_gb(less.total_gb)}, {_gb(less.cpu_gb)} of CPU memory"
            lines += ["", f"`{words}`", f"    fits: {figures}, {less.step_seconds:.1f} s a step"]
    return "\n".join(lines)


def _gb(size: float) -> str:
    """Return gigabytes as text, in a smaller unit below one."""
    return f"{size:.1f} GB" if size >= 1 else console.size(size * 1e9)


def _apart(size: float, limit: float) -> tuple[str, str]:
    """Return two sizes in GB with as many decimals as show which one is larger."""
    digits = next((n for n in (1, 2) if f"{size:.{n}f}" != f"{limit:.{n}f}"), 3)
    return f"{size:.{digits}f} GB", f"{limit:.{digits}f} GB"


def check_memory(r: Recipe, ranks: int, gpu: GpuModel | None) -> dict[str, Any]:
    """Return the plan as figures.

    Raises:
        UserError: the memory is not enough. The fix names the changes that help, and the plan is
            printed before.
    """
    found = plan(r, ranks, gpu)
    figures = {"processes": ranks, "gpu": gpu and gpu.name, "fits": found.fits, **asdict(found)}
    if gpu and found.available_gb is not None and not found.fits:
        console.say(describe(r, ranks, gpu))
        ways = remedies(r, ranks, gpu)
        needed, usable = _apart(found.total_gb, found.available_gb)
        error = UserError(
            f"needs {needed} on each of {ranks} x {gpu.name}, {usable} are usable",
            code=ExitCode.GPU_MEMORY, where=r.name,
            fix=f"add `{ways[0][0]}`" if ways else "use more or larger GPUs",
        )  # fmt: skip
        error.figures = figures
        raise error
    return figures
