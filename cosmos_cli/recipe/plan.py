"""Predict memory, time and disk of a run from the shapes of the model. No torch.

Memory is the peak of PyTorch's allocated memory per GPU. Times are the floating-point operations
divided by the rates that kernels reach with this model's shapes, plus the element-wise work of
plain PyTorch. Bytes are decimal (1 GB = 10^9). A multiply-add counts as two operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosmos_cli.recipe import residence
from cosmos_cli.recipe.gpu_models import PCIE_RATES, GpuModel
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
# What an exchange costs in addition to the link, in GB/s of one process's activation: waiting for
# the slowest process, and reordering. Fitted to 4.12 s a step on four H200 that share a clip.
EXCHANGE_RATE = 60
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
# GB/s at which each GPU's offloaded state is updated and transferred, about the rate of PCIe.
HOST_RATE = 20


@dataclass(frozen=True)
class Plan:
    """The predicted needs of a run. Times are None if the GPU is not known.

    `host_gb` is the offloaded state in CPU memory, `cpu_gb` an estimate of all CPU memory that the
    run cannot do without, `staged_gb` the copy of a save. Without that memory, training waits while
    a save is written. All three are of all processes together.
    """

    memory_gb: dict[str, float]
    total_gb: float
    available_gb: float | None
    host_gb: float
    cpu_gb: float
    staged_gb: float
    step_seconds: float | None
    run_hours: float | None
    disk_gb: dict[str, float]

    @property
    def fits(self) -> bool:
        """True if the memory is enough, or if the GPU is not known."""
        return self.available_gb is None or self.total_gb <= self.available_gb


def plan(r: Recipe, ranks: int, gpu: GpuModel | None) -> Plan:
    """Return the memory, time and disk that the recipe needs on `ranks` GPUs."""
    memory = {part: size / 1e9 for part, size in _memory(r, ranks, gpu).items()}
    host = ranks * sum(memory.pop(part) for part in OFFLOADED[r.offload])
    host += _streamed_bytes(r, streamed_parts(r, gpu)) / 1e9
    seconds = None if gpu is None else step_seconds(r, ranks, gpu)
    # A save gathers the weights and the EMA. The base weights are read from a mapped file.
    whole = r.trained_parameters * (r.element_size + 4)
    space = disk(r, 0)
    return Plan(
        memory_gb=memory,
        total_gb=sum(memory.values()),
        available_gb=None if gpu is None else gpu.memory_gb * USABLE,
        host_gb=host,
        cpu_gb=host + (ranks * PROCESS_BYTES + whole) / 1e9,
        staged_gb=sum(staged_bytes(r, ranks, rank) for rank in range(ranks)) / 1e9,
        step_seconds=seconds,
        run_hours=None if seconds is None else seconds * r.max_steps / 3600,
        disk_gb={
            "model files of a save": space.model_bytes / 1e9,
            "a resume state": space.state_bytes / 1e9,
            "whole run": space.run_bytes / 1e9,
        },
    )


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
    left = (gpu.memory_gb * 1e9 * COMFORTABLE - held) / activation_bytes(r)
    if r.lora_rank:
        # With a LoRA, keeping the MLP's output saves nothing unless all other linear outputs are
        # kept too.
        whole = max(0, min(blocks, int(left / LINEARS_KEPT)))
        return whole, whole
    mlps = max(0, min(blocks, int(left)))
    return mlps, max(0, min(mlps, int((left - mlps) / (LINEARS_KEPT - 1))))


def _memory(r: Recipe, ranks: int, gpu: GpuModel | None) -> dict[str, float]:
    """Return the bytes per GPU at the peak, by part."""
    whole, trained, stage = r.spec.dit.parameters, r.trained_parameters, r.zero_stage
    frozen = whole if r.lora_rank else 0
    held = float((whole if not r.lora_rank else frozen + trained) * r.element_size)
    # fp32 master weights if the weights have 16 bits, and two moments.
    optimizer = trained * (12 if r.element_size == 2 else 8)
    gradients = trained * r.element_size
    activation = activation_bytes(r)
    blocks = r.spec.dit.blocks
    kept: float = blocks * {"none": BLOCK_KEPT, "all": 1}.get(r.activation_checkpointing, 2)
    mlps, whole_blocks = blocks_kept(r, ranks, gpu)
    kept += mlps + whole_blocks * (LINEARS_KEPT - 1)
    work: float = LORA_BLOCK_WORK if r.lora_rank else BLOCK_WORK
    work += FP8_WORK if r.transformer_engine != "off" else 0
    work += EXCHANGED if r.sequence_parallel > 1 else 0
    # The fp32 gradients of the optimizer step are left out: the activations are free by then.
    buffers = float(min(REDUCE_BUCKET, trained) * r.element_size)
    if stage == 3 and ranks > 1:
        # The gathered weights of the current block, of the next one, and a part of a third.
        buffers += 3 * whole / blocks * r.element_size
        if node := second_copy(r, ranks):
            buffers += held / node
    resident = streamed_parts(r, gpu)
    if resident.streamed:
        held -= blocks * r.spec.dit.block_parameters * r.element_size
        held += residence.block_weights(r.spec.dit, r.element_size, resident.streamed)
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
    in_blocks = blocks * r.spec.dit.block_parameters * r.element_size
    stored = activation_bytes(r) * blocks * (1 if r.activation_checkpointing == "all" else 2)
    room = gpu.memory_gb * 1e9 * COMFORTABLE - (sum(parts.values()) - in_blocks - stored)
    return residence.of_training(r, activation_bytes(r), room)


def _streamed_bytes(r: Recipe, parts: Residence) -> float:
    """Return the pinned CPU memory of streamed weights and stored activations."""
    weights = residence.pinned_bytes(r.spec.dit.block_parameters * r.element_size)
    per_block = 1 if r.activation_checkpointing == "all" else 2
    return float(
        parts.streamed * weights
        + parts.stored * per_block * residence.pinned_bytes(activation_bytes(r))
    )


def _copied_bytes(r: Recipe, parts: Residence) -> float:
    """Return the bytes that a micro step copies from or to CPU memory, in both directions.

    Weights are read twice, for the forward and the backward pass. Activations go out and back.
    """
    per_block = 1 if r.activation_checkpointing == "all" else 2
    weights = parts.streamed * r.spec.dit.block_parameters * r.element_size
    return 2.0 * (weights + parts.stored * per_block * activation_bytes(r))


def forward_bytes(r: Recipe, ranks: int) -> float:
    """Return an upper bound of the bytes that a forward pass without gradients adds to training.

    It needs less than the backward pass of one block, so it fits wherever training does.
    """
    weights = r.spec.dit.parameters * r.element_size
    gathered = 3 * weights / r.spec.dit.blocks if r.zero_stage == 3 and ranks > 1 else 0
    return BLOCK_WORK * activation_bytes(r) + gathered


def staged_bytes(r: Recipe, ranks: int, rank: int) -> float:
    """Return the CPU memory for the copy of a save that a rank writes in the background."""
    if r.saves == "blocking":
        return 0
    weights = r.trained_parameters
    # Master weights and two moments.
    size = 12 * weights / ranks
    if rank == 0:
        # The model file, and below stage 3 the weights in DeepSpeed's state.
        size += weights * r.element_size * (1 if r.zero_stage == 3 else 2)
    if rank == 1 % ranks:
        size += 4 * weights
    # Parts are padded to whole elements per rank and aligned.
    return 1.01 * size + 2e6


def second_copy(r: Recipe, ranks: int, node: int = NODE) -> int:
    """Return over how many GPUs ZeRO++ hpZ shards a second copy of the weights, 0 without it."""
    shared_by = node if r.hpz_partition_size == "auto" else r.hpz_partition_size
    return shared_by if r.zero_stage == 3 and 1 < shared_by < ranks else 0


def activation_bytes(r: Recipe) -> float:
    """Return the bytes of one activation (tokens x width) of a micro batch on one GPU."""
    tokens = r.tokens / r.sequence_parallel * r.micro_batch_size
    return tokens * r.spec.dit.width * r.element_size


# --- time -----------------------------------------------------------------------------------------


def forward_flops(r: Recipe) -> tuple[float, float]:
    """Return the FLOPs of one clip's forward pass in linear layers and in attention."""
    dit, text = r.spec.dit, r.spec.text.tokens
    tokens, d = r.tokens, dit.width
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
    activation = activation_bytes(r) / r.micro_batch_size
    arithmetic += passes * activation / (gpu.memory_rate * 1e9)
    # All-to-all of the queries, keys, values and output of every self-attention.
    if shared > 1:
        exchanged = r.spec.dit.blocks * 4 * (2 + recompute) * activation
        link = gpu.link_rate * shared / (shared - 1)
        arithmetic += exchanged * (1 / link + 1 / EXCHANGE_RATE) / 1e9
    traffic = traffic_seconds(r, ranks, gpu)
    micro_steps = math.ceil(r.global_batch_size * shared / (ranks * r.micro_batch_size))
    held = _memory(r, ranks, gpu)
    host = sum(held[part] for part in OFFLOADED[r.offload]) / (HOST_RATE * 1e9)
    streamed = _copied_bytes(r, streamed_parts(r, gpu)) / (PCIE_RATES[gpu.pcie] * 1e9)
    return micro_steps * max(arithmetic * r.micro_batch_size, traffic, streamed) + host


def video_seconds(r: Recipe, gpu: GpuModel) -> float:
    """Return the seconds of sampling one video on one GPU, without compilation.

    An H200 takes 3.61 s for a pass at 121 frames of 704x1280; the plan says 3.5 s.
    """
    linear, attention = forward_flops(r)
    arithmetic = (linear / LINEAR + attention / ATTENTION) / (gpu.tflops * 1e12)
    activation = 2 * r.tokens * r.spec.dit.width
    moved = r.spec.dit.blocks * ELEMENTWISE_PASSES * activation / (gpu.memory_rate * 1e9)
    return r.passes * (arithmetic + moved)


def traffic_seconds(r: Recipe, ranks: int, gpu: GpuModel) -> float:
    """Return the seconds to gather weights and reduce gradients in a micro step, not overlapped."""
    whole, gradients = r.spec.dit.parameters * r.element_size, r.trained_parameters * r.element_size
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


def disk(r: Recipe, start: int, replaced: int = 0) -> Disk:
    """Return the disk space that a run needs from step `start` to its end.

    `replaced` is the number of its resume states that the next saves delete.
    """
    every = r.save_every_steps
    saves = max((r.max_steps - 1) // every - start // every + 1, 1)
    # Only saves at a multiple of both are kept for good.
    kept = math.lcm(r.keep_every_steps, every)
    kept = r.max_steps // kept - start // kept if kept else 0
    # The new state is complete before the oldest one is deleted.
    states = min(saves, max(r.keep_last + 1 - replaced, 1) + kept)
    # The best save is kept too, and the new one is complete before an older one is deleted.
    newest = max(r.keep_models, r.keep_last) + 1
    models = min(saves, newest + kept + 1) if r.keep_models else saves
    # Model files: one in the recipe's precision, one in fp32. Resume state: fp32 master weights and
    # two moments.
    weights = r.trained_parameters
    return Disk(models, weights * (r.element_size + 4), states, weights * 12)
