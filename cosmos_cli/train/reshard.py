"""Loads optimizer state that one number of ZeRO ranks saved into another number of ranks.

Each rank reads only its new shard, from memory-mapped files. So it holds its shard of the fp32
master weights and the two moments once in CPU memory and once where it trains, as when the number
of ranks stays the same. DeepSpeed's universal checkpoint would first write all state again.

The layouts are those of DeepSpeed 0.19. In stage 3 a rank holds an equal part of each parameter,
one after the other. The parameters form sub-groups, whose ends depend on the number of ranks. Below
stage 3 a rank holds an equal part of all parameters, concatenated. The last parts are padded with
zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# The keys of a file for the optimizer and the master weights, in stage 3 and below it.
_STAGE_3 = ("optimizer_state_dict", "fp32_flat_groups")
_BELOW = ("base_optimizer_state", "single_partition_of_fp32_groups")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def load_state(engine: Any, folder: Path, saved_by: int) -> None:
    """Load weights, master weights and moments that `saved_by` ranks saved, ZeRO stage 1 to 3.

    Every rank must call this.
    """
    zero = engine.optimizer
    files = _read(folder, saved_by)
    if engine.zero_optimization_stage() == 3:
        held = [[p.partition_numel() for p in group] for group in zero.fp16_groups]
        saved = [-(-p.ds_numel // saved_by) for group in zero.fp16_groups for p in group]
        zero.checkpoint_event_prologue()
        zero.load_state_dict({dist.get_rank(): _state(files, saved, held, _STAGE_3)})
        zero.checkpoint_event_epilogue()
    else:
        held = [[len(part)] for part in zero.single_partition_of_fp32_groups]
        saved = [len(files[0][_BELOW[1]][0])]
        state = _state(files, saved, held, _BELOW)
        zero.load_state_dict({dist.get_rank(): state}, load_from_fp32_weights=True)
        zero.update_lp_params()


def _read(folder: Path, saved_by: int) -> list[dict[str, Any]]:
    """Return the optimizer state of each saving rank, memory-mapped."""
    paths = (
        next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        for rank in range(saved_by)
    )
    return [read_state(path)["optimizer_state_dict"] for path in paths]


def read_state(path: Path | str, map_location: Any = "cpu") -> Any:
    """Load a DeepSpeed file, memory-mapped and with weights_only, so that no code in it runs."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location, weights_only=True, mmap=True)


def _state(
    files: list[dict[str, Any]], saved: list[int], held: list[list[int]], keys: tuple[str, str]
) -> dict[str, Any]:
    """Return the state dict that this rank would have saved; for `saved` and `held` see `cut`."""
    optimizer, masters = keys

    def own(groups_of_files: list[list[Tensor]]) -> list[Tensor]:
        return list(cut(groups_of_files, saved, held, dist.get_rank()))

    moments = {
        key: own([[state[key] for state in file[optimizer]["state"].values()] for file in files])
        for key in _MOMENTS
    }
    first = files[0][optimizer]
    groups = range(len(held))
    # The rest of the state is the step number, which is the same for all ranks and groups.
    others = {key: v for key, v in first["state"][0].items() if key not in _MOMENTS}
    state = {i: {**deepcopy(others), **{key: moments[key][i] for key in _MOMENTS}} for i in groups}
    settings = [{**first["param_groups"][0], "params": list(groups)}]
    return {
        **files[0],
        masters: own([file[masters] for file in files]),
        optimizer: {"state": state, "param_groups": settings},
    }


def cut(
    ranks: list[list[Tensor]], saved: list[int], held: list[list[int]], rank: int
) -> Iterator[Tensor]:
    """Yield the flat groups of the new rank `rank`.

    Args:
        ranks: the flat groups of each old rank.
        saved: for each parameter, the number of elements that an old rank holds.
        held: for each group and parameter, the number of elements that a new rank holds.
        rank: the new rank.
    """
    parameters = zip(*(split(groups, saved) for groups in ranks), strict=True)
    for counts in held:
        yield torch.cat([slice_pieces(next(parameters), rank * count, count) for count in counts])


def split(groups: list[Tensor], counts: list[int]) -> Iterator[Tensor]:
    """Yield the parameters of some flat groups; no parameter crosses the end of a group."""
    following = iter(groups)
    rest = next(following)
    for count in counts:
        if not len(rest):
            rest = next(following)
        yield rest[:count]
        rest = rest[count:]


def slice_pieces(pieces: tuple[Tensor, ...], start: int, count: int) -> Tensor:
    """Return `count` elements from `start` of the concatenated pieces, padded with zeros.

    All pieces but the last have the same length.
    """
    size = len(pieces[0])
    result = pieces[0].new_zeros(count)
    for i in range(start // size, min(-(-(start + count) // size), len(pieces))):
        low, high = max(start, i * size), min(start + count, i * size + len(pieces[i]))
        result[low - start : high - start] = pieces[i][low - i * size : high - i * size]
    return result
