"""Rename tensors between our names, the released ones and those of diffusers, and check them.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, state dicts of `diffusion/networks/general_dit.py`
and `tokenizer/networks`; diffusers 0.42 `CosmosTransformer3DModel` and `AutoencoderKLCosmos`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_cli.errors import UserError, asset_error
from cosmos_cli.spec import MODELS

State = dict[str, Tensor]

# One parameter per row: our name, the released name, the diffusers name. The suffix ".weight" is
# left out. Only the position tables and the constants of the log-variance head lack it.
_NET = """
x_embedder            x_embedder.proj.1                    patch_embed.proj
pos_embedder.t        extra_pos_embedder.pos_emb_t         learnable_pos_embed.pos_emb_t
pos_embedder.h        extra_pos_embedder.pos_emb_h         learnable_pos_embed.pos_emb_h
pos_embedder.w        extra_pos_embedder.pos_emb_w         learnable_pos_embed.pos_emb_w
t_embedder.linear_1   t_embedder.1.linear_1                time_embed.t_embedder.linear_1
t_embedder.linear_2   t_embedder.1.linear_2                time_embed.t_embedder.linear_2
t_norm                affline_norm                         time_embed.norm
final.adaln.down      final_layer.adaLN_modulation.1       norm_out.linear_1
final.adaln.up        final_layer.adaLN_modulation.2       norm_out.linear_2
final.linear          final_layer.linear                   proj_out
"""
_BLOCK = """
self_attn_adaln.down  blocks.0.adaLN_modulation.1          norm1.linear_1
self_attn_adaln.up    blocks.0.adaLN_modulation.2          norm1.linear_2
self_attn.q           blocks.0.block.attn.to_q.0           attn1.to_q
self_attn.q_norm      blocks.0.block.attn.to_q.1           attn1.norm_q
self_attn.k           blocks.0.block.attn.to_k.0           attn1.to_k
self_attn.k_norm      blocks.0.block.attn.to_k.1           attn1.norm_k
self_attn.v           blocks.0.block.attn.to_v.0           attn1.to_v
self_attn.out         blocks.0.block.attn.to_out.0         attn1.to_out.0
cross_attn_adaln.down blocks.1.adaLN_modulation.1          norm2.linear_1
cross_attn_adaln.up   blocks.1.adaLN_modulation.2          norm2.linear_2
cross_attn.q          blocks.1.block.attn.to_q.0           attn2.to_q
cross_attn.q_norm     blocks.1.block.attn.to_q.1           attn2.norm_q
cross_attn.k          blocks.1.block.attn.to_k.0           attn2.to_k
cross_attn.k_norm     blocks.1.block.attn.to_k.1           attn2.norm_k
cross_attn.v          blocks.1.block.attn.to_v.0           attn2.to_v
cross_attn.out        blocks.1.block.attn.to_out.0         attn2.to_out.0
mlp_adaln.down        blocks.2.adaLN_modulation.1          norm3.linear_1
mlp_adaln.up          blocks.2.adaLN_modulation.2          norm3.linear_2
mlp.up                blocks.2.block.layer1                ff.net.0.proj
mlp.down              blocks.2.block.layer2                ff.net.2
"""
_LOGVAR = """
logvar.freqs          logvar.0.freqs                       -
logvar.phases         logvar.0.phases                      -
logvar                logvar.1                             -
"""
# The columns of the tables.
OURS, RELEASED, DIFFUSERS = range(3)
COLUMNS = (OURS, RELEASED, DIFFUSERS)


def name_table(source: int, target: int) -> dict[str, str]:
    """Map the names of one column to those of another; "#" stands for the number of the block."""
    prefixes = {
        _NET: ("net.", "net.", ""),
        _BLOCK: ("net.blocks.#.", "net.blocks.block#.", "transformer_blocks.#."),
        _LOGVAR: ("", "", ""),
    }
    return {
        prefix[source] + row[source]: prefix[target] + row[target]
        for table, prefix in prefixes.items()
        for row in map(str.split, table.strip().splitlines())
    }


# The parts of a name that torch's wrappers insert: compile, DistributedDataParallel, FSDP.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# The attributes of a trainer that hold the network, as prefixes.
_HOLDERS = re.compile(r"^(?:(?:model|diffusion_model|transformer|dit|ema|net)\.)+")


def plain(key: str) -> str:
    """Return the name of a tensor without the prefixes of wrappers and trainers."""
    # NVIDIA's EMA has hyphens where the network has dots.
    dotted = key if "." in key else key.replace("-", ".")
    return _HOLDERS.sub("", _WRAPPERS.sub("", dotted))


def _in_table(key: str) -> tuple[str, str, str]:
    """Return the row of a tensor with "#" for its block, the number of the block, the suffix."""
    name = plain(key)
    stem = re.sub(r"(\.lora_[AB])?\.weight$", "", name)
    block = re.search(r"blocks\.(?:block)?(\d+)", stem)
    general = f"{stem[: block.start(1)]}#{stem[block.end(1) :]}" if block else stem
    return general, block[1] if block else "", name[len(stem) :]


@cache
def _known(target: int) -> dict[str, str]:
    """Map the names of all columns, without prefixes, to those of one."""
    tables = [name_table(column, target) for column in COLUMNS]
    return {plain(theirs): ours for table in tables for theirs, ours in table.items()}


def is_denoiser(state: Mapping[Any, Any]) -> bool:
    """True if a dict has a tensor of a denoiser, under any name."""
    return any(isinstance(key, str) and _in_table(key)[0] in _known(OURS) for key in state)


def rename(state: Mapping[str, Tensor], target: int, where: Path) -> State:
    """Rename the tensors of a denoiser, or of a LoRA for it, to the names of one column.

    Raises:
        UserError: a name is not in the tables, or two names stand for one tensor.
    """
    known = _known(target)
    renamed: State = {}
    found: dict[str, str] = {}
    unknown = []
    for key, value in state.items():
        general, number, suffix = _in_table(key)
        if general not in known:
            unknown.append(key)
            continue
        name = known[general].replace("#", number) + suffix
        if name in renamed:
            raise another_model([f"{found[name]} and {key} are the same tensor"], where, _CLEAN)
        renamed[name], found[name] = value, key
    if unknown:
        raise another_model([some(unknown, "unknown")], where, _CLEAN if renamed else _OTHER)
    return renamed


def name_in_file(path: Path) -> Callable[[str], str]:
    """Return a function from our name of a tensor to its name in a denoiser's file or folder."""
    column = DIFFUSERS if path.is_dir() else OURS if path.suffix == ".safetensors" else RELEASED
    return lambda name: next(iter(rename({name: torch.empty(0)}, column, path)))


# Substitutions, applied in this order, that turn diffusers names into released ones.
_TOKENIZER = (
    (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d+)\.\w+samplers\.0\.(conv\d)", r"\1.\2.\1sample.\3.conv3d"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1.0"),
    (r"mid_block\.temp_attentions\.0", "mid.attn_1.1"),
    (r"\.to_([qkv])\.", r".\1.conv3d."),
    (r"\.to_out\.0\.", ".proj_out.conv3d."),
    (r"\.conv_shortcut\.", ".nin_shortcut.conv3d."),
    (r"\.conv_s\.", ".0.conv3d."),
    (r"\.conv_t\.", ".1.conv3d."),
    (r"quant_conv\.", "quant_conv.conv3d."),
)


def rename_tokenizer(state: State) -> State:
    """Rename diffusers keys to released ones; diffusers counts decoder levels in reverse."""
    levels = {int(n) for key in state for n in re.findall(r"up_blocks\.(\d+)", key)}
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{max(levels) - int(m[1])}", key)
        for pattern, replacement in _TOKENIZER:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def check_keys(
    shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], where: Path
) -> None:
    """Refuse a state dict that does not have exactly these names and shapes.

    Raises:
        UserError: names are missing or unexpected, or tensors of another shape.
    """
    missing = [name for name in shapes if name not in state]
    unknown = [name for name in state if name not in shapes]
    other = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    found = {"missing": missing, "unknown": unknown, "of another shape": other}
    problems = [some(names, kind) for kind, names in found.items() if names]
    if problems:
        if other and (name := _known_model(state)):
            fix = f"use a recipe whose model is {name}"
            raise another_model([f"it has the shapes of {name}"], where, fix)
        fits = len(shapes) > len(missing) and not other
        raise another_model(problems, where, (_WHOLE if missing else _CLEAN) if fits else _OTHER)


def _known_model(state: Mapping[str, Tensor]) -> str:
    """Return the name of the model whose denoiser has the sizes of `state`, or ""."""
    width = len(state.get("net.t_norm.weight", ()))
    blocks = len({name.split(".")[2] for name in state if name.startswith("net.blocks.")})
    inputs = state["net.x_embedder.weight"].shape[-1] if "net.x_embedder.weight" in state else 0
    sizes = (width, blocks, inputs)
    specs = ((model.name, model.dit) for model in MODELS.values())
    found = (name for name, dit in specs if (dit.width, dit.blocks, dit.patch_inputs) == sizes)
    return next(found, "")


_OTHER = "check that the file belongs to this model"
_CLEAN = "save the file again with the tensors of this model only"
_WHOLE = "the file is incomplete: save all of the model, or name the folder with all its parts"


def another_model(problems: list[str], where: Path, fix: str = _OTHER) -> UserError:
    """Return the error for a file that does not fit the model; it lists the problems."""
    return asset_error(where, f"does not fit the model: {'; '.join(problems)}", fix)


def some(names: list[str], kind: str) -> str:
    """Return the number of names and the first three of them, as text."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{more})"
