"""Low-rank adaptation (LoRA): train two small factors for each chosen linear and freeze the rest.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1:
h = W x + (alpha / rank) B A x. B starts at zero, so training starts from the unchanged model. As is
usual, the EMA of a run averages the factors, not their product.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_cli.model import edm, lora_files
from cosmos_cli.model.finite import require_finite
from cosmos_cli.model.lora_files import Change
from cosmos_cli.model.tensor_names import another_model, some
from cosmos_cli.spec import LORA_TARGETS

# The columns added to a weight are padded to a multiple of this, so that its rows stay aligned.
ALIGNED_RANK = 16


class LoRALinear(nn.Module):
    """A frozen linear without bias and its two LoRA factors. The weight keeps its name."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.lora_A = nn.Linear(self.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False)
        self.scale = scale

    def product(self, x: Tensor) -> Tensor:
        """Return the output of the frozen linear alone. fp8 replaces this method."""
        return F.linear(x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + scale * B A x."""
        change = self.lora_B(self.scale * self.lora_A(x))
        # Compute the frozen product last: when this block is recomputed, autograd stops at the last
        # saved tensor and skips it.
        return self.product(x) + change


def attach(module: nn.Module, blocks: nn.ModuleList, rank: int, scale: float, targets: str) -> None:
    """Freeze `module` and add LoRA factors to the linears of `blocks` that `targets` selects."""
    module.requires_grad_(False)
    for block in blocks:
        for name in LORA_TARGETS[targets]:
            parent, _, child = name.rpartition(".")
            linear = LoRALinear(block.get_submodule(name), rank, scale)
            setattr(block.get_submodule(parent), child, linear)


def attached(module: nn.Module) -> bool:
    """True if a module trains LoRA factors instead of its weights."""
    return any(isinstance(child, LoRALinear) for child in module.modules())


def scale(module: nn.Module) -> float:
    """Return the LoRA scale of a module, alpha / rank."""
    return next(child.scale for child in module.modules() if isinstance(child, LoRALinear))


def fresh_factors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Initialise the LoRA factors among these parameters, fp32 on the CPU, equal on every rank.

    A is uniform in +-1 / sqrt(inputs), as in the authors' code and in peft; B is zero.
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


def factors(changes: Mapping[str, Change]) -> dict[str, Tensor]:
    """Return the factors of a run's LoRA under the names of its parameters."""
    state = {}
    for name, change in changes.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = change.a, change.b
    return state


# --- without merging, for sampling ----------------------------------------------------------------


class Widen(nn.Module):
    """Appends A x to each token x, the input of `AdaptedLinear`."""

    def __init__(self, a: Tensor) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(a, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [x; A x], of inputs + rank channels."""
        return torch.cat((x, F.linear(x, self.lora_A)), dim=-1)


class AdaptedLinear(nn.Module):
    """Computes a frozen linear with LoRAs, W x + B (A x), as one product [W B] [x; A x].

    The product sums both terms in its fp32 accumulators and rounds once. Two bf16 products and a
    bf16 sum lose a change below half a rounding step of the output, and a merged weight loses one
    too: at |dW| / |W| = 8e-4 both keep 45 % of the change, this keeps all of it.
    """

    def __init__(self, weight: Tensor, b: Tensor, widen: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat((weight, b), dim=1), requires_grad=False)
        self.widen = widen

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the changed linear."""
        return F.linear(self.widen(x), self.weight)


def apply_files(net: nn.Module, files: Iterable[tuple[Path, float]]) -> list[tuple[str, list[str]]]:
    """Apply LoRA files to a denoiser without merging them, each with its strength.

    Return for each file a line that describes it, and warnings about it.

    Raises:
        UserError: a file is missing, damaged, or of another model.
    """
    read, notes = [], []
    for path, strength in files:
        changes = lora_files.load_lora(path)
        linears = {f"net.{n}": m for n, m in net.named_modules() if isinstance(m, nn.Linear)}
        check_fit(changes, {name: linear.weight.shape for name, linear in linears.items()}, path)
        scaled = {
            name: Change(change.a, change.b * (change.scale * strength), 1.0, change.key)
            for name, change in changes.items()
        }
        of_keys = {change.key: change.b for change in scaled.values()}
        fix = "lower its strength, as in `--lora FILE:0.8`"
        require_finite(of_keys, path, fix=fix)
        ranks = sorted({len(change.a) for change in changes.values()})
        scales = sorted({round(change.scale, 6) for change in changes.values()})
        about = (
            f"LoRA {path}: {len(changes)} linears, rank {_range(ranks)}, scale {_range(scales)}, "
            f"strength {strength:g}"
        )
        remarks = []
        if unread := lora_files.unread_settings(path):
            remarks.append(unread)
        if not any(change.b.any() and change.a.any() for change in changes.values()):
            remarks.append(f"{path}: changes nothing, because all of its factors A or B are zero")
        notes.append((about, remarks))
        # With strength 0 the network is not touched, so that its output stays bit-identical.
        read += [scaled] if strength else []
    if read:
        apply_unmerged(net, read)
    return notes


@torch.no_grad()
def apply_unmerged(net: nn.Module, loras: Sequence[Mapping[str, Change]]) -> None:
    """Replace the linears that LoRAs change by `AdaptedLinear`. Names begin with net.blocks."""
    changed = {name.removeprefix("net.") for changes in loras for name in changes}
    qkv = re.compile(r"(.*\.self_attn)\.[qkv]")
    for attention in sorted({match[1] for name in changed if (match := qkv.fullmatch(name))}):
        # q, k and v read the same tokens, so A x is appended once for all three.
        names = [f"{attention}.{child}" for child in "qkv"]
        net.get_submodule(attention).widen = _adapt(net, names, loras, nn.Identity())
        changed -= set(names)
    for name in changed:
        _adapt(net, [name], loras, None)


def _adapt(
    net: nn.Module,
    names: Sequence[str],
    loras: Sequence[Mapping[str, Change]],
    widen: nn.Module | None,
) -> Widen:
    """Replace linears that read the same input, and return the module that appends their A x.

    Each new linear calls `widen` on its input, by default the returned module.
    """
    found = {n: [c for changes in loras if (c := changes.get(f"net.{n}"))] for n in names}
    weight = net.get_submodule(names[0]).weight
    rank = sum(len(change.a) for changes in found.values() for change in changes)
    rank += -rank % ALIGNED_RANK
    a, column = weight.new_zeros(rank, weight.shape[1]), 0
    appends = Widen(a)
    for name, changes in found.items():
        linear = net.get_submodule(name)
        b = weight.new_zeros(len(linear.weight), rank)
        for change in changes:
            columns = slice(column, column + len(change.a))
            a[columns] = change.a.to(weight)
            b[:, columns] = (change.scale * change.b).to(weight)
            column += len(change.a)
        parent, _, child = name.rpartition(".")
        adapted = AdaptedLinear(linear.weight, b, widen or appends)
        setattr(net.get_submodule(parent), child, adapted)
    return appends


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


# --- merged into the weights, for promote ---------------------------------------------------------


def check_fit(
    changes: Mapping[str, Change], shapes: Mapping[str, tuple[int, ...]], where: Path
) -> None:
    """Refuse a LoRA whose linears are not in the model or have other sizes.

    The changes and the shapes of the weights are given by our names of the linears.

    Raises:
        UserError: (ASSET) a linear does not fit; the error names file and key.
    """
    unknown = [change.key for name, change in changes.items() if name not in shapes]
    other = [
        f"{change.key} changes a weight of {(len(change.b), change.a.shape[1])} instead of "
        f"{tuple(shapes[name])}"
        for name, change in changes.items()
        if name in shapes and (len(change.b), change.a.shape[1]) != tuple(shapes[name])
    ]
    found = {"unknown": unknown, "of another shape": other}
    if problems := [some(names, kind) for kind, names in found.items() if names]:
        raise another_model(problems, where)


@torch.no_grad()
def merge(state: Mapping[str, Tensor], path: Path, strength: float) -> dict[str, Tensor]:
    """Return the weights plus `strength` times the change of a LoRA file, each in its own dtype.

    Raises:
        UserError: the file is missing, damaged, or of another model.
    """
    changes = lora_files.load_lora(path)
    stems = {name.removesuffix(".weight"): tensor.shape for name, tensor in state.items()}
    check_fit(changes, stems, path)
    merged = dict(state)
    for name, change in changes.items():
        tensor = state[f"{name}.weight"]
        wide = tensor.float() + strength * change.scale * (change.b @ change.a)
        merged[f"{name}.weight"] = wide.to(tensor.dtype)
    return merged


@torch.no_grad()
def kept_share(before: Mapping[str, Tensor], after: Mapping[str, Tensor], path: Path) -> float:
    """Return the share of a LoRA's change that merged weights contain, 1 for all of it.

    The difference of the weights is projected onto the change. Rounding to bf16 drops most parts
    of the change that are below half a rounding step of their weight.
    """
    found = wanted = 0.0
    for name, change in lora_files.load_lora(path).items():
        delta = change.scale * (change.b @ change.a)
        difference = after[f"{name}.weight"].float() - before[f"{name}.weight"].float()
        found += (difference * delta).sum().item()
        wanted += delta.square().sum().item()
    return found / wanted if wanted else 1.0
