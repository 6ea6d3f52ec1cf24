"""Estimate the memory of generate, and decide how many blocks of the denoiser are streamed."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from cosmos_cli import console, files, paths
from cosmos_cli.errors import ExitCode, UserError, asset_error
from cosmos_cli.generate.guards import guardrail
from cosmos_cli.model.device import free_gpu_bytes, number_format
from cosmos_cli.recipe import residence
from cosmos_cli.recipe.keys import Recipe

# Bytes of a bf16 value.
BYTES = 2
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
        UserError: (GPU_MEMORY) the GPU cannot hold a pass, or (ASSET) CPU memory is short.
    """
    dit, size = r.spec.dit, number_format(device).itemsize
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
    if not count:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    pinned = count * residence.pinned_bytes(dit.block_parameters * size)
    available = psutil.virtual_memory().available
    if pinned * processes > available:
        what = (
            f"{count} of {dit.blocks} blocks do not fit on the GPU and need "
            f"{console.size(pinned)} of CPU memory for each of {processes} processes, "
            f"{console.size(available)} are available"
        )
        fix = (
            "use one process: `CUDA_VISIBLE_DEVICES=0 cosmos generate ...`"
            if processes > 1
            else _smaller(r, free)
        )
        raise asset_error(r.name, what, fix)
    return count


def weights_line(r: Recipe, count: int) -> str:
    """Return the line that says where the weights of the denoiser are."""
    dit = r.spec.dit
    if not count:
        return "denoiser: all weights are on the device"
    held = dit.blocks - count
    return f"denoiser: {count} of {dit.blocks} blocks are streamed from CPU memory, {held} stay"


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
