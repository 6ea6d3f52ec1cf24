"""Measures generation on one GPU: `python tests/bench/bench_generate.py --scratch DIR --out FILE`.

forward  one pass of the denoiser at 121 frames of 704x1280, ours and diffusers', each plain and
         compiled, with the same random weights in one process: interleaved, medians; and the error
         of the number format against fp32 at a smaller size.
sample   a whole video as `generate` makes it: text encoder, all steps after two that compile the
         blocks, decoder, mp4; time and peak memory of each phase.
lora     one pass with compiled blocks, plain and with a LoRA of rank 16 and 64 on every linear;
         and how much of a LoRA's change is in the output of the number format, against fp32.
fp8      one pass in bf16, with fp8 linears, and with fp8 self-attention too, blocks compiled; the
         error of each against fp32; and the error of fp8 attention alone, on three kinds of input
         and on those of the tiny model.
fast     a video by `speed: fast` in fp8, blocks compiled; and its decoding.
split    the same steps by one process and by all together, then a whole video by `speed: fast`;
         started by
         `torchrun --standalone --nproc-per-node 2 tests/bench/bench_generate.py --parts split`.
command  the whole command `generate` from files of full size, line by line of what it says, next to
         dd of the same files: the first run fills the caches, the second has other words.
given    some steps of a video from text, and from 1 and 9 frames with a Video2World network on
         the same weights, blocks compiled, interleaved in one process.
load     host memory while a model file of full size is loaded to the GPU.

With `--model tiny` the same runs on a CPU in a minute, to try the script itself.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
import diffusers
import diffusers.models.transformers.transformer_cosmos as peer
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import SHIPPED, T5_11B, Row, peak_gib, synchronize
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from cosmos_cli import files, paths
from cosmos_cli.generate import memory, text_models, video_models, worker
from cosmos_cli.gpus import best_device
from cosmos_cli.model import (
    cond_frames,
    edm,
    fp8_sampling,
    kernels,
    lora,
    mp4,
    rgb,
    streaming,
    text,
    video,
    weights,
)  # fmt: skip
from cosmos_cli.model.device import default_dtype
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.lora_files import Change
from cosmos_cli.model.sequence import SequenceGroup, sequence_group
from cosmos_cli.model.tensor_names import DIFFUSERS, rename
from cosmos_cli.model.tiny import world
from cosmos_cli.model.tokenizer import Tokenizer, load_tokenizer
from cosmos_cli.recipe import loading
from cosmos_cli.recipe.keys import SET_BY_FAST, Recipe
from cosmos_cli.recipe.residence import Residence
from cosmos_cli.spec import COSMOS_7B, MODELS, TINY, DiTSpec, ModelSpec

# Frames, height and width at which the error against fp32 is measured.
SMALL = {COSMOS_7B.name: (25, 352, 640), TINY.name: (9, 64, 96)}
TEXT_BATCH = 16
PROMPT = "A video of a teal robot that pours coffee in a bright kitchen. " * 60


@dataclass
class Bench:
    """Hold the arguments and the model that all parts share."""

    model: str
    r: Recipe
    device: str
    dtype: torch.dtype
    scratch: Path
    rounds: int
    limits: list[float]
    settings: list[str]

    @property
    def spec(self) -> ModelSpec:
        return self.r.spec

    @property
    def size(self) -> tuple[int, int, int]:
        return self.r.num_frames, self.r.height, self.r.width


# --- arithmetic -----------------------------------------------------------------------------------


def forward_flops(spec: DiTSpec, tokens: int, text_tokens: int) -> int:
    """Floating-point operations of one forward pass of one clip, a multiply-add as two.

    The modulations, of one row each, are left out.
    """
    d, text_d = spec.width, spec.text_channels
    self_attention = 2 * 4 * tokens * d * d + 2 * 2 * tokens * tokens * d
    text_attention = 2 * 2 * tokens * d * d + 2 * 2 * text_tokens * text_d * d
    text_attention += 2 * 2 * tokens * text_tokens * d
    mlp = 2 * 2 * spec.mlp_ratio * tokens * d * d
    edges = 2 * tokens * d * (spec.patch_inputs + spec.patch_channels)
    return spec.blocks * (self_attention + text_attention + mlp) + edges


# --- time and memory ------------------------------------------------------------------------------


@contextmanager
def measured(name: str, device: str, rows: list[Row]) -> Iterator[None]:
    """Adds the seconds and the peak of GPU memory of what happens inside to `rows`."""
    synchronize(device)
    peak_gib(device)
    began = time.perf_counter()
    yield
    synchronize(device)
    seconds, peak = time.perf_counter() - began, peak_gib(device)
    rows.append({"name": name, "seconds": round(seconds, 3), "peak_gib": round(peak, 2)})
    print(f"{name}: {seconds:.3f} s, peak {peak:.2f} GiB", flush=True)


def interleaved(variants: dict[str, Callable[[], Tensor]], device: str, rounds: int) -> list[Row]:
    """Median seconds and peak memory of each variant, one of each in every round, after one that
    warms up and compiles.
    """
    found: dict[str, list[Row]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            with measured(f"round {number}, {name}", device, found[name]):
                run()
    return [
        {
            "name": name,
            "seconds": statistics.median(row["seconds"] for row in rows[1:]),
            "fastest": min(row["seconds"] for row in rows[1:]),
            "peak_gib": max(row["peak_gib"] for row in rows[1:]),
            "first_seconds": rows[0]["seconds"],
        }
        for name, rows in found.items()
    ]


# --- networks with random weights -----------------------------------------------------------------


@torch.no_grad()
def random_denoiser(spec: DiTSpec, device: str, dtype: torch.dtype) -> DiT:
    """A network none of whose terms is zero, sampled on the device."""
    with torch.device("meta"):
        net = DiT(spec)
    net = net.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in net.named_parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
        elif "adaln.up" in name or "t_embedder.linear_2" in name:
            weight.normal_(std=0.3 * weight.shape[1] ** -0.5, generator=generator)
        else:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    return net


def sharing(net: DiT) -> DiT:
    """Another network on the same tensors."""
    with torch.device("meta"):
        other = DiT(net.spec)
    other.load_state_dict(net.state_dict(), assign=True)
    return other.eval()


def diffusers_network(spec: DiTSpec) -> nn.Module:
    """Diffusers' network with weights of its own."""
    if not hasattr(peer, "transforms"):
        # It resizes the padding mask with torchvision, which need not be there.
        functional = types.SimpleNamespace(
            resize=lambda x, size, interpolation: F.interpolate(x, size=size, mode=interpolation)
        )
        mode = types.SimpleNamespace(NEAREST="nearest")
        peer.transforms = types.SimpleNamespace(functional=functional, InterpolationMode=mode)
    return peer.CosmosTransformer3DModel.from_config(weights.diffusers_config(spec))


def diffusers_twin(net: DiT) -> nn.Module:
    """Diffusers' network on the same tensors."""
    with torch.device("meta"):
        twin = diffusers_network(net.spec)
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    renamed = rename(state, DIFFUSERS, Path("diffusers"))
    twin.load_state_dict(renamed, assign=True)
    return twin.eval()


@dataclass
class Inputs:
    """Hold the inputs of one forward pass."""

    x_BCTHW: Tensor
    c_noise_B: Tensor
    text_emb_BMD: Tensor
    fps_B: Tensor

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        size: tuple[int, int, int],
        device: str,
        dtype: torch.dtype,
        seed: int = 1,
    ):
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        return cls(
            normal(1, *spec.latent_shape(*size)),
            torch.tensor([-0.1], device=device),
            normal(1, spec.text.tokens, spec.text.channels),
            torch.tensor([spec.fps], device=device),
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(
            self.x_BCTHW.to(dtype), self.c_noise_B, self.text_emb_BMD.to(dtype), self.fps_B
        )


def run_ours(net: DiT, x: Inputs) -> Callable[[], Tensor]:
    """One step with all that it needs, as the peer's; sampling keeps what the steps share."""
    return lambda: net(x.x_BCTHW, x.c_noise_B, x.text_emb_BMD, x.fps_B)


def run_twin(twin: nn.Module, x: Inputs) -> Callable[[], Tensor]:
    """One step as diffusers' pipeline takes it."""
    mask = x.x_BCTHW.new_zeros(1, 1, *(8 * side for side in x.x_BCTHW.shape[-2:]))
    return lambda: twin(
        hidden_states=x.x_BCTHW,
        timestep=x.c_noise_B.to(x.x_BCTHW.dtype),
        encoder_hidden_states=x.text_emb_BMD,
        fps=int(x.fps_B[0]),
        padding_mask=mask,
        return_dict=False,
    )[0]


# --- parts ----------------------------------------------------------------------------------------


def bench_forward(bench: Bench, net: DiT) -> Row:
    """One forward pass of four networks on the same weights."""
    x = Inputs.of(bench.spec, bench.size, bench.device, bench.dtype)
    compiled, twin, compiled_twin = sharing(net), diffusers_twin(net), diffusers_twin(net)
    video_models.compile_blocks(compiled)
    compiled_twin.compile()
    rows = interleaved(
        {
            "ours": run_ours(net, x),
            "ours, blocks compiled": run_ours(compiled, x),
            "diffusers": run_twin(twin, x),
            "diffusers, compiled": run_twin(compiled_twin, x),
        },
        bench.device,
        bench.rounds,
    )
    tokens = bench.spec.tokens(*bench.size)
    flops = forward_flops(bench.spec.dit, tokens, bench.spec.text.tokens)
    for row in rows:
        row["tflops_per_second"] = round(flops / row["seconds"] / 1e12, 1)
    errors = number_format_errors(bench, net, compiled, twin)
    for row in rows:
        row["relative_l2"] = errors.get(row["name"])
    return {"tflop": flops / 1e12, "tokens": tokens, "rows": rows}


def number_format_errors(
    bench: Bench, net: DiT, compiled: DiT, twin: nn.Module
) -> dict[str, float]:
    """|output - fp32 output| / |fp32 output| at the small size."""
    x = Inputs.of(bench.spec, SMALL[bench.spec.name], bench.device, bench.dtype)
    outputs = {
        "ours": run_ours(net, x)(),
        "ours, blocks compiled": run_ours(compiled, x)(),
        "diffusers": run_twin(twin, x)(),
    }
    exact_net = sharing(net).float()
    exact = run_ours(exact_net, x.to(torch.float32))()
    return {
        name: ((output.float() - exact).norm() / exact.norm()).item()
        for name, output in outputs.items()
    }


def in_fp8(net: DiT, attention: bool) -> DiT:
    """Another network whose blocks compute in fp8."""
    other = sharing(net)
    fp8_sampling.use_fp8(other.blocks, attention)
    return other


def bench_fp8(bench: Bench, net: DiT) -> Row:
    """One pass in bf16 and in fp8, and the errors of both against fp32."""
    attention = attention_errors(bench)
    nets = {
        "bf16": sharing(net),
        "fp8 linears": in_fp8(net, attention=False),
        "fp8 linears and attention": in_fp8(net, attention=True),
    }
    x = Inputs.of(bench.spec, SMALL[bench.spec.name], bench.device, bench.dtype)
    outputs = {name: run_ours(variant, x)().float() for name, variant in nets.items()}
    outputs["diffusers, bf16"] = run_twin(diffusers_twin(net), x)().float()
    exact_net = sharing(net).float()
    exact = run_ours(exact_net, x.to(torch.float32))()
    del exact_net
    errors = {
        name: ((output - exact).norm() / exact.norm()).item() for name, output in outputs.items()
    }
    print(errors, flush=True)
    for variant in nets.values():
        video_models.compile_blocks(variant)
    x = Inputs.of(bench.spec, bench.size, bench.device, bench.dtype)
    variants = {name: run_ours(variant, x) for name, variant in nets.items()}
    twin = diffusers_twin(net)
    twin.compile()
    variants["diffusers, bf16"] = run_twin(twin, x)
    rows = interleaved(variants, bench.device, bench.rounds)
    for row in rows:
        row["relative_l2"] = errors[row["name"]]
    conditioning = [text_models.Conditioning(PROMPT, x.text_emb_BMD[0], -x.text_emb_BMD[0])]
    name = "fp8 linears and attention"
    for variant, steps in (("bf16", 8), (name, 8), (name, bench.r.num_steps)):
        few, all_ = (bench.r.model_copy(update={"num_steps": count}) for count in (2, steps))
        video_models.sample_latents(few, nets[variant], conditioning, [1], "warm up")
        with measured(f"{variant}, {steps} steps", bench.device, rows):
            video_models.sample_latents(all_, nets[variant], conditioning, [1], variant)
    return {"rows": rows, "attention": attention, "errors": errors}


def bench_fast(bench: Bench, net: DiT) -> Row:
    """A video by `speed: fast`, then its decoding."""
    r, device, rows = bench.r, bench.device, []
    embedding = torch.randn(r.spec.text.tokens, r.spec.text.channels, device=device)
    conditioning = [text_models.Conditioning(PROMPT, embedding, -embedding)]
    fast = r.model_copy(update={"speed": "fast", **SET_BY_FAST})
    few = r.model_copy(update={"num_steps": 1})
    variant = in_fp8(net, attention=True)
    if device != "cpu":
        video_models.compile_blocks(variant)
    video_models.sample_latents(few, variant, conditioning, [1], "warm up")
    with measured("speed: fast, fp8", device, rows):
        x0 = video_models.sample_latents(fast, variant, conditioning, [1], "fast")
    tokenizer = Tokenizer(bench.spec.tokenizer, bench.spec.sigma_data)
    tokenizer = tokenizer.to(device, bench.dtype).eval()
    for turn in range(3):
        with measured(f"decode, call {turn}", device, rows):
            rgb.to_uint8(tokenizer.decode(x0.to(bench.dtype))[0]).cpu()
    return {"rows": rows}


def attention_errors(bench: Bench) -> dict[str, float]:
    """Relative L2 of fp8 attention against fp32 on two heads of a whole clip, and its rate."""
    dit, tokens = bench.spec.dit, bench.spec.tokens(*bench.size)
    generator = torch.Generator(bench.device).manual_seed(0)
    shape = (1, tokens, dit.heads, dit.head_width)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, device=bench.device)

    def unit(x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()

    q, k, v = unit(normal()), unit(normal()), normal()
    # Each query's own key is the query, scaled so that it gets half of the weight.
    scale = (math.log(tokens) + 0.5) / dit.head_width**0.5
    kinds = {"random": (q, k, v), "one key has half": (q, q * scale, v), "v + 1": (q, k, v + 1)}
    kinds |= tiny_attention_inputs(bench)
    found = {}
    for name, tensors in kinds.items():
        inputs = [x.to(bench.dtype) for x in tensors]
        some = [x[:, :, :2].float() for x in inputs]
        exact = [kernels.attention(part, *some[1:]) for part in some[0].split(2048, dim=1)]
        wanted = torch.cat(exact, dim=1)
        for label, attend in (("fp8", fp8_sampling.attend), ("bf16", kernels.attention)):
            got = attend(*inputs)[:, :, :2].float()
            found[f"{name}, {label}"] = ((got - wanted).norm() / wanted.norm()).item()
    return found


def tiny_attention_inputs(bench: Bench) -> dict[str, tuple[Tensor, ...]]:
    """q, k and v of the tiny model's middle block, on a rendered clip at three noise levels."""
    device, dtype, r = bench.device, bench.dtype, loading.load("tiny", []).recipe
    net = video_models.load_denoiser(r, r.model_files.dit, device)
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, dtype)
    scene, rendered = world.ordinary_scenes(1, 0)[0][0], (bench.size, bench.spec.fps)
    clip = world.render(scene, *rendered[0], rendered[1]).to(device, dtype)
    x0 = tokenizer.encode(clip[None] / 127.5 - 1).float()
    recorded: list[tuple[Tensor, ...]] = []
    layer = net.blocks[len(net.blocks) // 2].self_attn

    def attend(*inputs: Tensor) -> Tensor:
        recorded.append(inputs)
        return kernels.attention(*inputs)

    layer.attend = attend
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    text_emb = torch.zeros(1, r.spec.text.tokens, r.spec.text.channels, device=device, dtype=dtype)
    fps_B, levels = torch.tensor([r.spec.fps], device=device), (80.0, 1.0, 0.1)
    for sigma in levels:
        sigma_B = torch.tensor([sigma], device=device)
        edm.denoise(net, x0 + sigma * noise, sigma_B, text_emb, fps_B, r.spec.sigma_data)
    names = (f"tiny model at sigma {sigma:g}" for sigma in levels)
    return dict(zip(names, recorded, strict=True))


def random_lora(net: DiT, rank: int, size: float) -> dict[str, Change]:
    """A change of every linear by `size` of its weight's norm, sampled on the CPU."""
    generator, found = torch.Generator().manual_seed(2), {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            norm = a.norm() * b.norm() / rank**0.5
            scale = size * module.weight.norm().item() / norm.item()
            found[f"net.{name}"] = Change(a, b, scale, name)
    return found


def with_lora(net: DiT, changes: dict[str, Change]) -> DiT:
    """Another network on the same tensors but those of the changed linears."""
    other = sharing(net)
    lora.apply_unmerged(other, [changes])
    return other


def bench_lora(bench: Bench, net: DiT) -> Row:
    """One pass with and without a LoRA next to every linear, and what is left of its change."""
    rows = lora_passes(bench, net)
    torch._dynamo.reset()
    return {"rows": rows, "kept_of_the_change": kept_changes(bench, net)}


def lora_passes(bench: Bench, net: DiT) -> list[Row]:
    """The time of one pass without a LoRA and with one, blocks compiled."""
    x = Inputs.of(bench.spec, bench.size, bench.device, bench.dtype)
    nets = {"plain": sharing(net)}
    for rank in (16, 64):
        nets[f"rank {rank}"] = with_lora(net, random_lora(net, rank, 1e-3))
    for variant in nets.values():
        video_models.compile_blocks(variant)
    variants = {name: run_ours(variant, x) for name, variant in nets.items()}
    rows = interleaved(variants, bench.device, bench.rounds)
    for row in rows:
        row["times_plain"] = round(row["seconds"] / rows[0]["seconds"], 4)
    return rows


def kept_changes(bench: Bench, net: DiT) -> dict[str, tuple[float, float]]:
    """Project the change of the output by a LoRA on that in fp32; 1 is all of it.

    Rounding noise of the format is many times a small change, but it has no direction: it shows
    in the norm of the difference and not in the projection. Given are the mean over inputs and its
    standard error. Only linears of attention and MLP are changed: the modulations have the same
    noise for all inputs, so its projection does not average out.
    """

    def outputs(network: DiT) -> list[Tensor]:
        dtype = next(network.parameters()).dtype
        size = SMALL[bench.spec.name]
        made = (
            Inputs.of(bench.spec, size, bench.device, bench.dtype, seed).to(dtype)
            for seed in range(4 * bench.rounds)
        )
        return [run_ours(network, x)().float().cpu() for x in made]

    plain, exact_plain, found = outputs(net), outputs(sharing(net).float()), {}
    for size in (4e-3, 8e-4, 2e-4):
        changes = {
            name: change
            for name, change in random_lora(net, 16, size).items()
            if "attn." in name or ".mlp." in name
        }
        beside = outputs(with_lora(net, changes))
        exact = sharing(net).float()
        lora.apply_unmerged(exact, [changes])
        pairs = zip(beside, plain, outputs(exact), exact_plain, strict=True)
        del exact
        parts = [
            (((a - b) * (c - d)).sum() / (c - d).square().sum()).item() for a, b, c, d in pairs
        ]
        error = statistics.stdev(parts) / len(parts) ** 0.5
        found[f"|dW|/|W| {size:g}"] = (round(statistics.fmean(parts), 4), round(error, 4))
    return found


def bench_sample(bench: Bench, net: DiT) -> Row:
    """A whole video, phase by phase."""
    r, device, rows = bench.r, bench.device, []
    embedding = bench_text(bench, rows)
    compiled = video_models.worth_compiling(r, device) and video_models.compile_blocks(net)
    conditioning = text_models.Conditioning(PROMPT, embedding, embedding.flip(0))
    evaluations = 2 * r.num_steps
    few = r.model_copy(update={"num_steps": 2})
    with measured("denoise, 2 steps, and compiling", device, rows):
        video_models.sample_latents(few, net, [conditioning], [r.sampling_seed], "warm up")
    with measured(f"denoise, {r.num_steps} steps, {evaluations} passes", device, rows):
        x0 = video_models.sample_latents(r, net, [conditioning], [r.sampling_seed], "denoise")
    flops = evaluations * forward_flops(
        bench.spec.dit, bench.spec.tokens(*bench.size), bench.spec.text.tokens
    )
    rows[-1]["tflops_per_second"] = round(flops / rows[-1]["seconds"] / 1e12, 1)
    tokenizer = Tokenizer(bench.spec.tokenizer, bench.spec.sigma_data)
    tokenizer = tokenizer.to(device, bench.dtype).eval()
    for turn in ("first", "second"):
        with measured(f"decode, {turn} time", device, rows):
            pixels = rgb.to_uint8(tokenizer.decode(x0.to(bench.dtype))[0]).cpu()
    path = bench.scratch / "bench.mp4"
    with measured("write mp4", device, rows):
        mp4.write_mp4(path, pixels, r.fps, r.video_crf)
    shape = video.probe(path)
    assert (shape.frames, shape.height, shape.width) == bench.size
    backend = video_models.self_attention_backend(r, net)
    found = {"attention": backend, "compiled": compiled, "mp4_bytes": path.stat().st_size}
    return {**found, "rows": rows}


def bench_given(bench: Bench, net: DiT) -> Row:
    """Some steps of Text2World, and of Video2World from 1 and 9 frames."""
    r, twin = bench.r, next(s for s in MODELS.values() if s.shared_with == bench.spec)
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    cond_frames.add_mask_columns(state, twin.dit)
    with torch.device("meta"):
        told = DiT(twin.dit)
    own = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    told.load_state_dict(own, assign=True)
    nets = {"from text": sharing(net), "1 frame": told.eval()}
    if bench.device != "cpu":
        for one in nets.values():
            video_models.compile_blocks(one)
    nets["9 frames"] = nets["1 frame"]
    embedding = torch.randn(r.spec.text.tokens, r.spec.text.channels, device=bench.device) * 0.1
    channels, _, *cells = r.spec.latent_shape(*bench.size)

    def run(name: str, count: int) -> Tensor:
        frames = torch.randn(channels, count, *cells) * r.spec.sigma_data
        prompt = text_models.Conditioning(PROMPT, embedding, embedding.flip(0), frames)
        own = r.model_copy(update={"model": twin.name}) if count else r
        return video_models.sample_latents(own, nets[name], [prompt], [1], name)

    counts = zip(nets, (0, 1, 2), strict=True)
    variants = {name: partial(run, name, count) for name, count in counts}
    rows = interleaved(variants, bench.device, bench.rounds)
    for row in rows:
        row["times_from_text"] = round(row["seconds"] / rows[0]["seconds"], 4)
    return {"steps": r.num_steps, "rows": rows}


def bench_streamed(bench: Bench, net: DiT) -> Row:
    """The same latents with all weights on the GPU, and with those streamed that do not fit."""
    r, rows, found = bench.r, [], {}
    embedding = torch.randn(r.spec.text.tokens, r.spec.text.channels, device=bench.device) * 0.1
    conditioning = text_models.Conditioning(PROMPT, embedding, embedding.flip(0))
    few = r.model_copy(update={"num_steps": 2})
    state = {name: tensor.cpu() for name, tensor in net.state_dict().items()}
    latents, resident = [], net
    for limit in (0, *bench.limits):
        if limit:
            net = streamed_denoiser(bench, state, limit, found)
        name = f"{limit:g} GiB" if limit else "resident"
        torch.compiler.reset()
        if bench.device != "cpu":
            video_models.compile_blocks(net)
        for settings in (few, r):
            with measured(f"{name}: {settings.num_steps} steps", bench.device, rows):
                x0 = video_models.sample_latents(settings, net, [conditioning], [1], name)
        latents.append(x0.cpu())
        # Free the network before the next one.
        (net if limit else resident).to_empty(device="meta")
        del net
    found["equal"] = [torch.equal(latents[0], x) for x in latents[1:]]
    return {**found, "rows": rows}


@torch.inference_mode(False)
def streamed_denoiser(bench: Bench, state: dict[str, Tensor], limit: float, found: Row) -> DiT:
    """A denoiser in at most `limit` GiB of the GPU."""
    device = torch.device(bench.device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / total)
    count = memory.streamed_blocks(bench.r.model_copy(update={"memory": "streamed"}), bench.device)
    found[f"{limit:g} GiB"] = memory.weights_line(bench.r, count)
    with torch.device("meta"):
        net = DiT(bench.spec.dit).to(bench.dtype).requires_grad_(False)
    indices = Residence(count).streamed_blocks(bench.spec.dit.blocks)
    streaming.allocate(net, net.blocks, indices, device)
    net.load_state_dict(state)
    if indices:
        net.weights = streaming.WeightStream(net.blocks, indices, device)
        found["pageable"] = net.weights.pageable
    return net.eval()


def bench_split(bench: Bench, net: DiT) -> Row:
    """Some steps of sampling: every process by itself, then all of them on one video."""
    r, device, rows = bench.r, bench.device, []
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    pair = worker.pair_of(dist.get_world_size())
    spec, generator = bench.spec.text, torch.Generator(device).manual_seed(1)
    embedding = torch.randn(spec.tokens, spec.channels, generator=generator, device=device)
    conditioning = [text_models.Conditioning(PROMPT, embedding, embedding.flip(0))]
    if r.sampling_precision == "fp8":
        net = in_fp8(net, attention=True)
    if video_models.worth_compiling(loading.load(*SHIPPED[bench.model]).recipe, device):
        video_models.compile_blocks(net)
    few, made = r.model_copy(update={"num_steps": 2}), []
    fast = r.model_copy(update={"speed": "fast", **SET_BY_FAST})
    steps, world = f"{r.num_steps} steps", dist.get_world_size()
    alone = ("one", SequenceGroup(), None)
    halves = (f"{world}, guidance halves", pair.sequence, pair)
    variants = [(steps, r, *alone), (steps, r, *halves)]
    if world == 2:
        variants.append((steps, r, "2 that share the tokens", sequence_group(2), None))
    variants += [("speed: fast", fast, *alone), ("speed: fast", fast, *halves)]
    for what, keys, label, sequence, own in variants:
        net.share(sequence)
        video_models.sample_latents(few, net, conditioning, [1], "warm up", own)
        dist.barrier()
        with measured(f"{what} by {label}", device, rows):
            made.append(video_models.sample_latents(keys, net, conditioning, [1], label, own))
        first = next(i for i, other in enumerate(variants) if other[0] == what)
        rows[-1]["times_faster"] = round(rows[first]["seconds"] / rows[-1]["seconds"], 3)
        rows[-1]["relative_l2"] = ((made[-1] - made[first]).norm() / made[first].norm()).item()
        print(rows[-1], flush=True)
    dist.destroy_process_group()
    return {"rows": rows}


def bench_text(bench: Bench, rows: list[Row]) -> Tensor:
    """The embedding (M, D) of a prompt of full length by an encoder of full size."""
    folder, spec = t5_folder(bench), bench.spec.text
    with measured("load text encoder", bench.device, rows):
        encoder = text.TextEncoder(folder, spec, bench.device, bench.dtype)
    with measured("text, first prompt", bench.device, rows):
        (embedding,) = encoder.encode([PROMPT])
    assert len(embedding) == spec.tokens
    with measured("text, one prompt", bench.device, rows):
        encoder.encode([PROMPT])
    with measured(f"text, {TEXT_BATCH} prompts", bench.device, rows):
        encoder.encode([PROMPT] * TEXT_BATCH)
    rows[-1]["prompts_per_second"] = round(TEXT_BATCH / rows[-1]["seconds"], 1)
    return embedding.float()


def t5_folder(bench: Bench) -> Path:
    """A folder with a text encoder of full size and random weights."""
    folder = bench.scratch / "t5"
    if bench.spec.embedded:
        return paths.EMBEDDED_DIR / "t5"
    if not (folder / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(paths.EMBEDDED_DIR / "t5")
        tokenizer.save_pretrained(folder)
        with torch.device(bench.device):
            config = T5Config(**T5_11B)
            T5EncoderModel(config).to(bench.dtype).save_pretrained(folder)
    return folder


def bench_command(bench: Bench, net: DiT) -> Row:
    """Seconds of the whole command by the lines that it says, next to dd of the files it reads."""
    root = (bench.scratch / "checkpoints").absolute()
    found = paths.model_files(bench.spec, str(root))
    if not bench.spec.embedded and not found.dit.exists():
        for folder in (found.dit.parent, found.tokenizer, found.text_encoder.parent):
            folder.mkdir(parents=True, exist_ok=True)
        found.text_encoder.symlink_to(t5_folder(bench).absolute())
        tokenizer = Tokenizer(bench.spec.tokenizer, bench.spec.sigma_data).state_dict()
        save_file(tokenizer, found.tokenizer / weights.TOKENIZER_FILE)
        state = {f"net.{name}": tensor.cpu() for name, tensor in net.state_dict().items()}
        weights.save_dit(found.dit, state, "pt")
        del state
    read = [found.dit, *found.tokenizer.glob("*"), *found.text_encoder.glob("*.safetensors")]
    began = time.perf_counter()
    for path in read:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M", "status=none"], check=True)
    rows = [{"line": "dd of the same files", "seconds": round(time.perf_counter() - began, 2)}]
    shipped, settings = SHIPPED[bench.model]
    settings = [*settings, *bench.settings, f"checkpoints_dir={root}", "guardrails=off"]
    command = [sys.executable, "-m", "cosmos_cli", "generate", shipped, "--model", "base"]
    command += [word for setting in settings for word in ("--set", setting)]
    command += ["-o", str(bench.scratch / f"videos_{time.time():.0f}")]
    totals = {}
    for run, videos in (("first run", 1), ("second run", 1), ("two videos", 2)):
        words = [f"--prompt=Take {i} of the {run}. {PROMPT}" for i in range(videos)]
        told = list(timed_lines([*command, *words]))
        rows += [{"run": run, "line": line, "seconds": round(s, 2)} for line, s in told]
        sampling = sum(s for line, s in told if "denoiser: " in line and "loading" not in line)
        total = sum(s for _, s in told)
        totals[run] = {"total": round(total, 2), "outside_denoiser": round(total - sampling, 2)}
    return {**totals, "gigabytes": sum(path.stat().st_size for path in read) / 1e9, "rows": rows}


def timed_lines(command: list[str]) -> Iterator[tuple[str, float]]:
    """Each line that a command says but its progress, and the seconds since the line before it."""
    last, progress = time.perf_counter(), re.compile(r" \d+/\d+ steps, ")
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as p:
        for line in p.stderr:
            if progress.search(line):
                continue
            now = time.perf_counter()
            yield line.strip()[:100], now - last
            last = now
    yield "end of the process", time.perf_counter() - last
    assert p.returncode == 0


def bench_load(bench: Bench, net: DiT) -> Row:
    """Host memory while `generate` loads a model file of the full size to the device."""
    path, rows = bench.scratch / paths.MODEL_FILE, []
    if not path.exists():
        state = {f"net.{name}": tensor.cpu() for name, tensor in net.state_dict().items()}
        weights.save_dit(path, state, "pt")
        del state
    net.to("meta")
    found = {"file_gb": round(path.stat().st_size / 1e9, 2)}
    with measured("load model file", bench.device, rows), HostMemory() as memory:
        loaded = video_models.load_denoiser(bench.r, path, bench.device)
    found["host_gb_above_the_mapping"] = round(memory.peak / 1e9, 3)
    assert next(loaded.parameters()).device.type == bench.device
    return {**found, "rows": rows}


class HostMemory:
    """The most private memory that this process took more than at the start, in bytes.

    Pages of mapped files are not in it.
    """

    def __enter__(self) -> HostMemory:
        self.first = self.private()
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, self.private() - self.first)

    @staticmethod
    def private() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * sum(
            int(line.split()[1])
            for line in status.splitlines()
            if line.startswith(("RssAnon", "RssShmem"))
        )


PARTS = {
    "forward": bench_forward, "fp8": bench_fp8, "fast": bench_fast, "lora": bench_lora,
    "sample": bench_sample, "split": bench_split, "given": bench_given, "command": bench_command,
    "load": bench_load, "streamed": bench_streamed,
}  # fmt: skip


def main() -> None:
    """Runs the chosen parts and writes what they found."""
    parser = common.parser(__doc__, "JSON file of the figures", "folder with 30 GB of space")
    common.add_parts(parser, PARTS, "forward,sample,load")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="default: those of the recipe")
    parser.add_argument(
        "--limits", type=float, nargs="*", default=[12.0], help="GiB of the GPU, for streamed"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--attention", help="fail when another backend would run, e.g. cudnn")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    shipped, settings = SHIPPED[options.model]
    if options.steps:
        settings = [*settings, f"num_steps={options.steps}"]
    settings = [*settings, *options.set]
    r, device = loading.load(shipped, settings).recipe, best_device()
    dtype = default_dtype(device)
    about = (options.model, r, device, dtype, options.scratch, options.rounds, options.limits)
    about += (options.set,)
    bench = Bench(*about)
    # As load_denoiser does: diffusers imports Transformer Engine where it is installed.
    kernels.put_cudnn_first()
    with torch.inference_mode():
        net = random_denoiser(r.spec.dit, device, dtype)
        backend = video_models.self_attention_backend(r, net)
        if options.attention not in (None, backend):
            raise SystemExit(f"attention would run as {backend}, not {options.attention}")
        about = {
            "model": r.model, "size": bench.size, "attention": backend, "dtype": str(dtype),
            "device": common.device_name(device),
            "torch": torch.__version__, "diffusers": diffusers.__version__,
        }  # fmt: skip
        found: Row = {"about": about}
        # In this order, for the last one gives the network's memory back.
        for part in filter(options.parts.__contains__, PARTS):
            found[part] = PARTS[part](bench, net)
            if os.environ.get("RANK", "0") == "0":
                files.write_json(options.out, found)
    print(json.dumps(about))
    for part in filter(options.parts.__contains__, PARTS):
        rest = {key: value for key, value in found[part].items() if key != "rows"}
        print(f"\n{part} {json.dumps(rest)}\n\n{common.markdown(found[part]['rows'])}")


if __name__ == "__main__":
    main()
