from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cosmos_cli.errors import UserError
from cosmos_cli.model import lora, lora_files
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.lora_files import Change
from cosmos_cli.spec import LORA_TARGETS, TINY, DiTSpec
from cosmos_cli.train import checkpoint
from tests.helpers.networks import SMALL, Watch, diffusers_twin, inputs, network, run_twin


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


def test_fresh_factors_change_nothing_and_are_equal_in_every_process():
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
    lora_files.save_lora(path, factors, 0.5)
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
        beside = network()
        lora.apply_files(beside, [(path, 1.0)])
        unmerged = beside(**inputs())
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(theirs, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(unmerged, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["attention", "all"])
def test_the_last_linear_of_a_block_is_not_recomputed(mode):
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


def test_a_lora_saved_by_diffusers_is_read(tmp_path):
    _, _, factors = adapted("all")
    lora_files.save_lora(tmp_path / "ours.safetensors", factors, 0.5)
    twin = diffusers_twin(network(), tmp_path)
    twin.load_lora_adapter(tmp_path, weight_name="ours.safetensors", adapter_name="default")
    twin.save_lora_adapter(tmp_path / "theirs")
    changes = lora_files.load_lora(tmp_path / "theirs" / "pytorch_lora_weights.safetensors")
    state = lora.factors(changes)
    assert {change.scale for change in changes.values()} == {0.5}
    assert state.keys() == factors.keys()
    assert all(torch.equal(state[name], factor) for name, factor in factors.items())


def test_strength_scales_the_change_and_each_weight_keeps_its_dtype(tmp_path):
    _, state, factors = adapted("attention")
    path = tmp_path / "lora.safetensors"
    lora_files.save_lora(path, factors, 0.5)
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
    lora_files.save_lora(path, factors, 1.0)
    stored = load_file(path)
    change(stored)
    save_file(stored, path)
    with pytest.raises(UserError, match=words):
        lora.merge(state, path, 1.0)


def test_a_file_that_is_not_a_lora_is_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="damaged"):
        lora_files.load_lora(path)


# --- without merging ---------------------------------------------------------------------------

WIDE = DiTSpec(width=256, blocks=2, heads=4, text_channels=64, adaln_rank=32)


def random_changes(net, size, rank=16, seed=4):
    """Changes of every linear of the blocks, each of `size` times the norm of its weight."""
    generator, changes = torch.Generator().manual_seed(seed), {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks"):
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            b *= size * module.weight.float().norm() / (b @ a).norm()
            changes[f"net.{name}"] = Change(a, b, 1.0, name)
    return changes


def scaled(changes, strength):
    return {n: Change(c.a, c.b, strength * c.scale, n) for n, c in changes.items()}


def merged_network(net, *loras):
    """A copy with the changes summed into its weights, in fp32."""
    other = DiT(net.spec)
    other.load_state_dict(net.state_dict())
    for changes in loras:
        for name, c in changes.items():
            weight = other.get_submodule(name.removeprefix("net.")).weight
            weight.data += c.scale * c.b @ c.a
    return other


@torch.no_grad()
def test_several_loras_with_strengths_add_up_without_merging():
    """The LoRAs have different ranks and linears, with and without q, k and v."""
    net = network()
    first, second = random_changes(net, 0.3, rank=3), random_changes(net, 0.2, rank=20, seed=9)
    first = {name: c for name, c in first.items() if not name.endswith((".q", "mlp.up"))}
    second = {n: c for n, c in second.items() if n.endswith(("self_attn.k", "mlp.up", "adaln.up"))}
    expected = merged_network(net, scaled(first, 0.7), scaled(second, -1.5))(**inputs())
    before = net(**inputs())
    lora.apply_unmerged(net, [scaled(first, 0.7), scaled(second, -1.5)])
    torch.testing.assert_close(net(**inputs()), expected, atol=1e-5, rtol=1e-5)
    assert (expected - before).abs().max() > 0.05


@torch.no_grad()
def test_a_twentieth_of_a_lora_changes_the_output_as_in_fp32():
    """In the number format of the CPU, fp32: the change itself, within 2 % of that in fp64."""
    net = network(WIDE)
    x = inputs() | {"text_emb_BMD": torch.randn(2, 5, 64, generator=torch.Generator())}
    for size in (4e-3, 8e-4):
        part = scaled(random_changes(net, size), 0.05)
        exact = merged_network(net).double()
        whole = {k: v.double() for k, v in x.items()}
        wanted = merged_network(net, part).double()(**whole) - exact(**whole)
        beside = merged_network(net)
        lora.apply_unmerged(beside, [part])
        change = beside(**x) - net(**x)
        assert (change - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("size", [4e-3, 8e-4, 2e-4])
@torch.no_grad()
def test_a_bf16_linear_keeps_a_change_far_below_its_rounding(size):
    """The change of the outputs, projected on that in fp32, is within 2 % of all of it.

    Each output of bf16 is rounded, by far more than so small a change. But the rounding has no
    direction: it averages out over tokens, where the change is there, and not where it was merged
    or added to an output that was rounded before.
    """
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 256, bias=False)
    linear.weight.data = torch.randn(256, 256, generator=generator) / 16
    net = nn.ModuleDict({"up": linear.bfloat16()})
    x = torch.randn(16384, 256, generator=generator).bfloat16()
    before = linear(x).float()
    a, b = (torch.randn(shape, generator=generator) for shape in ((16, 256), (256, 16)))
    b *= size * linear.weight.float().norm() / (b @ a).norm()
    change = Change(a, b, 1.0, "up")
    exact = x.float() @ (b @ a).T
    lora.apply_unmerged(net, [{"net.up": change}])

    def kept(after):
        return ((after.float() - before) * exact).sum() / exact.square().sum()

    summed = linear(x) + x @ a.T.bfloat16() @ b.T.bfloat16()
    merged = x @ (linear.weight.float() + b @ a).bfloat16().T
    assert kept(net["up"](x)) == pytest.approx(1, abs=0.02)
    # Where this fails the test could not tell.
    assert max(kept(summed), kept(merged)) < (0.99 if size > 1e-3 else 0.6)


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("size", "count"), [(4e-3, 64), pytest.param(1e-3, 256, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_a_bf16_network_keeps_a_change_on_average(size, count):
    """The output's change over inputs, projected on that of the fp32 network.

    The standard error is 0.5 and 0.8 %. Merged, the larger change keeps 97 %, the smaller one 32 %.
    """
    net = network(WIDE).bfloat16()
    changes = random_changes(net, size)
    exact, beside = merged_network(net), DiT(WIDE).bfloat16()
    beside.load_state_dict(net.state_dict())
    exact_beside = merged_network(exact, changes)
    lora.apply_unmerged(beside, [changes])
    found = wanted = 0.0
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        x = {
            "x_BCTHW": torch.randn(2, 16, 3, 16, 16, generator=generator).bfloat16(),
            "c_noise_B": torch.empty(2).uniform_(-1.5, 1.0, generator=generator),
            "text_emb_BMD": torch.randn(2, 8, 64, generator=generator).bfloat16(),
            "fps_B": torch.full((2,), 24.0),
        }
        wide = {k: v.float() for k, v in x.items()}
        change = exact_beside(**wide) - exact(**wide)
        found += ((beside(**x) - net(**x)).float() * change).sum()
        wanted += change.square().sum()
    assert found / wanted == pytest.approx(1, abs=0.02)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_with_a_lora_give_the_same_output():
    net = network()
    lora.apply_unmerged(net, [random_changes(net, 0.3)])
    expected = net(**inputs())
    for block in net.blocks:
        block.compile()
    torch.testing.assert_close(net(**inputs()), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_q_k_and_v_widen_their_tokens_once():
    net = network()
    lora.apply_unmerged(net, [random_changes(net, 0.3)])
    with Watch() as watch:
        net(**inputs())
    products = watch.shapes(torch.ops.aten.mm.default)
    down = net.blocks[0].self_attn.widen.lora_A.T.shape
    assert down == (64, 48)
    assert products.count(down) == len(net.blocks)


def test_the_share_of_a_merged_lora_that_is_kept_is_measured(tmp_path):
    net = network(WIDE)
    path, shares = tmp_path / "lora.safetensors", {}
    for size in (4e-3, 8e-4):
        changes = random_changes(net, size)
        lora_files.save_lora(path, lora.factors(changes), 1.0)
        for dtype in (torch.float32, torch.bfloat16):
            state = {f"net.{name}": tensor.to(dtype) for name, tensor in net.state_dict().items()}
            shares[size, dtype] = lora.kept_share(state, lora.merge(state, path, 1.0), path)
    assert shares[4e-3, torch.float32] == pytest.approx(1, abs=1e-3)
    assert 0.9 < shares[4e-3, torch.bfloat16] < 0.99
    assert 0.3 < shares[8e-4, torch.bfloat16] < 0.6


@pytest.mark.parametrize("strength", [1e39, -1e300])
def test_a_strength_that_overflows_is_refused(tmp_path, strength):
    net = network()
    path = tmp_path / "lora.safetensors"
    lora_files.save_lora(path, lora.factors(random_changes(net, 0.1)), 1.0)
    with pytest.raises(UserError, match="not finite") as caught:
        lora.apply_files(net, [(path, strength)])
    assert str(path) in str(caught.value)


@torch.no_grad()
def test_a_lora_without_strength_leaves_every_bit(tmp_path):
    net = network()
    path = tmp_path / "lora.safetensors"
    lora_files.save_lora(path, lora.factors(random_changes(net, 0.1)), 1.0)
    expected = net(**inputs())
    lora.apply_files(net, [(path, 0.0)])
    assert torch.equal(net(**inputs()), expected)


def test_a_lora_that_changes_nothing_is_named(tmp_path):
    net = network()
    path = tmp_path / "lora.safetensors"
    lora_files.save_lora(path, lora.factors(random_changes(net, 0.0)), 1.0)
    ((about, (remark,)),) = lora.apply_files(net, [(path, 1.0)])
    assert "changes nothing" in remark
    assert "rank 16, scale 1, strength 1" in about
