"""Resume states and model files of a run: full tensors to ZeRO shards and back, whole or absent."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_cli import layout
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.layout import MANIFEST_FILE, Run
from cosmos_cli.model import weights
from cosmos_cli.model.ema import PowerEMA

# The folder of DeepSpeed's files inside a resume state.
SHARDS = "zero"


def shard(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter: its flat ZeRO-3 shard, or all of it below stage 3."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data


def shards(module: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter, in the order of `named_parameters`."""
    return [shard(parameter) for parameter in module.parameters()]


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter, whether it is sharded or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def scatter(full: Tensor, parameter: nn.Parameter, target: Tensor) -> None:
    """Copies this rank's part of a full tensor to `target`, which is laid out like its shard."""
    if not hasattr(parameter, "ds_tensor"):
        target.copy_(full)
        return
    start = dist.get_rank() * target.numel()
    part = full.reshape(-1)[start : start + target.numel()]
    target[: part.numel()].copy_(part)


def gather(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The full tensor whose shards the ranks hold in `part`; every rank must call it."""
    if not hasattr(parameter, "ds_tensor"):
        return part
    joined = part.new_empty(dist.get_world_size() * part.numel())
    dist.all_gather_into_tensor(joined, part.contiguous())
    return joined[: parameter.ds_numel].view(full_shape(parameter))


def load_weights(module: nn.Module, state: dict[str, Tensor], where: Path) -> None:
    """Copies a full state dict into this rank's shards, a tensor at a time.

    A base without the log-variance head keeps the fresh one.
    """
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    if not any(name.startswith("logvar.") for name in state):
        own = {**parameters, **buffers}
        parameters = {n: p for n, p in parameters.items() if not n.startswith("logvar.")}
        buffers = {n: own[n] for n in buffers if not n.startswith("logvar.")}
    shapes = {name: full_shape(parameter) for name, parameter in parameters.items()}
    shapes |= {name: buffer.shape for name, buffer in buffers.items()}
    weights.check_keys(shapes, state, where)
    for name, parameter in parameters.items():
        scatter(state[name], parameter, shard(parameter))
    for name, buffer in buffers.items():
        buffer.copy_(state[name])


def save(
    engine: Any, ema: PowerEMA, run: Run, step: int, about: dict[str, Any], keep_last: int
) -> None:
    """Saves model files and resume state of `step`, then drops the oldest resume states.

    The resume state appears under its name only when all of it is on disk. Every rank must call it.
    """
    module = engine.module
    _save_model(module, shards(module), run.model(step, "reg"))
    _save_model(module, ema.shards, run.model(step, "ema"))
    final = run.resume_state(step)
    building = final.with_name(f".{final.name}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(building, ignore_errors=True)
    dist.barrier()
    try:
        with weights.writing(final):
            engine.save_checkpoint(str(building), tag=SHARDS, save_latest=False)
    except UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise
    dist.barrier()
    files = _hash_files(building)
    if dist.get_rank() == 0:
        manifest = {
            "step": step,
            "world_size": dist.get_world_size(),
            "ema_sha256": layout.sha256_file(run.model(step, "ema")),
            **about,
            "files": files,
        }
        layout.write_json(building / MANIFEST_FILE, manifest)
        with layout.disk_errors(final):
            layout.sync_tree(building)
            shutil.rmtree(final, ignore_errors=True)
            building.rename(final)
            layout.sync(run.checkpoints)
        for old in run.resumable_steps()[:-keep_last]:
            # Out of sight first: a half-removed folder must not look complete.
            leaving = building.with_name(f".{run.resume_state(old).name}.tmp")
            run.resume_state(old).rename(leaving)
            shutil.rmtree(leaving)
    dist.barrier()


def resume(engine: Any, ema: PowerEMA, run: Run, step: int) -> None:
    """Restores weights, masters, moments and EMA as they were after `step` updates.

    Raises:
        UserError: a file of the resume state is missing or not as it was written.
    """
    folder = run.resume_state(step)
    manifest = layout.read_json(folder / MANIFEST_FILE)
    path = run.model(step, "ema")
    whole = path.is_file() and layout.sha256_file(path) == manifest["ema_sha256"]
    if _hash_files(folder) != manifest["files"] or not whole:
        raise UserError(
            f"is damaged: its files or {path.name} are not as they were written",
            code=ExitCode.ASSET,
            where=str(folder),
            fix="delete this folder; the same command then resumes from the save before it",
        )
    engine.load_checkpoint(str(folder), tag=SHARDS)
    state = weights.load_dit_state(path)
    for (name, parameter), part in zip(engine.module.named_parameters(), ema.shards, strict=True):
        scatter(state[name], parameter, part)


def _save_model(module: nn.Module, parts: list[Tensor], path: Path) -> None:
    state = {name: buffer.cpu() for name, buffer in module.named_buffers()}
    for (name, parameter), part in zip(module.named_parameters(), parts, strict=True):
        full = gather(parameter, part)
        if dist.get_rank() == 0:
            state[name] = full.detach().cpu().clone()
    if dist.get_rank() == 0:
        weights.save_dit(path, state, "pt")


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a resume state but its manifest, by all ranks together."""
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_FILE
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    own = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": layout.sha256_file(folder / name),
        }
        for name in names[rank::world]
    }
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, own)
    return {name: entry for part in gathered for name, entry in sorted(part.items())}
