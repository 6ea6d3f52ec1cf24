"""Low-rank adaptation: a small trained product beside each of some frozen linears.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1:
h = W x + (alpha / rank) B A x, where B starts at zero, and so the model as it was. The EMA of a run
averages the factors, not their product, as is the custom.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cosmos_cli import files
from cosmos_cli.model import edm, weights
from cosmos_cli.model.spec import LORA_TARGETS

# What diffusers and peft put before the names of a LoRA, and where diffusers keeps its settings.
_PREFIX = "transformer."
_PREFIXES = re.compile(r"^(base_model\.model\.|transformer\.(?=transformer_blocks))+")
_SETTINGS = "lora_adapter_metadata"


class LoRALinear(nn.Module):
    """A frozen linear without bias under its own name, and the two factors of its change."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.scale = scale

    def product(self, x: Tensor) -> Tensor:
        """As of the linear alone."""
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """As of the linear with its weight changed by scale * B A."""
        change = self.lora_B(self.scale * self.lora_A(x))
        # Last, so that a checkpoint that computes its input again can end before it.
        return self.product(x) + change


def attach(module: nn.Module, blocks: nn.ModuleList, rank: int, scale: float, targets: str) -> None:
    """Freezes `module` and puts factors beside the linears of its `blocks` that `targets` names."""
    module.requires_grad_(False)
    for block in blocks:
        for name in LORA_TARGETS[targets]:
            parent, _, child = name.rpartition(".")
            linear = LoRALinear(block.get_submodule(name), rank, scale)
            setattr(block.get_submodule(parent), child, linear)


def attached(module: nn.Module) -> bool:
    """Whether a module trains factors instead of its weights."""
    return any(isinstance(child, LoRALinear) for child in module.modules())


def scale(module: nn.Module) -> float:
    """What the products of a module's factors are multiplied by."""
    return next(child.scale for child in module.modules() if isinstance(child, LoRALinear))


def fresh_factors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """First values of the factors among some parameters, fp32 on the CPU, the same on every rank.

    Uniform in +-1 / sqrt(inputs) for A, as in the authors' code and in peft; zero for B.
    """
    state = {}
    for name, shape in shapes.items():
        if name.endswith("lora_A.weight"):
            bound = 1 / math.sqrt(shape[1])
            draw = torch.rand(shape, generator=edm.keyed_generator((seed, name)))
            state[name] = (2 * draw - 1) * bound
        elif name.endswith("lora_B.weight"):
            state[name] = torch.zeros(shape)
    return state


def save(path: Path, state: Mapping[str, Tensor], scale: float) -> None:
    """Writes the factors of a LoRA as a file that diffusers reads, through peft."""
    renamed = weights.rename(state, weights.OURS, weights.DIFFUSERS, path)
    rank = next(len(factor) for name, factor in state.items() if name.endswith("lora_A.weight"))
    linears = {re.sub(r"^\w+\.\d+\.|\.lora_[AB]\.weight$", "", key) for key in renamed}
    settings = {"r": rank, "lora_alpha": scale * rank, "target_modules": sorted(linears)}
    settings = {_PREFIX + key: value for key, value in settings.items()}
    tensors = {_PREFIX + key: value for key, value in renamed.items()}
    weights.write_safetensors(path, tensors, {_SETTINGS: json.dumps(settings)})


def load(path: Path) -> tuple[dict[str, Tensor], float]:
    """The factors of a LoRA file of ours, of diffusers or of peft, and the scale of their product.

    Raises:
        UserError: the file is missing, damaged, of another model, or not of pairs of factors.
    """
    files.check_safetensors(path)
    with weights.reading(path):
        stored = load_file(path)
        with safe_open(path, framework="pt") as stream:
            settings = json.loads((stream.metadata() or {}).get(_SETTINGS, "{}"))
        # Files without settings mean a scale of 1, as diffusers takes them.
        plain = {key.removeprefix(_PREFIX): value for key, value in settings.items()}
        scale = plain["lora_alpha"] / plain["r"] if plain else 1.0
    names = {_PREFIXES.sub("", key): value for key, value in stored.items()}
    state = weights.rename(names, weights.DIFFUSERS, weights.OURS, path)
    for name in state:
        stem = re.sub(r"\.lora_[AB]\.weight$", "", name)
        a, b = (state.get(f"{stem}.lora_{side}.weight") for side in "AB")
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise weights.another_model([f"no pair of factors for {stem}"], path)
    return state, scale


@torch.no_grad()
def merge(state: Mapping[str, Tensor], path: Path, strength: float) -> dict[str, Tensor]:
    """The weights changed by `strength` times what a LoRA file says, each in its own dtype.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    factors, own = load(path)
    changes = {}
    for name, a in factors.items():
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            b = factors[f"{stem}.lora_B.weight"]
            changes[f"{stem}.weight"] = strength * own * (b.float() @ a.float())
    fitting = {name: state[name].shape for name in changes if name in state}
    weights.check_keys(fitting, changes, path)
    return {
        name: (tensor.float() + changes[name]).to(tensor.dtype) if name in changes else tensor
        for name, tensor in state.items()
    }
