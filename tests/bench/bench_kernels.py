"""Measures faster kernels beside plain PyTorch: `python tests/bench/bench_kernels.py --out FILE`.

adam       torch's fused AdamW, Apex' and DeepSpeed's FusedAdam: 30 steps on the same parameters and
           gradients; how far they end from torch's, and the time of a step.
norm, attention, linear
           Transformer Engine's RMSNorm, fused attention and linears, in bf16 and fp8, beside what
           the denoiser runs: time forward, forward and backward, and error against fp32.

Weights are random. Every kernel gets a row; one that cannot run has the reason in it. FILE gets a
JSON object a line, stdout a table. `--model tiny` runs on a CPU, to try the script itself: there
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_generate import Bench, markdown, synchronize
from torch import Tensor

from cosmos_cli import recipe
from cosmos_cli.model import dit, kernels
from cosmos_cli.model.device import best_device
from cosmos_cli.model.train import optimizer_settings

Row = dict[str, Any]
# What a package does that is missing, was built for something else, or refuses this machine.
ABSENCE = (ImportError, OSError, RuntimeError, AssertionError, ValueError, NotImplementedError)
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


# --- optimizers -----------------------------------------------------------------------------------


def bench_adam(bench: Bench) -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.device(bench.device):
        start = [weight.detach() for weight in dit.Block(bench.spec.dit).parameters()]
    shape = f"a block, {sum(weight.numel() for weight in start) / 1e6:.1f} M fp32"
    first: list[Tensor] = []
    for name, (module, kind, options) in ADAMS.items():
        row: Row = {"part": "adam", "kernel": name, "shape": shape}
        weights = [weight.clone().requires_grad_() for weight in start]
        try:
            make = getattr(importlib.import_module(module), kind)
            optimizer = make(weights, lr=LEARNING_RATE, **optimizer_settings(bench.r), **options)
            seconds = train(weights, optimizer, bench.device)
        except ABSENCE as error:
            yield row | {"absent": repr(error)[:150]}
            continue
        first = first or weights
        apart, moved = furthest(weights, first), furthest(weights, start)
        row |= {"ms": 1e3 * seconds, "max_difference": apart, "max_moved": moved}
        yield row | {"agrees": apart <= MOST_APART < moved}


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
            row: Row = {"part": self.part, "kernel": name, "shape": self.shape}
            try:
                yield row | self.run(make(), exact, bench)
            except ABSENCE as error:
                yield row | {"absent": repr(error)[:150]}

    def run(self, function: Callable[..., Tensor], exact: Tensor, bench: Bench) -> Row:
        with torch.no_grad():
            seconds = timed(lambda: function(*self.inputs), bench)
            found = function(*self.inputs)[:, :EXACT_ROWS].flatten(2)
        leaves = [tensor.clone().requires_grad_() for tensor in self.inputs]
        gradient = torch.ones_like(function(*leaves))
        both = timed(lambda: function(*leaves).backward(gradient), bench)
        error = ((found.float() - exact).norm() / exact.norm()).item()
        row = {"ms": 1e3 * seconds, "tflops": self.flops / seconds / 1e12, "relative_l2": error}
        return {**row, "ms_with_backward": 1e3 * both}


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
        yield Layer(*about, kernels.rms_norm, (x, weight), {"TE bf16": te})


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


def measured(layers: Callable[[Bench], Iterator[Layer]], bench: Bench) -> Iterator[Row]:
    for layer in layers(bench):
        yield from layer.measure(bench)


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "adam": bench_adam, "norm": partial(measured, norms),
    "attention": partial(measured, attentions), "linear": partial(measured, linears),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["7b", "tiny"], default="7b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    shipped, size = {"7b": ("nemo_assets", ["height=704"]), "tiny": ("tiny", [])}[options.model]
    r, device = recipe.load(shipped, size).recipe, best_device()
    # Else DeepSpeed guesses.
    os.environ.setdefault("DS_ACCELERATOR", device)
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
