"""List every private name of another package, every run-time patch and every environment switch.

Any release of these packages may rename them. Each entry says why it is used and which test fails
when it goes. A name "module:word" is an attribute that only the source of the module shows.
`tests/model/test_private_names.py` looks all of them up in the installed versions.
"""

from __future__ import annotations

from typing import NamedTuple


class PrivateName(NamedTuple):
    """A name that another package does not document, the module of ours that uses it, and why."""

    name: str
    used_in: str
    reason: str
    test: str


_FOUND = "test_a_private_name_still_exists"
_DISPATCH = "the operators of attention, whose outputs selective checkpointing stores"
_STORED = "test_storing_attention_recomputes_only_cross_attention"
_SHARD = "a ZeRO-3 parameter has its shard and its full size in attributes of these names"
_SHARDED = "test_a_run_goes_on_with_other_numbers_of_processes"
_RESHARD = "loads optimizer state that another number of ranks saved, without a second copy of it"
_SPACES = "torch reads these files with weights_only, which must be told the classes in them"
_STAGE_3 = "deepspeed.runtime.zero.stage3"
_STAGE_2 = "deepspeed.runtime.zero.stage_1_and_2"
_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_SDP = "torch.ops.aten._scaled_dot_product"

NAMES = (
    # torch
    *(
        PrivateName(f"{_SDP}_{backend}", "model.checkpointing", _DISPATCH, _STORED)
        for backend in (
            *("cudnn_attention", "flash_attention", "efficient_attention"),
            "flash_attention_for_cpu",
        )
    ),
    *(
        PrivateName(
            f"torch._C._{verb}_sdp_priority_order",
            "model.kernels",
            "puts cuDNN attention first again, after a library has set another order",
            _FOUND,
        )
        for verb in ("get", "set")
    ),
    PrivateName(
        "torch._fused_sdp_choice",
        "model.kernels",
        "tells which attention backend a run uses; torch has no public name for it",
        "test_the_attention_backend_is_reported",
    ),
    PrivateName(
        "torch._addmm_activation",
        "model.kernels",
        "computes a linear and its ReLU in one kernel, which torch does not fuse by itself",
        "test_concatenated_captions_give_the_embeddings_of_transformers",
    ),
    PrivateName(
        "torch._inductor.list_options",
        "model.kernels",
        "the option triton.mix_order_reduction exists in some versions, and is wrong there",
        "test_compiled_element_wise_work_gives_the_same_loss_and_gradients",
    ),
    PrivateName(
        "torch._dynamo.exc.TorchDynamoException",
        "model.device",
        "the class of all errors of torch.compile, such as a missing compiler",
        "test_without_a_compiler_the_reason_is_returned",
    ),
    PrivateName(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "model.checkpointing",
        "stores outputs by operator; torch's own selective checkpointing fails under ZeRO-3",
        _STORED,
    ),
    PrivateName(
        "torch.utils._pytree.tree_map_only",
        "model.checkpointing",
        "detaches the tensors among the outputs of an operator",
        _STORED,
    ),
    *(
        PrivateName(
            f"torch.distributed.{name}",
            "train.watchdog",
            "counts the collectives that a rank has started, to name the rank that is behind",
            "test_a_rank_that_does_not_come_to_an_operation_is_named",
        )
        for name in (
            "distributed_c10d._world",
            "distributed_c10d._World.pg_map",
            "ProcessGroup._get_sequence_number_for_group",
        )
    ),
    # DeepSpeed
    *(
        PrivateName(f"{_PARTITION}:{name}", "train.checkpoint", _SHARD, _SHARDED)
        for name in ("ds_tensor", "ds_shape", "ds_numel", "ds_secondary_tensor")
    ),
    *(
        PrivateName(name, "train.reshard", _RESHARD, _SHARDED)
        for name in (
            f"{_PARTITION}:partition_numel",
            f"{_STAGE_3}:fp16_groups",
            "deepspeed.checkpoint.constants:fp32_flat_groups",
            f"{_STAGE_3}:checkpoint_event_prologue",
            f"{_STAGE_2}:single_partition_of_fp32_groups",
            f"{_STAGE_2}:update_lp_params",
            f"{_STAGE_2}:load_from_fp32_weights",
        )
    ),
    *(
        PrivateName(f"deepspeed.{name}", "train.reshard", _SPACES, _SHARDED)
        for name in (
            "runtime.fp16.loss_scaler:LossScaler",
            "runtime.zero.config:ZeroStageEnum",
            "utils.tensor_fragment:fragment_address",
        )
    ),
    PrivateName(
        "deepspeed.runtime.engine:checkpoint_engine",
        "train.checkpoint",
        "patch: its load and save are replaced, to run no code of a file and to sync each file",
        _SHARDED,
    ),
    *(
        PrivateName(
            "deepspeed.ops:__compatible_ops__",
            module,
            "patch: turns off DeepSpeed's shared-memory all-reduce, which needs a compiler",
            _FOUND,
        )
        for module in ("train.loop", "setup.probes")
    ),
    # transformers and peft
    *(
        PrivateName(
            f"transformers.models.t5.modeling_t5:{name}",
            "model.text",
            "our forward of T5 takes its layers, since transformers' pads every caption",
            "test_concatenated_captions_give_the_embeddings_of_transformers",
        )
        for name in ("SelfAttention", "DenseReluDense", "compute_bias", "final_layer_norm")
    ),
    PrivateName(
        "transformers.models.mistral.modeling_mistral:rotary_emb",
        "generate.upsampler",
        "built anew on a real device, because the released file has no rotary frequencies",
        "test_released_weights_give_the_logits_of_the_released_network",
    ),
    PrivateName(
        "peft.peft_model:missing adapter keys",
        "generate.guards.aegis",
        "the words of the warning with which peft only notes that the LoRA is incomplete",
        "test_a_model_that_is_not_whole_is_refused_with_the_remedy",
    ),
    # Transformer Engine
    *(
        PrivateName(
            f"transformer_engine.pytorch:{name}",
            "model.fp8",
            "patch: the weight of its layer is replaced by ours, the forward of ours by its own",
            "test_transformer_engine_uses_our_weights_at_any_zero_stage",
        )
        for name in ("Linear", "RMSNorm", "DotProductAttention", "autocast")
    ),
    # Apex
    PrivateName(
        "amp_C", "train.preflight", "tells NVIDIA's Apex from another package of that name", _FOUND
    ),
    # huggingface_hub
    PrivateName(
        "huggingface_hub.errors.HfHubHTTPError.__bases__",
        "download.hub",
        "its base class is that of all network errors, from httpx or httpx2",
        "test_without_a_network_whole_files_pass_and_damaged_ones_are_named",
    ),
    # Environment switches
    PrivateName(
        "torch.distributed.elastic.multiprocessing.api:TORCHELASTIC_SIGNALS_TO_HANDLE",
        "ranks",
        "switch: keeps torchrun from ending a run that nohup started",
        "test_a_closed_window_does_not_end_what_nohup_started",
    ),
    *(
        PrivateName(
            "deepspeed.accelerator.real_accelerator:DS_ACCELERATOR",
            module,
            "switch: without it, DeepSpeed guesses the accelerator and prints to stdout",
            _FOUND,
        )
        for module in ("gpus", "ranks")
    ),
)
