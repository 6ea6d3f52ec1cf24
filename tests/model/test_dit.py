from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cosmos_cli.model import dit, edm, kernels
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.tensor_names import OURS, RELEASED, rename
from cosmos_cli.spec import COSMOS_7B, COSMOS_14B
from tests.helpers.networks import SMALL, Watch, diffusers_twin, inputs, network, run_twin

KEYS = Path(__file__).parent / "data" / "dit_7b_keys.txt"


def test_keys_and_shapes_of_the_7b_are_the_released_ones():
    with torch.device("meta"):
        net = DiT(COSMOS_7B.dit)
    module = edm.EDMLoss(net, COSMOS_7B)
    ours = rename(module.state_dict(), RELEASED, KEYS)
    shapes = {key: ",".join(map(str, value.shape)) for key, value in ours.items()}
    released = dict(line.split() for line in KEYS.read_text().splitlines())
    assert released.pop("net.pos_embedder.seq") == "128"
    assert shapes == released


def test_number_of_parameters_of_the_7b():
    with torch.device("meta"):
        net = DiT(COSMOS_7B.dit)
    module = edm.EDMLoss(net, COSMOS_7B)
    assert sum(p.numel() for p in net.parameters()) == 7_236_192_256
    assert sum(p.numel() for p in module.parameters()) == 7_236_192_384


@pytest.mark.parametrize("ratio", [(2.0, 1.0, 1.0), (2.0, 2.0, 2.0)])
@pytest.mark.parametrize(
    ("size", "fps"), [((1, 8, 8), 24.0), ((3, 8, 12), 30.0), ((5, 6, 10), 12.0)]
)
def test_output_equals_diffusers(tmp_path, ratio, size, fps):
    net = network(replace(SMALL, rope_ratio=ratio))
    x = inputs(size=size) | {"fps_B": torch.full((2,), fps)}
    with torch.no_grad():
        ours, theirs = net(**x), run_twin(diffusers_twin(net, tmp_path), x)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_output_with_a_padding_mask_equals_diffusers(tmp_path):
    net, x = network(), inputs()
    mask = (torch.rand(1, 1, 13, 29, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    with torch.no_grad():
        ours = net(**x, padding_mask_BCHW=mask)
        theirs = run_twin(diffusers_twin(net, tmp_path), x, mask)
    assert (ours - net(**x)).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_gradient_of_every_parameter_equals_diffusers(tmp_path):
    net, x = network(), inputs()
    twin = diffusers_twin(net, tmp_path)
    target = torch.randn(x["x_BCTHW"].shape, generator=torch.Generator().manual_seed(3))
    (net(**x) - target).square().mean().backward()
    (run_twin(twin, x) - target).square().mean().backward()
    ours = {f"net.{name}": p.grad for name, p in net.named_parameters()}
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    theirs = rename(theirs, OURS, tmp_path)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, theirs[name], atol=2e-5, rtol=0, msg=name)


def test_samples_of_a_batch_may_differ_in_fps():
    net, x = network(), inputs()
    x["fps_B"] = torch.tensor([12.0, 30.0])
    with torch.no_grad():
        both = net(**x)
        for i in range(2):
            alone = net(**{key: value[i : i + 1] for key, value in x.items()})
            torch.testing.assert_close(both[i : i + 1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("batch", "c_noise"), [(1, -2.13), (2, 0.4)])
def test_bf16_is_within_one_percent_of_fp32(batch, c_noise):
    spec = replace(SMALL, width=128, blocks=4)
    net, x = network(spec), inputs(batch)
    x["c_noise_B"] = torch.full((batch,), c_noise)
    # Both start from weights that bf16 can hold: the rounding of activations is what is measured.
    net.bfloat16().float()
    half = {**x, "x_BCTHW": x["x_BCTHW"].bfloat16(), "text_emb_BMD": x["text_emb_BMD"].bfloat16()}
    exact = {**x, "x_BCTHW": half["x_BCTHW"].float(), "text_emb_BMD": half["text_emb_BMD"].float()}
    with torch.no_grad():
        reference = net(**exact)
        rounded = net.bfloat16()(**half)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - reference).norm() / reference.norm() <= 0.01


def test_checkpointed_blocks_give_the_same_loss_and_gradients():
    gradients = []
    for mode in ("none", "attention", "all"):
        net = network()
        net.activation_checkpointing = mode
        net(**inputs()).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "most", "attention", "all"])
def test_compiled_element_wise_work_gives_the_same_loss_and_gradients(mode):
    gradients, x = [], inputs()
    try:
        for on in (False, True):
            kernels.fuse(on)
            net = network()
            net.activation_checkpointing, net.mlps_kept, net.blocks_kept = mode, 2, 1
            net(**x).square().mean().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    finally:
        kernels.fuse(on=False)
    # Rounded elsewhere, so it was compiled, within the contexts of a checkpoint too.
    assert not torch.equal(*gradients)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_storing_mlp_outputs_recomputes_fewer_products():
    def multiplications(mlps: int, blocks: int) -> int:
        net = network()
        net.activation_checkpointing, net.mlps_kept, net.blocks_kept = "most", mlps, blocks
        with Watch() as watch:
            net(**inputs()).square().mean().backward()
        return len(watch.shapes(torch.ops.aten.mm.default))

    none, mlps, whole = multiplications(0, 0), multiplications(2, 0), multiplications(2, 2)
    # The last linear of the MLP, and the first of each of the three modulations.
    assert none - mlps == 2 * (1 + 3)
    assert whole < mlps


@pytest.mark.parametrize(("mode", "times"), [("none", 2), ("attention", 3), ("all", 4)])
def test_storing_attention_recomputes_only_cross_attention(mode, times):
    net = network()
    net.activation_checkpointing = mode
    with Watch() as watch:
        net(**inputs()).square().mean().backward()
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert len(watch.shapes(attention)) == times * len(net.blocks)


def test_a_checkpointed_block_saves_only_its_input():
    def saved(mode: str) -> int:
        net = network()
        net.activation_checkpointing = mode
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            net(**inputs())
        return sum(sizes)

    assert saved("all") < saved("none") / 3


def test_a_shared_prompt_gives_the_same_output_and_reads_the_text_once():
    net, x = network(), inputs()
    read = []
    for block in net.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: read.append(1))
    with torch.no_grad():
        place = net.locate(dit.patch_grid(SMALL, x["x_BCTHW"]), x["fps_B"])
        prompt = dit.Prompt(*place, net.read(x["text_emb_BMD"]))
        for c_noise in (-1.0, 0.5):
            x["c_noise_B"] = torch.full((2,), c_noise)
            read.clear()
            prepared = net(**x, prompt=prompt)
            assert not read
            assert torch.equal(prepared, net(**x))
            assert len(read) == 2


def test_texts_share_the_first_self_attention_of_a_noise_level():
    net, x = network(), inputs()
    attended = []
    net.blocks[0].self_attn.register_forward_hook(lambda *_: attended.append(1))
    with torch.no_grad():
        place = net.locate(dit.patch_grid(SMALL, x["x_BCTHW"]), x["fps_B"])
        texts = (x["text_emb_BMD"], -x["text_emb_BMD"])
        prompts = [dit.Prompt(*place, net.read(text)) for text in texts]
        alone = [net(**x, prompt=prompt) for prompt in prompts]
        attended.clear()
        first = net.first_attention(x["x_BCTHW"], x["c_noise_B"], prompts[0])
        shared = [net(**x, prompt=prompt._replace(first_BLD=first)) for prompt in prompts]
    assert len(attended) == 1
    assert all(map(torch.equal, shared, alone))
    assert not torch.equal(*shared)


@pytest.mark.parametrize("name", ["flash", "math"])
def test_the_attention_backend_is_reported(name):
    q = torch.randn(1, 64, 4, 32)
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
    with sdpa_kernel(backends[name]):
        assert kernels.attention_backend(q, q, q) == name


def test_zero_padding_takes_part_in_the_softmax():
    net, x = network(), inputs()
    padded = {**x, "text_emb_BMD": F.pad(x["text_emb_BMD"], (0, 0, 0, 20))}
    with torch.no_grad():
        assert (net(**x) - net(**padded)).abs().max() > 1e-3


def test_fresh_blocks_without_the_shared_modulation_only_add_the_position():
    net = DiT(SMALL)
    net.init_weights(torch.Generator().manual_seed(0))
    x = inputs()
    tokens = torch.randn(2, 72, 64)
    with torch.no_grad():
        pos = net.pos_embedder(3, 4, 6)
        wave = dit.sinusoid(x["c_noise_B"], 64)
        mod = torch.zeros_like(net.t_embedder(wave))
        rope = dit.rope_table(SMALL, (3, 4, 6), x["fps_B"])
        out = net.blocks[0](tokens, pos, rope, (net.t_norm(wave), mod), x["text_emb_BMD"])
    torch.testing.assert_close(out, tokens + pos)


def test_fresh_weights_depend_on_the_generator_only():
    nets = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        net = DiT(SMALL)
        net.init_weights(torch.Generator().manual_seed(7))
        nets.append(net.state_dict())
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert nets[0]["final.adaln.up.weight"].abs().max() > 0
    assert nets[0]["t_embedder.linear_1.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert nets[0]["pos_embedder.h"].std() == pytest.approx(0.02, rel=0.05)


def test_position_embedding_has_unit_root_mean_square():
    pos = network().pos_embedder(4, 5, 6)
    assert pos.shape == (120, 64)
    torch.testing.assert_close(pos.square().mean(-1).sqrt(), torch.ones(120), atol=1e-3, rtol=0)


def test_rotary_angles_are_fp32_in_a_bf16_network():
    """At the last column of a wide latent bf16 angles would be off by a tenth of a radian."""
    fps = torch.tensor([24.0])
    cos, sin = dit.rope_table(COSMOS_7B.dit, (1, 1, 80), fps)
    assert cos.dtype == torch.float32
    assert cos.shape == (1, 80, 64)
    angle = torch.atan2(sin, cos)[0, 79, 43:]
    exact = 79 * 10_000.0 ** (-torch.arange(21, dtype=torch.float64) * 2 / 42)
    error = torch.remainder(angle.double() - exact + torch.pi, 2 * torch.pi) - torch.pi
    assert error.abs().max() < 1e-4


def test_rotary_time_is_in_seconds():
    slow = dit.rope_table(SMALL, (3, 1, 1), torch.tensor([12.0]))[0]
    fast = dit.rope_table(SMALL, (5, 1, 1), torch.tensor([24.0]))[0]
    torch.testing.assert_close(slow[0], fast[0, ::2])


def test_rotation_keeps_length_and_depends_on_the_difference_of_positions():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator).expand(2, 1, 8, 1, 16)
    rope = dit.rope_table(SMALL, (8, 1, 1), torch.tensor([24.0]))
    q, k = (kernels.rms_norm_rotate(x, torch.ones(16), *rope) for x in (q, k))
    torch.testing.assert_close(q.norm(dim=-1)[0, 0], q.norm(dim=-1)[0, 7])
    torch.testing.assert_close((q[0, 5] * k[0, 2]).sum(), (q[0, 6] * k[0, 3]).sum())


def test_rotary_of_the_14b_stretches_all_axes():
    seven = dit.rope_table(COSMOS_7B.dit, (1, 4, 1), torch.tensor([24.0]))[1]
    fourteen = dit.rope_table(COSMOS_14B.dit, (1, 4, 1), torch.tensor([24.0]))[1]
    assert not torch.allclose(seven, fourteen)


@pytest.mark.parametrize("size", [(3, 7, 8), (3, 8, 242), (129, 8, 8)])
def test_a_latent_that_does_not_fit_is_refused(size):
    with torch.device("meta"):
        net = DiT(SMALL)
        x = {**inputs(), "x_BCTHW": torch.empty(2, 16, *size)}
    with pytest.raises(ValueError, match=str(size[0])):
        net(**x)


def test_every_linear_is_without_bias_and_every_block_a_module():
    names = [name for name, _ in network().named_parameters()]
    assert not [name for name in names if name.endswith("bias")]
    assert {name.split(".")[1] for name in names if name.startswith("blocks.")} == {"0", "1"}
