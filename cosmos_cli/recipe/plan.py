"""Predict memory, time and disk of a run from the shapes of the model. No torch.

Memory is the peak of PyTorch's allocated memory per GPU. Times are the floating-point operations
divided by the rates that kernels reach with this model's shapes, plus the element-wise work of
plain PyTorch. Bytes are decimal (1 GB = 10^9). A multiply-add counts as two operations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cosmos_cli import console
from cosmos_cli.errors import ExitCode, UserError, usage_error
from cosmos_cli.recipe import residence
from cosmos_cli.recipe.residence import Residence

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# USABLE: the share of a GPU's memory that PyTorch's allocator can hand out. Fragmentation and CUDA
# itself take the rest. A step with a peak of 145.1 GB ran on an H200. COMFORTABLE: above this
# share, a plan that is 5 % too low would not fit.
USABLE, COMFORTABLE = 0.97, 0.92
# Kernel rates as shares of the bf16 peak of 989 TFLOP/s, with cuDNN attention and 56,320 tokens.
# Measured in isolation on one H100: linear layers 720 TFLOP/s, in fp8 1040 including the cast to
# fp8, attention forward 630. Two values are fitted to measured steps, within 5 %: attention
# backward (495 TFLOP/s), and the element-wise passes, which count how often a compiled block's
# forward pass moves one bf16 activation through memory. The steps took 13.0 s with a LoRA on an
# H100, 12.4 s in fp8, 14.7 s on two H200, 17.1 s on one.
LINEAR, FP8_LINEAR, ATTENTION, ATTENTION_BACKWARD = 0.73, 1.05, 0.64, 0.50
ELEMENTWISE_PASSES = 60
# Unit of the next four lines: one bf16 activation (tokens x width).
# The peak of a block's backward pass, the same with a LoRA, and the activations that a block stores
# without checkpointing. Measured: 34.5 and 27.9.
BLOCK_WORK, LORA_BLOCK_WORK, BLOCK_KEPT = 34, 28, 34
# Additional memory in fp8: activations and weights in their second format.
FP8_WORK = 2.5
# Buffers of the all-to-all between tokens and heads in a sequence-parallel group.
EXCHANGED = 6
# The outputs of all linears of a block.
LINEARS_KEPT = 11
# The last linear's share of the arithmetic of a block's linears.
LAST_LINEAR = 8 / 28
# The assumed number of GPUs per node, and the GB/s between two nodes that NCCL reaches over eight
# 400 Gbit/s adapters.
NODE, NODE_RATE = 8, 360
# Elements in DeepSpeed's gradient reduction bucket, and in the parameter group whose fp32 gradients
# exist at the same time during an optimizer step. DeepSpeed's defaults are 5e8 and 1e9.
REDUCE_BUCKET, STEP_GROUP = 200_000_000, 200_000_000
# Changes that save memory, in the order to try them.
GPU_SAVERS = (
    {"zero_stage": 3},
    {"activation_checkpointing": "attention"},
    {"activation_checkpointing": "all"},
    {"micro_batch_size": 1},
    {"sequence_parallel": 2},
)
SAVERS = (
    *GPU_SAVERS,
    {"offload": "weights", "zero_stage": 1},
    {"offload": "ema"},
    {"offload": "optimizer"},
    {"offload": "parameters", "zero_stage": 3},
)
LORA = {"lora_rank": 16, "learning_rate": 2e-4}
# Shorter clips to try. Their length must be 8k + 1.
SHORTER = (57, 33)
# The CPU memory of one process: Python, torch, CUDA and their buffers. An estimate.
PROCESS_BYTES = 3e9
# The parts that move to CPU memory, by the value of the recipe key `offload`.
OFFLOADED = {
    "none": (),
    "ema": ("EMA",),
    "optimizer": ("EMA", "optimizer", "gradients"),
    "parameters": ("EMA", "optimizer", "gradients", "weights"),
    "weights": (),
}
# GB/s of copies between pinned CPU memory and a GPU, by PCIe generation.
PCIE_RATES = {3: 11.0, 4: 22.0, 5: 45.0}
# GB/s at which each GPU's offloaded state is updated and transferred, about the rate of PCIe.
HOST_RATE = 20


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU: memory in GB, dense bf16 peak in TFLOP/s, memory and link rates in GB/s.

    `pcie` is the generation of its 16 PCIe lanes, through which CPU memory is read.
    """

    name: str
    memory_gb: float
    tflops: float
    memory_rate: float
    link_rate: float
    pcie: int = 4


# Source: the vendor's data sheets; link rates as NCCL reaches them, over NVLink or PCIe.
GPUS = (
    GpuModel("H100-80GB", 85.0, 989, 3000, 370, 5),
    GpuModel("H200", 150.0, 989, 4300, 370, 5),
    GpuModel("H100-NVL", 100.0, 835, 3500, 240, 5),
    GpuModel("H100-PCIe", 85.0, 756, 1900, 22, 5),
    GpuModel("H800", 85.0, 989, 3000, 160, 5),
    GpuModel("B200", 191.0, 2250, 7000, 740, 5),
    GpuModel("A100-80GB", 85.0, 312, 1800, 230),
    GpuModel("A100-40GB", 42.4, 312, 1400, 230),
    GpuModel("L40S", 47.7, 362, 800, 20),
    GpuModel("A6000", 50.9, 155, 700, 20),
    GpuModel("RTX-4090", 25.4, 165, 940, 20),
    GpuModel("RTX-5090", 34.2, 210, 1650, 40, 5),
)


@dataclass(frozen=True)
class Plan:
    """The predicted needs of a run. Times are None if the GPU is not known.

    `host_gb` is the offloaded state in CPU memory, `cpu_gb` an estimate of all CPU memory; both are
    of all processes together.
    """

    memory_gb: dict[str, float]
    total_gb: float
    available_gb: float | None
    host_gb: float
    cpu_gb: float
    step_seconds: float | None
    run_hours: float | None
    disk_gb: dict[str, float]

    @property
    def fits(self) -> bool:
        """True if the memory is enough, or if the GPU is not known."""
        return self.available_gb is None or self.total_gb <= self.available_gb


def parse_gpus(text: str) -> tuple[int, GpuModel]:
    """Return the count and kind of "8xH100-80GB", "1xRTX4090-24GB" or "2xNVIDIA H200".

    Raises:
        UserError: the text has another form, or may mean none or several of the known GPUs.
    """
    counted = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(.*)", text.strip(), re.IGNORECASE)
    count, name = (counted[1] or "1", counted[2]) if counted else ("0", "")
    gpu = None if "," in name else find_gpu(name)
    words = _words(name)
    if int(count[:9]) and gpu:
        sizes = [int(word[:-2]) for word in words if re.fullmatch(r"\d+GB", word)]
        # "24GB" may be in GB or GiB. A slice of a GPU names the memory of the GPU and its own.
        if len(sizes) == 1 and not 0.85 < sizes[0] / gpu.memory_gb < 1.15:
            raise usage_error(
                "--gpus", f"{text!r} is not known: a {gpu.name} has {gpu.memory_gb:g} GB",
                f"use `--gpus {count}x{gpu.name}`",
            )  # fmt: skip
        return int(count[:9]), gpu
    alike = [gpu.name for gpu in GPUS if _words(gpu.name)[0] in words] if int(count[:9]) else []
    known = ", ".join(gpu.name for gpu in GPUS)
    ways = " or ".join(f"`--gpus {count}x{name}`" for name in alike)
    raise UserError(
        f"{text!r} may be several GPUs" if alike else f"{text!r} is not a count of known GPUs",
        code=ExitCode.USAGE, where="--gpus",
        fix=f"which one? {ways}" if alike else f"write e.g. 8xH100-80GB; known GPUs: {known}",
    )  # fmt: skip


def gpu_choices(incomplete: str) -> list[str]:
    """Return the completions of --gpus: each known GPU with the count that was typed."""
    count = re.match(r"\d+", incomplete)
    choices = (f"{count[0] if count else 1}x{gpu.name}" for gpu in GPUS)
    return [choice for choice in choices if choice.startswith(incomplete)]


def _words(name: str) -> list[str]:
    """Return the words of a GPU's name in capitals, such as 4090 and 24GB of "RTX4090-24GB"."""
    parted = re.sub(r"\b(NVIDIA|GEFORCE|RTX)(?=\w)", r"\1 ", name.upper())
    return [
        word for word in re.split(r"[\W_]+", parted) if word not in ("NVIDIA", "GEFORCE", "RTX")
    ]


def find_gpu(name: str) -> GpuModel | None:
    """Return the known GPU whose words all appear in a name such as "NVIDIA H100 80GB HBM3".

    A MIG slice, such as "NVIDIA H100 80GB HBM3 MIG 3g.40gb", has its own memory. Its rates are as
    many sevenths of the whole GPU's as its profile says.
    """
    words = set(_words(name))
    found = (gpu for gpu in GPUS if set(_words(gpu.name)) <= words)
    whole = max(found, key=lambda gpu: len(gpu.name), default=None)
    profile = re.search(r"\bMIG (?:\dc\.)?((\d)g\.(\d+)gb)", name, re.IGNORECASE)
    if whole is None or profile is None:
        return whole
    share = int(profile[2]) / 7
    return replace(
        whole,
        name=f"{whole.name} MIG {profile[1].lower()}",
        memory_gb=float(profile[3]),
        tflops=whole.tflops * share,
        memory_rate=whole.memory_rate * share,
    )


def plan(r: Recipe, ranks: int, gpu: GpuModel | None) -> Plan:
    """Return the memory, time and disk that the recipe needs on `ranks` GPUs."""
    memory = {part: size / 1e9 for part, size in _memory(r, ranks, gpu).items()}
    host = ranks * sum(memory.pop(part) for part in OFFLOADED[r.offload])
    host += _streamed_bytes(r, streamed_parts(r, gpu)) / 1e9
    seconds = None if gpu is None else step_seconds(r, ranks, gpu)
    element_size = 2 if r.precision == "bf16" else 4
    # A save gathers the weights and the EMA. The base weights are read from a mapped file.
    whole = r.trained_parameters * (element_size + 4)
    space = disk(r, 0)
    return Plan(
        memory_gb=memory,
        total_gb=sum(memory.values()),
        available_gb=None if gpu is None else gpu.memory_gb * USABLE,
        host_gb=host,
        cpu_gb=host + (ranks * PROCESS_BYTES + whole) / 1e9,
        step_seconds=seconds,
        run_hours=None if seconds is None else seconds * r.max_steps / 3600,
        disk_gb={
            "model files of a save": space.model_bytes / 1e9,
            "a resume state": space.state_bytes / 1e9,
            "whole run": space.run_bytes / 1e9,
        },
    )


def remedies(r: Recipe, ranks: int, gpu: GpuModel) -> list[tuple[str, Plan]]:
    """Return the --set options that make the recipe fit, with their plans, the best first.

    Each keeps the clips as large as possible: with all weights trained and with a LoRA, in GPU
    memory alone and with state in CPU memory.
    """
    found: dict[str, Plan] = {}
    # A recipe for another machine than the one that is planned for.
    count = {} if r.num_processes in ("auto", ranks) else {"num_processes": ranks}
    for method in ({},) if r.lora_rank else ({}, LORA):
        for savers in (GPU_SAVERS, SAVERS):
            for clip in _clips(r):
                changes = _fit(r, {**count, **method, **clip}, savers, ranks, gpu)
                if changes is not None:
                    less = plan(r.model_copy(update=changes), ranks, gpu)
                    options = (f"--set {k}={v}" for k, v in changes.items() if v != getattr(r, k))
                    found.setdefault(" ".join(options), less)
                    break
    # The same clips first; else what needs the least CPU memory.
    smaller = {words for words in found if "num_frames" in words or "height" in words}
    return sorted(found.items(), key=lambda way: way[0] in smaller and way[1].cpu_gb)


def smaller_clip(r: Recipe) -> str:
    """Return the --set options of the next smaller clip."""
    smaller = _clips(r)[1]
    return f"`{' '.join(f'--set {key}={value}' for key, value in smaller.items())}`"


def relief(r: Recipe, ranks: int) -> str:
    """Return what to change when a GPU's memory ran out in spite of the plan."""
    ways = []
    if _saves(r, {"activation_checkpointing": "all"}, ranks):
        ways.append("`--set activation_checkpointing=all`")
    if _saves(r, {"offload": "optimizer"}, ranks):
        cpu_gb = plan(r.model_copy(update={"offload": "optimizer"}), ranks, None).cpu_gb
        ways.append(f"`--set offload=optimizer` (it takes {cpu_gb:.0f} GB of CPU memory)")
    return f"use {' or '.join([*ways, smaller_clip(r)])}"


def _clips(r: Recipe) -> list[dict[str, int]]:
    """Return the changes of the clips to try, from none to the smallest clip."""
    step = r.spec.size_multiple
    half = {key: max(getattr(r, key) // 2 // step, 1) * step for key in ("height", "width")}
    lengths = [{}, *({"num_frames": n} for n in SHORTER if n < r.num_frames)]
    clips: list[dict[str, int]] = [{**length, **size} for length in lengths for size in ({}, half)]
    return sorted(clips, key=lambda clip: -_activation(r.model_copy(update=clip)))


def _fit(
    r: Recipe,
    changes: dict[str, Any],
    savers: Sequence[dict[str, Any]],
    ranks: int,
    gpu: GpuModel,
) -> dict[str, Any] | None:
    """Return `changes` with the fewest savers that make the recipe fit, or None if none do."""
    # With smaller clips there is a choice, so leave a margin for the error of the plan.
    margin = COMFORTABLE if {"num_frames", "height"} & changes.keys() else USABLE

    def joined(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {**changes, **{key: saver[key] for saver in chosen for key in saver}}

    def fits(chosen: Sequence[dict[str, Any]]) -> bool:
        changed = r.model_copy(update=joined(chosen))
        total_gb = plan(changed, ranks, gpu).total_gb
        return _is_valid(changed, ranks) and total_gb <= gpu.memory_gb * margin

    used: list[dict[str, Any]] = []
    for saver in savers:
        if not fits(used) and _saves(r.model_copy(update=joined(used)), saver, ranks, gpu):
            used.append(saver)
    for saver in tuple(used):
        fewer = [other for other in used if other is not saver]
        if fits(fewer):
            used = fewer
    return joined(used) if fits(used) else None


def _saves(r: Recipe, change: dict[str, Any], ranks: int, gpu: GpuModel | None = None) -> bool:
    """True if a change is valid and saves GPU memory."""
    less = r.model_copy(update=change)
    before, after = (plan(one, ranks, gpu).total_gb for one in (r, less))
    return after < before and _is_valid(less, ranks)


def _is_valid(r: Recipe, ranks: int) -> bool:
    from cosmos_cli.recipe import rules

    # The plan is for `ranks` processes, whatever the recipe says.
    asked = r.model_copy(update={"num_processes": "auto"})
    if ranks % r.sequence_parallel or (r.offload == "weights" and ranks > 1):
        return False
    return not any(rules.conflicts(asked))


# --- memory ---------------------------------------------------------------------------------------


def blocks_kept(r: Recipe, ranks: int, gpu: GpuModel | None) -> tuple[int, int]:
    """Return how many blocks keep their MLP's output, and how many keep all linear outputs.

    Both are 0 unless `activation_checkpointing` is `most`. They are 0 in fp8 too, because fp8
    products are not torch operators. The MLP comes first: of all linears, its last one saves the
    most computation per byte kept.
    """
    blocks = r.spec.dit.blocks
    if r.activation_checkpointing != "most" or r.transformer_engine != "off":
        return 0, 0
    if gpu is None:
        return blocks, blocks
    parts = _memory(r.model_copy(update={"activation_checkpointing": "attention"}), ranks, gpu)
    held = sum(size for part, size in parts.items() if part not in OFFLOADED[r.offload])
    left = (gpu.memory_gb * 1e9 * COMFORTABLE - held) / _activation(r)
    if r.lora_rank:
        # With a LoRA, keeping the MLP's output saves nothing unless all other linear outputs are
        # kept too.
        whole = max(0, min(blocks, int(left / LINEARS_KEPT)))
        return whole, whole
    mlps = max(0, min(blocks, int(left)))
    return mlps, min(mlps, int((left - mlps) / (LINEARS_KEPT - 1)))


def _memory(r: Recipe, ranks: int, gpu: GpuModel | None) -> dict[str, float]:
    """Return the bytes per GPU at the peak, by part."""
    whole, trained, stage = r.spec.dit.parameters, r.trained_parameters, r.zero_stage
    element_size = 2 if r.precision == "bf16" else 4
    frozen = whole if r.lora_rank else 0
    held = float((whole if not r.lora_rank else frozen + trained) * element_size)
    # fp32 master weights if the weights have 16 bits, and two moments.
    optimizer = trained * (12 if element_size == 2 else 8)
    gradients = trained * element_size
    activation = _activation(r)
    blocks = r.spec.dit.blocks
    kept: float = blocks * {"none": BLOCK_KEPT, "all": 1}.get(r.activation_checkpointing, 2)
    mlps, whole_blocks = blocks_kept(r, ranks, gpu)
    kept += mlps + whole_blocks * (LINEARS_KEPT - 1)
    work: float = LORA_BLOCK_WORK if r.lora_rank else BLOCK_WORK
    work += FP8_WORK if r.transformer_engine != "off" else 0
    work += EXCHANGED if r.sequence_parallel > 1 else 0
    # The fp32 gradients of the optimizer step are left out: the activations are free by then.
    buffers = float(min(REDUCE_BUCKET, trained) * element_size)
    if stage == 3 and ranks > 1:
        # The gathered weights of the current block, of the next one, and a part of a third.
        buffers += 3 * whole / blocks * element_size
        if node := second_copy(r, ranks):
            buffers += held / node
    resident = streamed_parts(r, gpu)
    if resident.streamed:
        held -= blocks * r.spec.dit.block_parameters * element_size
        held += residence.block_weights(r.spec.dit, element_size, resident.streamed)
    if resident.stored:
        kept -= resident.stored * kept / blocks - residence.IN_TRANSIT
    return {
        "weights": held / (ranks if stage == 3 else 1),
        "optimizer": optimizer / ranks,
        "gradients": gradients / (ranks if stage >= 2 else 1),
        "EMA": trained * 4 / (ranks if stage == 3 else 1),
        "activations": activation * (kept + work),
        "buffers": buffers,
    }


def streamed_parts(r: Recipe, gpu: GpuModel | None) -> Residence:
    """Return what a training with `offload: weights` streams on a GPU; all of it if unknown."""
    blocks = r.spec.dit.blocks
    if r.offload != "weights":
        return Residence()
    if gpu is None:
        return Residence(blocks, blocks)
    resident = r.model_copy(update={"offload": "none"})
    parts = _memory(resident, 1, gpu)
    element_size = 2 if r.precision == "bf16" else 4
    in_blocks = blocks * r.spec.dit.block_parameters * element_size
    stored = _activation(r) * blocks * (1 if r.activation_checkpointing == "all" else 2)
    room = gpu.memory_gb * 1e9 * COMFORTABLE - (sum(parts.values()) - in_blocks - stored)
    return residence.of_training(r, _activation(r), room)


def _streamed_bytes(r: Recipe, parts: Residence) -> float:
    """Return the pinned CPU memory of streamed weights and stored activations."""
    element_size = 2 if r.precision == "bf16" else 4
    weights = residence.pinned_bytes(r.spec.dit.block_parameters * element_size)
    per_block = 1 if r.activation_checkpointing == "all" else 2
    return float(
        parts.streamed * weights + parts.stored * per_block * residence.pinned_bytes(_activation(r))
    )


def _copied_bytes(r: Recipe, parts: Residence) -> float:
    """Return the bytes that a micro step copies from or to CPU memory, in both directions.

    Weights are read twice, for the forward and the backward pass. Activations go out and back.
    """
    element_size = 2 if r.precision == "bf16" else 4
    per_block = 1 if r.activation_checkpointing == "all" else 2
    weights = parts.streamed * r.spec.dit.block_parameters * element_size
    return 2.0 * (weights + parts.stored * per_block * _activation(r))


def forward_bytes(r: Recipe, ranks: int) -> float:
    """Return an upper bound of the bytes that a forward pass without gradients adds to training.

    It needs less than the backward pass of one block, so it fits wherever training does.
    """
    weights = r.spec.dit.parameters * (2 if r.precision == "bf16" else 4)
    gathered = 3 * weights / r.spec.dit.blocks if r.zero_stage == 3 and ranks > 1 else 0
    return BLOCK_WORK * _activation(r) + gathered


def second_copy(r: Recipe, ranks: int, node: int = NODE) -> int:
    """Return over how many GPUs ZeRO++ hpZ shards a second copy of the weights, 0 without it."""
    shared_by = node if r.hpz_partition_size == "auto" else r.hpz_partition_size
    return shared_by if r.zero_stage == 3 and 1 < shared_by < ranks else 0


def _activation(r: Recipe) -> float:
    """Return the bytes of one activation (tokens x width) of a micro batch on one GPU."""
    clip = r.spec.tokens(r.num_frames, r.height, r.width) / r.sequence_parallel
    tokens = clip * r.micro_batch_size
    return tokens * r.spec.dit.width * (2 if r.precision == "bf16" else 4)


# --- time -----------------------------------------------------------------------------------------


def forward_flops(r: Recipe) -> tuple[float, float]:
    """Return the FLOPs of one clip's forward pass in linear layers and in attention."""
    dit, text = r.spec.dit, r.spec.text.tokens
    tokens, d = r.spec.tokens(r.num_frames, r.height, r.width), dit.width
    per_token = 2 * (4 + 2 + 2 * dit.mlp_ratio) * d * d
    linear = dit.blocks * (tokens * per_token + 4 * text * d * dit.text_channels)
    attention = dit.blocks * 4 * tokens * (tokens + text) * d
    return float(linear), float(attention)


def model_tflop(r: Recipe) -> float:
    """Return the TFLOP of a training step without recomputation: forward plus backward, 1 + 2."""
    return 3 * sum(forward_flops(r)) * r.global_batch_size / 1e12


def step_seconds(r: Recipe, ranks: int, gpu: GpuModel) -> float:
    """Return the seconds of an optimizer step, which overlaps traffic with arithmetic."""
    shared = r.sequence_parallel
    linear, attention = (flops / shared for flops in forward_flops(r))
    recompute = float(r.activation_checkpointing != "none")
    mlps, whole_blocks = (n / r.spec.dit.blocks for n in blocks_kept(r, ranks, gpu))
    without_last = mlps
    if r.lora_rank and r.transformer_engine == "off":
        # Only the gradient of a gate needs the last linear's output.
        without_last = recompute
    recomputed_linears = recompute - whole_blocks - (without_last - whole_blocks) * LAST_LINEAR
    # Forward, input gradients and weight gradients. A LoRA has no gradients of these weights.
    linear_passes = (3 if not r.lora_rank else 2) + recomputed_linears
    peak = gpu.tflops * 1e12
    rate = LINEAR if r.transformer_engine == "off" else FP8_LINEAR
    arithmetic = linear * linear_passes / (rate * peak)
    arithmetic += attention * (1 + (r.activation_checkpointing == "all")) / (ATTENTION * peak)
    arithmetic += attention * 2.5 / (ATTENTION_BACKWARD * peak)
    passes = r.spec.dit.blocks * ELEMENTWISE_PASSES * (3 + recompute)
    activation = _activation(r) / r.micro_batch_size
    arithmetic += passes * activation / (gpu.memory_rate * 1e9)
    # All-to-all of the queries, keys, values and output of every self-attention.
    exchanged = r.spec.dit.blocks * 4 * (2 + recompute) * activation * (shared - 1) / shared
    arithmetic += exchanged / (gpu.link_rate * 1e9)
    traffic = traffic_seconds(r, ranks, gpu)
    micro_steps = math.ceil(r.global_batch_size * shared / (ranks * r.micro_batch_size))
    held = _memory(r, ranks, gpu)
    host = sum(held[part] for part in OFFLOADED[r.offload]) / (HOST_RATE * 1e9)
    streamed = _copied_bytes(r, streamed_parts(r, gpu)) / (PCIE_RATES[gpu.pcie] * 1e9)
    return micro_steps * max(arithmetic * r.micro_batch_size, traffic, streamed) + host


def traffic_seconds(r: Recipe, ranks: int, gpu: GpuModel) -> float:
    """Return the seconds to gather weights and reduce gradients in a micro step, not overlapped."""
    element_size = 2 if r.precision == "bf16" else 4
    whole, gradients = r.spec.dit.parameters * element_size, r.trained_parameters * element_size
    across = gpu.link_rate if ranks <= NODE else min(gpu.link_rate, NODE_RATE)
    # Weights are gathered for the forward pass and again for the backward pass, there within a node
    # if hpZ is on. Below stage 3, the updated weights are gathered once.
    near = gpu.link_rate if second_copy(r, ranks) else across
    gathers = whole * (1 / across + 1 / near) if r.zero_stage == 3 else gradients / across
    return (gathers + gradients / across) * (ranks - 1) / ranks / 1e9


# --- disk -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """The predicted disk space of a run, in bytes and in numbers of files that exist at once."""

    models: int
    model_bytes: float
    states: int
    state_bytes: float

    @property
    def run_bytes(self) -> float:
        """Bytes of the whole run."""
        return self.models * self.model_bytes + self.states * self.state_bytes

    @property
    def save_bytes(self) -> float:
        """Bytes of one save."""
        return self.model_bytes + self.state_bytes


def disk(r: Recipe, start: int) -> Disk:
    """Return the disk space that a run needs from step `start` to its end."""
    saves = max(-(-(r.max_steps - start) // r.save_every_steps), 1)
    # The new state is complete before the oldest one is deleted.
    states = min(saves, r.keep_last + 1)
    if r.keep_every_steps:
        states = min(saves, states + (r.max_steps - start) // r.keep_every_steps)
    # The best save is kept too, and the new one is complete before an older one is deleted.
    models = min(saves, max(r.keep_models + 1, states) + 1) if r.keep_models else saves
    # Model files: one in the recipe's precision, one in fp32. Resume state: fp32 master weights and
    # two moments.
    element_size = 2 if r.precision == "bf16" else 4
    weights = r.trained_parameters
    return Disk(models, weights * (element_size + 4), states, weights * 12)


# --- words ----------------------------------------------------------------------------------------


def describe(r: Recipe, ranks: int, gpu: GpuModel | None) -> str:
    """Return the plan as text."""
    found, space = plan(r, ranks, gpu), disk(r, 0)
    rows = [(part, _gb(size)) for part, size in found.memory_gb.items()]
    if gpu is None or found.available_gb is None:
        rows.append(("total", _gb(found.total_gb)))
    else:
        total, usable = _apart(found.total_gb, found.available_gb)
        verdict = "fits" if found.fits else "does not fit"
        if gpu.memory_gb * COMFORTABLE < found.total_gb and found.fits:
            verdict = "fits, with less than 5 % of the memory to spare"
        rows.append(("total", f"{total}: {verdict}"))
        whole = f"{gpu.memory_gb:.1f} GB ({gpu.memory_gb * 1e9 / 2**30:.1f} GiB)"
        rows.append(("usable", f"{usable} of the GPU's {whole}"))
    rows.append(("CPU memory", f"{_gb(found.cpu_gb)} for all processes together, an estimate"))
    rows.append(("disk of the run", _gb(space.run_bytes / 1e9)))
    saves = f"{space.models} x {_gb(space.model_bytes / 1e9)} of model files"
    states = f"{space.states} x {_gb(space.state_bytes / 1e9)} of resume states"
    rows.append(("", f"{saves}, {states}"))
    if gpu is None or found.step_seconds is None:
        rows.append(("time", "not predicted without a GPU: add `--gpus 1xH100-80GB`"))
        rows.append(("", f"known: {', '.join(known.name for known in GPUS[:6])},"))
        rows.append(("", ", ".join(known.name for known in GPUS[6:])))
    else:
        share = model_tflop(r) / (found.step_seconds * ranks * gpu.tflops)
        rows.append(("step", f"{found.step_seconds:.1f} s predicted, {share:.0%} MFU"))
        rows.append(("run", f"{found.run_hours:.1f} h for {r.max_steps} steps"))
    count = "1 process" if ranks == 1 else f"{ranks} processes"
    name = f"{ranks} x {gpu.name}" if gpu else f"{count}, no GPU"
    lines = [console.table(rows, (name, ""))]
    if gpu and not found.fits:
        for words, less in remedies(r, ranks, gpu):
            assert less.step_seconds is not None
            figures = f"{_gb(less.total_gb)}, {_gb(less.cpu_gb)} of CPU memory"
            lines += ["", f"`{words}`", f"    fits: {figures}, {less.step_seconds:.1f} s a step"]
    return "\n".join(lines)


def _gb(size: float) -> str:
    """Return gigabytes as text, in a smaller unit below one."""
    return f"{size:.1f} GB" if size >= 1 else console.size(size * 1e9)


def _apart(size: float, limit: float) -> tuple[str, str]:
    """Return two sizes in GB with as many decimals as show which one is larger."""
    digits = next((n for n in (1, 2) if f"{size:.{n}f}" != f"{limit:.{n}f}"), 3)
    return f"{size:.{digits}f} GB", f"{limit:.{digits}f} GB"


def check_memory(r: Recipe, ranks: int, gpu: GpuModel | None) -> dict[str, Any]:
    """Return the plan as figures.

    Raises:
        UserError: the memory is not enough. The fix names the changes that help, and the plan is
            printed before.
    """
    found = plan(r, ranks, gpu)
    figures = {"processes": ranks, "gpu": gpu and gpu.name, "fits": found.fits, **asdict(found)}
    if gpu and found.available_gb is not None and not found.fits:
        console.say(describe(r, ranks, gpu))
        ways = remedies(r, ranks, gpu)
        needed, usable = _apart(found.total_gb, found.available_gb)
        error = UserError(
            f"needs {needed} on each of {ranks} x {gpu.name}, {usable} are usable",
            code=ExitCode.GPU_MEMORY, where=r.name,
            fix=f"add `{ways[0][0]}`" if ways else "use more or larger GPUs",
        )  # fmt: skip
        error.figures = figures
        raise error
    return figures
