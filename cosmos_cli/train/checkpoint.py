"""Restore a run from its resume state, and move tensors between ZeRO shards and whole files."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_cli import console, files, hashes
from cosmos_cli.errors import asset_error
from cosmos_cli.model import lora, lora_files, tensor_names, weights
from cosmos_cli.model.ema import PowerEMA
from cosmos_cli.model.finite import require_finite
from cosmos_cli.paths import MANIFEST_FILE, Run
from cosmos_cli.train import reshard

# The folder inside a resume state that holds DeepSpeed's files.
SHARDS = "zero"
# The rank whose optimizer state a file of DeepSpeed holds.
_OWNER = re.compile(r"zero_pp_rank_(\d+)_")


def shard(parameter: nn.Parameter) -> Tensor:
    """Return this rank's flat ZeRO-3 shard of a parameter, or all of it below stage 3."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name: all of them, or the factors of a LoRA."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def shards(module: nn.Module) -> list[Tensor]:
    """Return this rank's shard of every trained parameter, in the order of `trained`."""
    return [shard(parameter) for parameter in trained(module).values()]


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the full shape of a parameter, sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def scatter(full: Tensor, parameter: nn.Parameter, target: Tensor) -> None:
    """Copy this rank's part of a full tensor into `target`, which has the layout of its shard."""
    if not hasattr(parameter, "ds_tensor"):
        target.copy_(full)
        return
    start = dist.get_rank() * target.numel()
    part = full.reshape(-1)[start : start + target.numel()]
    target[: part.numel()].copy_(part)


def gather(parameter: nn.Parameter, part: Tensor, device: torch.device) -> Tensor:
    """Return the full tensor on `device`. Every rank must call this, with its shard as `part`."""
    if not hasattr(parameter, "ds_tensor"):
        return part
    # Offloaded shards lie in CPU memory, where NCCL cannot exchange them.
    part = part.to(device)
    joined = part.new_empty(dist.get_world_size() * part.numel())
    dist.all_gather_into_tensor(joined, part.contiguous())
    return joined[: parameter.ds_numel].view(full_shape(parameter))


def own_part(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Return this rank's shard without its padding, which fills the end of the last shard."""
    if not hasattr(parameter, "ds_tensor"):
        return part
    left = parameter.ds_numel - dist.get_rank() * part.numel()
    return part[: max(min(left, part.numel()), 0)]


def load_weights(module: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    """Copy a full state dict into this rank's shards, one tensor at a time.

    If the file has no log-variance head, the module keeps its freshly initialised one.

    Raises:
        UserError: names or shapes do not match the module, or a value is not finite.
    """
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    if not any(name.startswith("logvar.") for name in state):
        parameters = {n: p for n, p in parameters.items() if not n.startswith("logvar.")}
        buffers = {n: b for n, b in buffers.items() if not n.startswith("logvar.")}
    shapes = {name: full_shape(parameter) for name, parameter in parameters.items()}
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}
    tensor_names.check_keys(shapes, state, where)
    for name, parameter in parameters.items():
        scatter(state[name], parameter, shard(parameter))
    for name, buffer in buffers.items():
        buffer.copy_(state[name])
    require_finite(
        {n: own_part(p, shard(p)) for n, p in parameters.items()} | buffers,
        where,
        tensor_names.name_in_file(where),
    )
    forget_copies(module)


def forget_copies(module: nn.Module) -> None:
    """Drop the secondary copies of hpZ, which are stale: it would gather them after a load."""
    for parameter in module.parameters():
        if hasattr(parameter, "ds_secondary_tensor"):
            parameter.ds_secondary_tensor = None


def resume(engine: Any, ema: PowerEMA, run: Run, step: int) -> None:
    """Restore weights, fp32 master weights, moments and EMA as they were after `step` updates.

    The number of ranks may differ from the number that saved the state.

    Raises:
        UserError: a file of the resume state is missing or its hash differs, or a weight is not
            finite.
    """
    folder = run.resume_state(step)
    manifest = files.read_json(folder / MANIFEST_FILE)
    module = engine.module
    path = model_file(run, module, step, "ema")
    began = time.monotonic()
    if not _is_whole(folder, path, manifest):
        what = f"is damaged: its files or {path.name} are missing or differ from what was saved"
        fix = f"run `rm -r {quote(str(folder))}`; the same command resumes an older save"
        raise asset_error(folder, what, fix)
    console.say(f"checked the files of step {step} in {time.monotonic() - began:.1f} s")
    adapted, saved_by = lora.attached(module), manifest["world_size"]
    if saved_by == dist.get_world_size():
        engine.checkpoint_engine.load = reshard.read_state
        engine.load_checkpoint(str(folder), tag=SHARDS, load_module_strict=not adapted)
    else:
        reshard.load_state(engine, folder / SHARDS, saved_by)
    forget_copies(module)
    state = lora.factors(lora_files.load_lora(path)) if adapted else weights.load_dit_state(path)
    own = {}
    for (name, parameter), part in zip(trained(module).items(), ema.shards, strict=True):
        scatter(state[name], parameter, part)
        own[name] = own_part(parameter, shard(parameter))
        own[f"{name} (ema)"] = own_part(parameter, part)
    fix = "delete this folder; the same command then resumes from the save before it"
    require_finite(own, folder, fix=fix)


def model_file(run: Run, module: nn.Module, step: int, kind: str) -> Path:
    """Return the path of the reg or ema weights of a save: a whole model, or a LoRA."""
    return run.lora(step, kind) if lora.attached(module) else run.model(step, kind)


def _is_whole(folder: Path, ema: Path, manifest: dict[str, Any]) -> bool:
    """True if the files of a resume state and its EMA are what was saved.

    Every rank must call this. The ranks share the pieces. If as many ranks saved it, each reads the
    files that it is going to load.
    """
    pieces = manifest.get("pieces", {})
    if pieces.get("bytes") != hashes.PIECE:
        # Saved by an earlier version.
        same = ema.is_file() and hashes.sha256_file(ema) == manifest["ema_sha256"]
        return _hash_files(folder) == manifest["files"] and same
    found = {name: folder / name for name in _names(folder)}
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    if {name: files.size_of(path) for name, path in found.items()} != sizes:
        return False
    if not ema.is_file():
        return False
    everything = {**found, "": ema}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    is_own_file = manifest["world_size"] == ranks
    own = []
    for i, (name, index) in enumerate(
        (name, index)
        for name, path in everything.items()
        for index in range(hashes.piece_count(path))
    ):
        owner = _OWNER.search(name) if is_own_file else None
        if (int(owner[1]) if owner else i % ranks) == rank:
            own.append((name, index))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = threads.map(
            lambda piece: hashes.sha256_piece(everything[piece[0]], piece[1]), own
        )
        hashed = _merge_ranks(dict(zip(own, digests, strict=True)))
    wanted = {**pieces["files"], "": pieces["ema"]}
    return all(
        hashes.sha256_pieces([hashed[name, index] for index in range(hashes.piece_count(path))])
        == wanted[name]
        for name, path in everything.items()
    )


def _names(folder: Path) -> list[str]:
    """Return the names of the files of a resume state except its manifest."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_FILE
    )


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file of a resume state except its manifest.

    The ranks share the hashing.
    """
    names = _names(folder)
    return _merge_ranks({
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashes.sha256_file(folder / name),
        }
        for name in names[dist.get_rank() :: dist.get_world_size()]
    })  # fmt: skip


def _merge_ranks(own: dict[Any, Any]) -> dict[Any, Any]:
    """Merge the dicts of all ranks, sorted by key; every rank must call this."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return dict(sorted(item for part in gathered for item in part.items()))
