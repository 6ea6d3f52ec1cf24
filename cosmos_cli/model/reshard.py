"""The optimizer state that some number of ZeRO ranks saved, for another number of them.

A rank reads its own new share only, from files that are mapped into memory: no rank holds more than
its share of the fp32 masters and the two moments, once on the host and once where it trains, as in
a resume by as many ranks. DeepSpeed's universal checkpoint would first write all of it anew.

Layouts are those of DeepSpeed 0.19. A stage 3 rank holds, one parameter after the other, an equal
part of each; the parameters stand in sub-groups, whose ends depend on the number of ranks. Below
stage 3 it holds an equal part of all parameters laid end to end. Zeros fill the last parts up.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What a file holds: the optimizer and the masters, in stage 3 and below.
_STAGE_3 = ("optimizer_state_dict", "fp32_flat_groups")
_BELOW = ("base_optimizer_state", "single_partition_of_fp32_groups")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def load(engine: Any, folder: Path, saved_by: int) -> None:
    """Restores weights, masters and moments from the files of `saved_by` ranks, ZeRO stage 1 to 3.

    Every rank must call it.
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
    """What each rank saved of its optimizer, mapped into memory."""
    paths = (
        next(folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
        for rank in range(saved_by)
    )
    return [read(path)["optimizer_state_dict"] for path in paths]


def read(path: Path | str, map_location: Any = "cpu") -> Any:
    """The content of a file of DeepSpeed's, mapped into memory; nothing in it is run."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location, weights_only=True, mmap=True)


def _state(
    files: list[dict[str, Any]], saved: list[int], held: list[list[int]], keys: tuple[str, str]
) -> dict[str, Any]:
    """What this rank would have saved; `saved` and `held` as in `cut`, `keys` as in a file."""
    optimizer, masters = keys

    def mine(groups_of_files: list[list[Tensor]]) -> list[Tensor]:
        return list(cut(groups_of_files, saved, held, dist.get_rank()))

    moments = {
        key: mine([[state[key] for state in file[optimizer]["state"].values()] for file in files])
        for key in _MOMENTS
    }
    first = files[0][optimizer]
    groups = range(len(held))
    # The number of the step, the same everywhere.
    others = {key: v for key, v in first["state"][0].items() if key not in _MOMENTS}
    state = {i: {**deepcopy(others), **{key: moments[key][i] for key in _MOMENTS}} for i in groups}
    settings = [{**first["param_groups"][0], "params": list(groups)}]
    return {
        **files[0],
        masters: mine([file[masters] for file in files]),
        optimizer: {"state": state, "param_groups": settings},
    }


def cut(
    ranks: list[list[Tensor]], saved: list[int], held: list[list[int]], rank: int
) -> Iterator[Tensor]:
    """The flat groups of the new rank `rank`.

    Args:
        ranks: the flat groups of each old rank.
        saved: how much of each parameter an old rank holds.
        held: how much of each parameter a new rank holds, by group.
        rank: the new rank.
    """
    parameters = zip(*(split(groups, saved) for groups in ranks), strict=True)
    for counts in held:
        yield torch.cat([part(next(parameters), rank * count, count) for count in counts])


def split(groups: list[Tensor], counts: list[int]) -> Iterator[Tensor]:
    """The parameters in flat groups, each of which ends where one of them ends."""
    following = iter(groups)
    rest = next(following)
    for count in counts:
        if not len(rest):
            rest = next(following)
        yield rest[:count]
        rest = rest[count:]


def part(pieces: tuple[Tensor, ...], start: int, count: int) -> Tensor:
    """Elements `start` to `start + count` of pieces laid end to end; zeros behind their end.

    All but the last piece are equally long.
    """
    size = len(pieces[0])
    result = pieces[0].new_zeros(count)
    for i in range(start // size, min(-(-(start + count) // size), len(pieces))):
        low, high = max(start, i * size), min(start + count, i * size + len(pieces[i]))
        result[low - start : high - start] = pieces[i][low - i * size : high - i * size]
    return result
