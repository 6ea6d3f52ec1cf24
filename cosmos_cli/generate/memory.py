"""Estimate the memory of generate, and decide how many blocks of the denoiser are streamed."""

from __future__ import annotations

from pathlib import Path

import torch

from cosmos_cli import console, cpu_memory, files, paths
from cosmos_cli.errors import ExitCode, UserError, asset_error
from cosmos_cli.generate.guards import guardrail
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.model.device import default_dtype, free_gpu_bytes
from cosmos_cli.recipe import residence
from cosmos_cli.recipe.keys import Recipe

# The file in memory that holds the streamed weights of a denoiser: see model/shared_weights.py.
Shared = dict[tuple[Weights, str], Path]
# Bytes of a bf16 value.
BYTES = 2
# Bytes of a block of stat(2).
BLOCK_OF_STAT = 512
# Peak memory of a pass of the denoiser without its weights, in units of one activation of all
# tokens. Measured: 14.2, and 10.3 with compiled blocks. The two passes of guidance share one more.
PASS_ACTIVATIONS = 16
# The video tokenizer in bf16, which is loaded next to the denoiser.
TOKENIZER_BYTES = 250_000_000
# Sizes to propose where the recipe's does not fit: frames, height, width.
SMALLER = ((57, 704, 1280), (33, 704, 1280), (121, 352, 640), (57, 352, 640), (33, 352, 640))


def bytes_together(r: Recipe) -> int:
    """Estimate the GPU memory of all networks at once and of a pass of the denoiser, in bytes.

    The denoiser counts in bf16, the other networks by the size of their files.
    """
    root = Path(r.checkpoints_dir)
    folders = [r.model_files.text_encoder]
    if r.upsampler != "off":
        folders.append(Path(r.upsampler))
    if guardrail.has_all(r):
        folders += [root / paths.LLAMA_GUARD_DIR, root / paths.SIGLIP_DIR]
    others = sum(map(_model_bytes, folders))
    return others + BYTES * (r.spec.dit.parameters + _pass_values(r))


def streamed_blocks(r: Recipe, device: str) -> int:
    """Return how many blocks of the denoiser to stream from CPU memory: those that do not fit.

    On a CPU it is all of them, if the recipe asks for it.

    Raises:
        UserError: (GPU_MEMORY) the GPU cannot hold a pass.
    """
    dit, size = r.spec.dit, default_dtype(device).itemsize
    if device == "cpu":
        return dit.blocks if r.memory == "streamed" else 0
    free, others = free_gpu_bytes(torch.device(device)), _bytes_besides_blocks(r)
    count = residence.streamed(dit, size, free - others)
    needed = others + residence.block_weights(dit, size, count)
    if needed > free:
        raise UserError(
            f"the denoiser needs {console.size(needed)} of GPU memory even with streamed weights, "
            f"{console.size(free)} are free",
            code=ExitCode.GPU_MEMORY, where=r.name, fix=_smaller(r, free),
        )  # fmt: skip
    return count


def require_cpu_memory(r: Recipe, count: int, device: str, shared: Shared | None = None) -> None:
    """Refuse to stream `count` blocks if CPU memory is short.

    Processes share one copy of each denoiser. What they have filled of it is not counted twice.

    Raises:
        UserError: (ASSET) CPU memory is short.
    """
    dit, copies = r.spec.dit, list((shared or {}).values())
    block = dit.block_parameters * default_dtype(device).itemsize
    each = block if copies or device == "cpu" else residence.pinned_bytes(block)
    needed = count * each * max(len(copies), 1)
    filled = sum(BLOCK_OF_STAT * path.stat().st_blocks for path in copies)
    available = cpu_memory.available_bytes() + filled
    if needed > available:
        what = (
            f"{count} of {dit.blocks} blocks are streamed and need {console.size(needed)} of CPU "
            f"memory, {console.size(available)} are available"
        )
        fix = "close other programs, or use `--set memory=in_turn`"
        if device != "cpu":
            fix = _smaller(r, free_gpu_bytes(torch.device(device)))
        raise asset_error(r.name, what, fix)


def weights_line(r: Recipe, count: int, shared: Shared | None = None) -> str:
    """Return the line that says where the weights of the denoiser are."""
    dit = r.spec.dit
    if not count:
        return "denoiser: all weights are on the device"
    place = "CPU memory, one copy for all processes" if shared else "CPU memory"
    streamed = f"{count} of {dit.blocks} blocks are streamed from {place}"
    return f"denoiser: {streamed}; {dit.blocks - count} stay on the device"


def _bytes_besides_blocks(r: Recipe) -> int:
    """Return the bf16 memory of a pass and of what is loaded next to the denoiser's blocks."""
    dit = r.spec.dit
    texts = 2 * 2 * dit.blocks * r.spec.text.tokens * dit.width
    values = dit.parameters - dit.blocks * dit.block_parameters + texts + _pass_values(r)
    siglip = Path(r.checkpoints_dir, paths.SIGLIP_DIR)
    guards = _model_bytes(siglip) if guardrail.has_all(r) else 0
    return BYTES * values + TOKENIZER_BYTES + guards


def _pass_values(r: Recipe) -> int:
    return PASS_ACTIVATIONS * r.tokens * r.spec.dit.width


def _model_bytes(folder: Path) -> int:
    return sum(
        files.size_of(path)
        for path in folder.rglob("*")
        if path.suffix == ".safetensors" or path.name == paths.MODEL_FILE
    )


def _smaller(r: Recipe, free: float) -> str:
    """Return a fix: the largest usual size whose pass fits."""
    for frames, height, width in SMALLER:
        other = r.model_copy(update={"num_frames": frames, "height": height, "width": width})
        least = residence.block_weights(r.spec.dit, BYTES, r.spec.dit.blocks)
        if _pass_values(other) < _pass_values(r) and _bytes_besides_blocks(other) + least <= free:
            return f"add `--set num_frames={frames} --set height={height} --set width={width}`"
    return "use a GPU with more memory, or close the programs that use it"
