from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dit import (
    SMALL,
    Watch,
    _resize_without_torchvision,  # noqa: F401
    diffusers_twin,
    inputs,
    network,
    run_twin,
)
from torch import nn

from cosmos_cli.errors import UserError
from cosmos_cli.model import checkpoint, lora
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.spec import LORA_TARGETS, TINY


def adapted(targets, factors=True):
    """A network in a module as training holds it, its state before, and the factors of its LoRA."""
    module = nn.Module()
    module.net = network()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    lora.attach(module, module.net.blocks, 4, 0.5, targets)
    trained = checkpoint.trained(module)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.values() if factors else ():
            parameter.normal_(std=0.2, generator=generator)
    return module, state, {name: factor.detach() for name, factor in trained.items()}


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_only_the_factors_are_trained_and_as_many_as_the_spec_says(targets):
    with torch.device("meta"):
        module = DiT(TINY.dit)
        lora.attach(module, module.blocks, 4, 1.0, targets)
    trained = checkpoint.trained(module)
    assert all(".lora_" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == TINY.dit.lora_parameters(4, targets)


def test_fresh_factors_leave_the_model_as_it_was_and_do_not_depend_on_the_process():
    module, state, factors = adapted("all", factors=False)
    fresh = lora.fresh_factors({name: factor.shape for name, factor in factors.items()}, seed=0)
    module.load_state_dict({**state, **fresh})
    plain = network()
    assert torch.equal(module.net(**inputs()), plain(**inputs()))
    (a,) = (v for k, v in fresh.items() if k == "net.blocks.1.mlp.up.lora_A.weight")
    assert 0.9 / 8 < a.abs().max() <= 1 / 8
    again = lora.fresh_factors({"net.blocks.1.mlp.up.lora_A.weight": a.shape}, seed=0)
    assert torch.equal(again["net.blocks.1.mlp.up.lora_A.weight"], a)


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_diffusers_and_the_merged_model_compute_what_training_computed(targets, tmp_path):
    module, state, factors = adapted(targets)
    path = tmp_path / "iter_000000001_ema_lora.safetensors"
    lora.save(path, factors, 0.5)
    with torch.no_grad():
        expected = module.net(**inputs())
        before = network()(**inputs())
        twin = diffusers_twin(network(), tmp_path)
        twin.load_lora_adapter(tmp_path, weight_name=path.name)
        theirs = run_twin(twin, inputs())
        merged = DiT(SMALL)
        state = lora.merge(state, path, 1.0)
        merged.load_state_dict({k.removeprefix("net."): v for k, v in state.items()})
        ours = merged(**inputs())
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("mode", ["attention", "all"])
def test_the_last_linear_of_a_block_is_not_computed_again(mode):
    computed, gradients = {}, {}
    for checkpointing in ("none", mode):
        module, _, _ = adapted("attention")
        module.net.activation_checkpointing = checkpointing
        with Watch() as watch:
            module.net(**inputs()).square().mean().backward()
        computed[checkpointing] = Counter(watch.shapes(torch.ops.aten.mm.default))
        factors = checkpoint.trained(module).values()
        gradients[checkpointing] = torch.cat([factor.grad.flatten() for factor in factors])
    again = computed[mode] - computed["none"]
    up, down = (
        module.net.blocks[0].mlp.up.weight.T.shape,
        module.net.blocks[0].mlp.down.weight.T.shape,
    )
    assert again[up] == len(module.net.blocks)
    assert again[down] == 0
    assert torch.equal(*gradients.values())


def test_what_diffusers_saves_is_read(tmp_path):
    _, _, factors = adapted("all")
    lora.save(tmp_path / "ours.safetensors", factors, 0.5)
    twin = diffusers_twin(network(), tmp_path)
    twin.load_lora_adapter(tmp_path, weight_name="ours.safetensors", adapter_name="default")
    twin.save_lora_adapter(tmp_path / "theirs")
    state, scale = lora.load(tmp_path / "theirs" / "pytorch_lora_weights.safetensors")
    assert scale == 0.5
    assert state.keys() == factors.keys()
    assert all(torch.equal(state[name], factor) for name, factor in factors.items())


def test_strength_scales_the_change_and_each_weight_keeps_its_dtype(tmp_path):
    _, state, factors = adapted("attention")
    path = tmp_path / "lora.safetensors"
    lora.save(path, factors, 0.5)
    none, half, whole = (lora.merge(state, path, strength) for strength in (0.0, 0.5, 1.0))
    name = "net.blocks.0.self_attn.q.weight"
    assert torch.equal(none[name], state[name])
    torch.testing.assert_close(half[name] - state[name], (whole[name] - state[name]) / 2)
    assert torch.equal(whole["net.blocks.0.mlp.up.weight"], state["net.blocks.0.mlp.up.weight"])
    short = {key: value.bfloat16() for key, value in state.items()}
    assert lora.merge(short, path, 1.0)[name].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"), "no pair"),
        (
            lambda s: s.update(
                {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(3, 64)}
            ),
            "no pair",
        ),
        (lambda s: s.update({"transformer.proj.lora_A.weight": torch.ones(4, 64)}), "unknown"),
        (
            lambda s: s.update(
                {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 32)}
            ),
            "another shape",
        ),
        (
            lambda s: s.update({
                "transformer.transformer_blocks.9.attn1.to_q.lora_A.weight": torch.ones(4, 64),
                "transformer.transformer_blocks.9.attn1.to_q.lora_B.weight": torch.ones(64, 4),
            }),
            "unknown",
        ),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_fit_is_refused(change, words, tmp_path):
    _, state, factors = adapted("attention")
    path = tmp_path / "lora.safetensors"
    lora.save(path, factors, 1.0)
    stored = load_file(path)
    change(stored)
    save_file(stored, path)
    with pytest.raises(UserError, match=words):
        lora.merge(state, path, 1.0)


def test_a_file_that_is_no_lora_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="damaged"):
        lora.load(path)
