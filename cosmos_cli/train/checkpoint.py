"""Save and restore the resume states and model files of a run.

Tensors are scattered to ZeRO shards and gathered from them. A save is either complete or absent.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_cli import files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import lora, lora_files, tensor_names, weights
from cosmos_cli.model.ema import PowerEMA
from cosmos_cli.model.finite import require_finite
from cosmos_cli.paths import MANIFEST_FILE, Run
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import reshard, status

# The folder inside a resume state that holds DeepSpeed's files.
SHARDS = "zero"


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
        own = {**parameters, **buffers}
        parameters = {n: p for n, p in parameters.items() if not n.startswith("logvar.")}
        buffers = {n: own[n] for n in buffers if not n.startswith("logvar.")}
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


def save(engine: Any, ema: PowerEMA, run: Run, step: int, about: dict[str, Any]) -> None:
    """Save the model files and the resume state of `step`; every rank must call this.

    The resume state gets its final name only when all of it is on disk.
    """
    final = run.resume_state(step)
    building = final.with_name(f".{final.name}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(building, ignore_errors=True)
    dist.barrier()
    sha256 = _save_models(engine, ema, run, step)
    try:
        with weights.writing(final):
            written = _save_state(engine, building)
            sha256 = _merge_ranks(sha256)
            if dist.get_rank() == 0:
                manifest = {
                    "step": step,
                    "world_size": dist.get_world_size(),
                    "ema_sha256": sha256["ema"],
                    **about,
                    "files": written,
                }
                files.write_json(building / MANIFEST_FILE, manifest)
                files.sync(building / SHARDS)
                shutil.rmtree(final, ignore_errors=True)
                building.rename(final)
                files.sync(run.checkpoints)
    except UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(building, ignore_errors=True)
        raise
    dist.barrier()


def prune(run: Run, r: Recipe) -> None:
    """Delete the resume states and model files that the recipe does not keep.

    Call it after a complete save. A resume reads the model file of the EMA, so those of the resume
    states stay.
    """
    with files.disk_errors(run.checkpoints):
        for step in run.resumable_steps()[: -r.keep_last]:
            if r.keep_every_steps and step % r.keep_every_steps == 0:
                continue
            old = run.resume_state(step)
            # Rename it first: a partly deleted folder must not pass for a complete state.
            condemned = old.with_name(f".{old.name}.tmp")
            old.rename(condemned)
            shutil.rmtree(condemned)
        written = run.weight_files()
        kept = {*[*written][-r.keep_models :], *run.resumable_steps(), status.best_step(run)}
        for step in written.keys() - kept if r.keep_models else ():
            for path in written[step]:
                path.unlink()


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
    whole = path.is_file() and files.sha256_file(path) == manifest["ema_sha256"]
    if _hash_files(folder) != manifest["files"] or not whole:
        raise UserError(
            f"is damaged: its files or {path.name} are missing or differ from what was saved",
            code=ExitCode.ASSET,
            where=str(folder),
            fix="delete this folder; the same command then resumes from the save before it",
        )
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


def _save_state(engine: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Write DeepSpeed's state. Return the size and sha256 of the files of all ranks."""
    written = {}

    def write(state_dict: Any, path: str) -> None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        size, sha256 = weights.write_pt(state_dict, file)
        written[str(file.relative_to(folder))] = {"bytes": size, "sha256": sha256}

    engine.checkpoint_engine.save = write
    # Frozen weights come from the base, not from the checkpoint.
    engine.save_checkpoint(
        str(folder), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True
    )
    if dist.get_rank() == 0:
        # DeepSpeed adds scripts that convert its state to a model file, which we write ourselves.
        for script in folder.glob("*.py"):
            script.unlink()
    return _merge_ranks(written)


def _save_models(engine: Any, ema: PowerEMA, run: Run, step: int) -> dict[str, str]:
    """Write both model files, on two ranks at once if possible.

    Return the sha256 of the files that this rank wrote, by kind.
    """
    module, second = engine.module, 1 % dist.get_world_size()
    states = {
        "reg": _gather_all(module, shards(module), 0, engine.device),
        "ema": _gather_all(module, ema.shards, second, engine.device),
    }
    # Pop each state so that its memory is freed once it is written: 14 and 29 GB for the 7B.
    return {
        kind: _save_model(module, states.pop(kind), model_file(run, module, step, kind))
        for kind in tuple(states)
        if states[kind]
    }


def _gather_all(
    module: nn.Module, parts: list[Tensor], rank: int, device: torch.device
) -> dict[str, Tensor]:
    """Gather the trained weights into CPU memory on one rank. Other ranks return an empty dict."""
    state = {}
    for (name, parameter), part in zip(trained(module).items(), parts, strict=True):
        full = gather(parameter, part, device)
        if dist.get_rank() == rank:
            state[name] = full.detach().to("cpu", copy=True)
    return state


def _save_model(module: nn.Module, state: dict[str, Tensor], path: Path) -> str:
    """Write the trained weights, and return the sha256 of their file."""
    if lora.attached(module):
        lora_files.save_lora(path, state, lora.scale(module))
        return files.sha256_file(path)
    buffers = {name: buffer.cpu() for name, buffer in module.named_buffers()}
    return weights.save_released(path, {**buffers, **state})


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file of a resume state except its manifest.

    The ranks share the hashing.
    """
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST_FILE
    )
    return _merge_ranks({
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": files.sha256_file(folder / name),
        }
        for name in names[dist.get_rank() :: dist.get_world_size()]
    })  # fmt: skip


def _merge_ranks(own: dict[str, Any]) -> dict[str, Any]:
    """Merge the dicts of all ranks, sorted by key; every rank must call this."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    return dict(sorted(item for part in gathered for item in part.items()))
