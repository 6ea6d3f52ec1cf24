"""The DeepSpeed engine for the loss module: its configuration, weights and optimizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from cosmos_cli import console
from cosmos_cli.errors import environment_error, usage_error
from cosmos_cli.model import cond_frames, edm, fp8, kernels, lora, streaming, weights
from cosmos_cli.model.device import free_gpu_bytes, why_not_compiled
from cosmos_cli.model.dit import DiT
from cosmos_cli.recipe import gpu_models, plan
from cosmos_cli.recipe.residence import Residence
from cosmos_cli.train import checkpoint, data

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


def build(r: Recipe, share: data.Share, device: torch.device) -> Any:
    """Return the DeepSpeed engine of the loss module, with the base weights loaded."""
    import deepspeed

    config = deepspeed_config(r, share, device)
    streamed = parts_to_stream(r, device)
    on_cpu = streamed.streamed_blocks(r.spec.dit.blocks)
    if r.zero_stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=config):
            module = empty_module(r)
    else:
        # On the meta device nothing is initialised: all weights come from files.
        with torch.device("meta"):
            module = empty_module(r)
        dtype = torch.bfloat16 if r.precision == "bf16" else torch.float32
        streaming.allocate(module.to(dtype), module.net.blocks, on_cpu, device)
        module.logvar.reset()
    net = module.net
    net.activation_checkpointing = r.activation_checkpointing
    net.mlps_kept, net.blocks_kept = plan.blocks_kept(r, dist.get_world_size(), gpu_model(device))
    fused = r.compile == "on" or (r.compile == "auto" and device.type != "cpu")
    if fused and (reason := why_not_compiled(device)):
        console.warn(f"nothing is compiled here, so training takes a sixth longer: {reason}")
        fused = False
    kernels.fuse(fused)
    if r.transformer_engine != "off":
        fp8.train_in_fp8(net.blocks)
    if r.transformer_engine == "all":
        fp8.use_engine_attention(net.blocks)
    kernels.put_cudnn_first()
    base = r.model_files.dit
    shapes = {name: checkpoint.full_shape(p) for name, p in module.named_parameters()}
    state = load_base(r, base)
    state |= lora.fresh_factors(shapes, r.seed)
    checkpoint.load_weights(module, state, base)
    if on_cpu:
        net.weights = streaming.WeightStream(net.blocks, on_cpu, device)
        if net.weights.pageable:
            console.warn(streaming.PAGEABLE)
    if streamed.stored:
        net.activations = streaming.ActivationStream(streamed.stored, device)
    optimizer = build_optimizer(r, list(checkpoint.trained(module).values()), device)
    kind = type(optimizer)
    console.say(f"optimizer: {kind.__name__} from {kind.__module__.partition('.')[0]}")
    engine, *_ = deepspeed.initialize(model=module, config=config, optimizer=optimizer)
    return engine


def load_base(r: Recipe, base: Path) -> dict[str, torch.Tensor]:
    """Return the base weights; those of a Text2World model become a start for Video2World.

    Raises:
        UserError: a file is missing or damaged, or a LoRA cannot train what the base lacks.
    """
    state = weights.load_dit_state(base)
    remark = cond_frames.add_mask_columns(state, r.spec.dit)
    if remark and r.lora_rank:
        what = (
            f"{remark}; a LoRA does not train them, so the network would never learn which frames "
            "are given"
        )
        fix = f"use `--set lora_rank=0`, or `--set base=null` for the weights of {r.model}"
        raise usage_error(base, what, fix)
    if remark:
        console.say(remark)
    return state


def parts_to_stream(r: Recipe, device: torch.device) -> Residence:
    """Return what `offload: weights` streams, given the free memory of the GPU.

    Raises:
        UserError: (GPU_MEMORY) the GPU cannot even hold what is never streamed.
    """
    if r.offload != "weights":
        return Residence()
    gpu = None
    if device.type == "cuda":
        # Only the memory of this entry matters here.
        gpu = gpu_models.GpuModel("GPU", free_gpu_bytes(device) / 1e9, 1, 1, 1)
        from cosmos_cli.recipe import advice

        advice.require_fit(r, gpu)
    parts, blocks = plan.streamed_parts(r, gpu), r.spec.dit.blocks
    console.say(
        f"streamed from CPU memory: the weights of {parts.streamed} of {blocks} blocks, "
        f"the stored activations of {parts.stored}"
    )
    return parts


def empty_module(r: Recipe) -> edm.EDMLoss:
    """Return the loss module, with LoRA factors if the recipe trains a LoRA; loads no weights."""
    net = DiT(r.spec.dit)
    module = edm.EDMLoss(net, r.spec)
    if r.lora_rank:
        lora.attach(module, net.blocks, r.lora_rank, r.lora_scale, r.lora_targets)
    return module


def deepspeed_config(r: Recipe, share: data.Share, device: torch.device) -> dict[str, Any]:
    """Return the recipe as a DeepSpeed configuration."""
    zero = {
        # With stage 0, DeepSpeed's Adam starts a step late in bf16 and reports no gradient norm in
        # fp32. Stage 1 computes the same in less memory.
        "stage": max(r.zero_stage, 1),
        "contiguous_gradients": True,
        "reduce_bucket_size": plan.REDUCE_BUCKET,
        "sub_group_size": plan.STEP_GROUP,
    }
    cpu_memory = {"device": "cpu", "pin_memory": device.type == "cuda"}
    if r.offload in ("optimizer", "parameters"):
        zero["offload_optimizer"] = cpu_memory
    if r.offload == "parameters":
        zero["offload_param"] = cpu_memory
    world = int(os.environ["WORLD_SIZE"])
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if second := plan.second_copy(r, world, node):
        zero["zero_hpz_partition_size"] = second
    return {
        "train_micro_batch_size_per_gpu": r.micro_batch_size,
        "gradient_accumulation_steps": share.count // share.micro,
        "gradient_clipping": r.grad_clip,
        "steps_per_print": 10**9,
        "bf16": {"enabled": r.precision == "bf16"},
        "zero_optimization": zero,
        # PyTorch's fused AdamW is as fast on a CPU as DeepSpeed's, which needs a compiler.
        "zero_force_ds_cpu_optimizer": False,
    }


def build_optimizer(r: Recipe, parameters: list[torch.nn.Parameter], device: torch.device) -> Any:
    """Return the AdamW that the recipe names: of PyTorch (torch or auto), DeepSpeed or Apex.

    Raises:
        UserError: DeepSpeed's AdamW cannot be compiled here.
    """
    settings = {"lr": r.learning_rate, **optimizer_settings(r)}
    if r.optimizer == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(parameters, adam_w_mode=True, **settings)
    if r.optimizer == "deepspeed":
        from deepspeed.ops import adam

        on_cpu = device.type == "cpu" or r.offload in ("optimizer", "parameters")
        try:
            if on_cpu:
                return adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
            return adam.FusedAdam(parameters, adam_w_mode=True, **settings)
        # DeepSpeed's builders raise errors of any type: a compiler's, a missing path, a wrong
        # TORCH_CUDA_ARCH_LIST.
        except Exception as error:
            reason = str(error.__cause__ or error).strip().rpartition("\n")[2].rstrip(".")
            what = f"DeepSpeed cannot compile its AdamW here: {reason}"
            fix = "install a compiler (g++, and nvcc for a GPU) or add `--set optimizer=torch`"
            raise environment_error("optimizer", what, fix) from error
    return torch.optim.AdamW(parameters, fused=True, **settings)


def optimizer_settings(r: Recipe) -> dict[str, Any]:
    """Return the arguments of AdamW from the recipe, without the learning rate."""
    return {
        "betas": (r.beta1, r.beta2), "eps": r.adam_eps, "weight_decay": r.weight_decay
    }  # fmt: skip


def gpu_model(device: torch.device) -> gpu_models.GpuModel | None:
    """Return the planner's entry for this GPU, or None if it has none."""
    name = "" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return gpu_models.find_gpu(name)
