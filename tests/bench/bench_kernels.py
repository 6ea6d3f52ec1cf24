"""Measures faster kernels beside plain PyTorch: `python tests/bench/bench_kernels.py --out FILE`.

norm, attention, linear
           Transformer Engine's RMSNorm, fused attention and linears, in bf16 and fp8, beside what
           the denoiser runs: time forward, forward and backward, and error against fp32.
block      The same inside a block of the denoiser, with the weights of the plain one under its
           names: time and memory at full size, errors of the output and of all gradients at 25
           frames of 352x640, against fp32 and against plain bf16. The last one is compiled.
adam       torch's fused AdamW, Apex' and DeepSpeed's FusedAdam: 30 steps on the same parameters and
           gradients; how far they end from torch's, and the time of a step.

Weights are random. Every kernel gets a row; one that cannot run has the reason in it. FILE gets a
JSON object a line, as soon as it is known, stdout a table. A part is for a process of its own: what
breaks CUDA breaks all that follows. `--model tiny` runs on a CPU, to try the script itself: there
Transformer Engine and Apex are absent, and DeepSpeed compiles a kernel for two minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_generate import SMALL, Bench, markdown, random_denoiser, synchronize
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from cosmos_cli.gpus import best_device
from cosmos_cli.model import dit, fp8, kernels
from cosmos_cli.recipe import loading
from cosmos_cli.train.engine import optimizer_settings

Row = dict[str, Any]
# What a package does that is missing, was built for something else, or refuses this machine.
ABSENCE = (
    ImportError, OSError, RuntimeError, AssertionError, ValueError, TypeError, AttributeError,
    LookupError,
)  # fmt: skip
STEPS, LEARNING_RATE, MOST_APART = 30, 1e-3, 1e-5
# Module, class and options; those after the first are held against it.
ADAMS = {
    "torch AdamW": ("torch.optim", "AdamW", {"fused": True}),
    "Apex FusedAdam": ("apex.optimizers", "FusedAdam", {"adam_w_mode": True}),
    "DeepSpeed FusedAdam": ("deepspeed.ops.adam", "FusedAdam", {"adam_w_mode": True}),
}
# Rows of an output that are computed again in fp32.
EXACT_ROWS = 512
# A measurement repeats what is shorter, so that the call itself does not count.
LEAST_SECONDS = 0.05


def normal(bench: Bench, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(bench.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=bench.device).to(bench.dtype)


def attempted(row: Row, measure: Callable[[], Row]) -> Row:
    try:
        return row | measure()
    except ABSENCE as error:
        return row | {"absent": f"{type(error).__name__}: {error}"[:300]}


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative to the length of `theirs`."""
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


# --- optimizers -----------------------------------------------------------------------------------


def bench_adam(bench: Bench) -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.device(bench.device):
        start = [weight.detach() for weight in dit.Block(bench.spec.dit).parameters()]
    shape = f"a block, {sum(weight.numel() for weight in start) / 1e6:.1f} M fp32"
    first: list[Tensor] = []

    def measure(module: str, kind: str, options: dict[str, Any]) -> Row:
        weights = [weight.clone().requires_grad_() for weight in start]
        make = getattr(importlib.import_module(module), kind)
        optimizer = make(weights, lr=LEARNING_RATE, **optimizer_settings(bench.r), **options)
        seconds = train(weights, optimizer, bench.device)
        first.extend(weights[len(first) :])
        off, moved = furthest(weights, first), furthest(weights, start)
        relative = max(apart(a.detach(), b.detach()) for a, b in zip(weights, first, strict=True))
        found = {"ms": 1e3 * seconds, "max_difference": off, "relative_l2": relative}
        return {**found, "max_moved": moved, "agrees": off <= MOST_APART < moved}

    for name, about in ADAMS.items():
        row = {"part": "adam", "kernel": name, "shape": shape}
        yield attempted(row, partial(measure, *about))


def train(weights: list[Tensor], optimizer: torch.optim.Optimizer, device: str) -> float:
    """Median seconds of a step."""
    generator, times = torch.Generator(device).manual_seed(1), []
    for _ in range(STEPS):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, device=device) * 1e-3
        synchronize(device)
        began = time.perf_counter()
        optimizer.step()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max((a - b).detach().abs().max().item() for a, b in pairs)


# --- layers of the denoiser -----------------------------------------------------------------------


@dataclass
class Layer:
    """What the denoiser runs at one shape; what `others` make, or fail to, may take its place."""

    part: str
    shape: str
    flops: float
    name: str
    plain: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    others: dict[str, Callable[[], Callable[..., Tensor]]]

    def measure(self, bench: Bench) -> Iterator[Row]:
        x, *rest = (tensor.float() for tensor in self.inputs)
        exact = self.plain(x[:, :EXACT_ROWS], *rest).flatten(2)
        for name, make in {self.name: lambda: self.plain, **self.others}.items():
            row = {"part": self.part, "kernel": name, "shape": self.shape}
            yield attempted(row, lambda make=make: self.run(make(), exact, bench))

    def run(self, function: Callable[..., Tensor], exact: Tensor, bench: Bench) -> Row:
        with torch.no_grad():
            seconds = timed(lambda: function(*self.inputs), bench)
            found = function(*self.inputs)[:, :EXACT_ROWS].flatten(2)
        leaves = [tensor.clone().requires_grad_() for tensor in self.inputs]
        gradient = torch.ones_like(function(*leaves))
        both = timed(lambda: function(*leaves).backward(gradient), bench)
        row = {"ms": 1e3 * seconds, "ms_with_backward": 1e3 * both}
        tflops = self.flops / seconds / 1e12
        return {**row, "tflops": tflops, "relative_l2": apart(found, exact)}


def timed(call: Callable[[], object], bench: Bench) -> float:
    """Median seconds of a call, after one that warms up and one that says how many are a round."""
    call()
    repeats, times = 1, []
    for _ in range(bench.rounds + 1):
        synchronize(bench.device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(bench.device)
        times.append((time.perf_counter() - began) / repeats)
        if len(times) == 1:
            repeats = 1 + int(LEAST_SECONDS / times[0])
    return statistics.median(times[1:])


def engine(
    kind: str, *sizes: int, weight: Tensor | None = None, scaling: str = "", **options: Any
) -> Callable[..., Tensor]:
    """A module of Transformer Engine, with a recipe for the scales in fp8.

    Where fp8 attention is not to be had it computes in bf16 without a word: see its error.
    """
    from transformer_engine import pytorch as te
    from transformer_engine.common import recipe as fp8

    module = getattr(te, kind)(*sizes, **options)
    settings = getattr(fp8, scaling or "DelayedScaling")(fp8_dpa=weight is None)
    if weight is not None:
        module.weight.data.copy_(weight)

    def run(*inputs: Tensor) -> Tensor:
        # It has the weight, the last input, for itself.
        with te.autocast(enabled=bool(scaling), recipe=settings):
            return module(*inputs if weight is None else inputs[:1])

    return run


def norms(bench: Bench) -> Iterator[Layer]:
    d, tokens = bench.spec.dit, bench.spec.tokens(*bench.size)
    for shape in ((tokens, d.heads, d.head_width), (tokens, d.width)):
        x, weight = normal(bench, 1, *shape), normal(bench, shape[-1], seed=1)
        te = partial(engine, "RMSNorm", shape[-1], weight=weight, eps=1e-6, dtype=weight.dtype)
        about = "norm", "x".join(map(str, shape)), 4.0 * x.numel(), "plain"
        others = {"plain, compiled": lambda: torch.compile(kernels.rms_norm), "TE bf16": te}
        yield Layer(*about, kernels.rms_norm, (x, weight), others)


def attentions(bench: Bench) -> Iterator[Layer]:
    d, tokens = bench.spec.dit, bench.spec.tokens(*bench.size)
    te = partial(engine, "DotProductAttention", d.heads, d.head_width, qkv_format="bshd",
                 attn_mask_type="no_mask")  # fmt: skip
    others = {"TE bf16": te, "TE fp8": partial(te, scaling="DelayedScaling")}
    for keys in (tokens, bench.spec.text.tokens):
        sizes = enumerate((tokens, keys, keys))
        qkv = tuple(normal(bench, 1, n, d.heads, d.head_width, seed=i) for i, n in sizes)
        label, flops = f"{tokens} queries, {keys} keys", 4.0 * tokens * keys * d.width
        name = f"plain, {kernels.attention_backend(*qkv)}"
        yield Layer("attention", label, flops, name, kernels.attention, qkv, others)


def linears(bench: Bench) -> Iterator[Layer]:
    width, inner = bench.spec.dit.width, bench.spec.dit.mlp_ratio * bench.spec.dit.width
    for sizes in ((width, width), (width, inner), (inner, width)):
        x = normal(bench, 1, bench.spec.tokens(*bench.size), sizes[0])
        weight = normal(bench, sizes[1], sizes[0], seed=1) * sizes[0] ** -0.5
        te = partial(engine, "Linear", *sizes, weight=weight, bias=False, params_dtype=x.dtype)
        others = {"TE bf16": te, "TE fp8, delayed": partial(te, scaling="DelayedScaling"),
                  "TE fp8, current": partial(te, scaling="Float8CurrentScaling")}  # fmt: skip
        about = "linear", f"{sizes[0]} to {sizes[1]}", 2.0 * x.numel() * sizes[1], "plain"
        yield Layer(*about, F.linear, (x, weight), others)


# --- a block of the denoiser ----------------------------------------------------------------------


def use_fp8(block: dit.Block) -> None:
    # It leaves the first and the last as they are.
    fp8.use_fp8(nn.ModuleList([nn.Identity(), block, nn.Identity()]))


def use_engine_attention(block: dit.Block) -> None:
    fp8.use_engine_attention(nn.ModuleList([block]))


def use_both(block: dit.Block) -> None:
    use_fp8(block)
    use_engine_attention(block)


CHANGES: dict[str, Callable[[dit.Block], None]] = {
    "plain": lambda block: None, "TE norms and attention": use_engine_attention,
    "TE fp8 linears": use_fp8, "TE all": use_both, "plain, compiled": lambda block: block.compile(),
}  # fmt: skip


def block_inputs(bench: Bench, size: tuple[int, int, int]) -> tuple[Any, ...]:
    d, text, tokens = bench.spec.dit, bench.spec.text, bench.spec.tokens(*size)
    latent = torch.empty(1, *bench.spec.latent_shape(*size), device="meta")
    fps = torch.full((1,), bench.spec.fps, device=bench.device)
    rope = dit.rope_table(d, dit.patch_grid(d, latent), fps)
    x, pos = normal(bench, 1, tokens, d.width), normal(bench, tokens, d.width, seed=1)
    noise_level = normal(bench, 1, d.width, seed=2), normal(bench, 1, 3 * d.width, seed=3)
    return x, pos, rope, noise_level, normal(bench, 1, text.tokens, text.channels, seed=4)


def there_and_back(block: dit.Block, inputs: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """What a block gives, and its gradients by name; their direction is the input."""
    x = inputs[0].clone().requires_grad_()
    block.zero_grad()
    given = block(x, *inputs[1:])
    given.backward(inputs[0])
    leaves = {"": x, **dict(block.named_parameters())}
    return given.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def outcome(block: dit.Block, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """What a block gives, and its gradients in one vector."""
    given, gradients = there_and_back(block, inputs)
    return given, torch.cat([gradients[name].float().flatten() for name in sorted(gradients)])


def bench_block(bench: Bench) -> Iterator[Row]:
    small, size = SMALL[bench.spec.name], bench.size
    inputs, large = block_inputs(bench, small), block_inputs(bench, size)
    one = replace(bench.spec.dit, blocks=1)
    plain = random_denoiser(one, bench.device, bench.dtype).blocks[0]
    state = plain.state_dict()
    with torch.device(bench.device):
        exact_block = dit.Block(one)
    exact_block.load_state_dict(state)
    in_fp32 = tree_map_only(Tensor, Tensor.float, inputs)
    exact, simple = outcome(exact_block, in_fp32), outcome(plain, inputs)

    def measure(name: str, change: Callable[[dit.Block], None]) -> Row:
        with torch.device(bench.device):
            block = dit.Block(one).to(bench.dtype)
        change(block)
        # Importing Transformer Engine takes it away.
        kernels.put_cudnn_first()
        row: Row = {"same_keys": list(block.state_dict()) == list(state)}
        block.load_state_dict(state)
        # What is compiled is so for one size.
        if "compiled" not in name:
            found = outcome(block, inputs)
            for i, what in enumerate(("output", "gradient")):
                row[f"{what}_l2"] = apart(found[i], exact[i])
                row[f"{what}_from_plain"] = apart(found[i], simple[i])
        if bench.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            row["ms"] = 1e3 * timed(lambda: block(*large), bench)
        row["ms_with_backward"] = 1e3 * timed(lambda: there_and_back(block, large), bench)
        peak = 0.0 if bench.device == "cpu" else torch.cuda.max_memory_allocated() / 1e9
        return row | {"peak_gb": peak}

    for name, change in CHANGES.items():
        row = {"part": "block", "kernel": name, "shape": f"{bench.spec.tokens(*size)} tokens"}
        yield attempted(row, partial(measure, name, change))


def measured(layers: Callable[[Bench], Iterator[Layer]], bench: Bench) -> Iterator[Row]:
    for layer in layers(bench):
        yield from layer.measure(bench)


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "norm": partial(measured, norms), "attention": partial(measured, attentions),
    "linear": partial(measured, linears), "block": bench_block, "adam": bench_adam,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    shipped, size = {"7b": ("nemo_assets", ["height=704"]), "tiny": ("tiny", [])}[options.model]
    r, device = loading.load(shipped, size).recipe, best_device()
    # Else DeepSpeed guesses.
    os.environ.setdefault("DS_ACCELERATOR", device)
    kernels.put_cudnn_first()
    bench = Bench(r, device, torch.bfloat16, Path(), options.rounds)
    name = platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    about = {"device": name, "model": r.model, "torch": torch.__version__}
    rows: list[Row] = []
    with options.out.open("w") as stream:
        for part in options.parts:
            for row in PARTS[part](bench):
                rows.append(row)
                print(json.dumps({**about, **row}), file=stream, flush=True)
    print(f"{json.dumps(about)}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
