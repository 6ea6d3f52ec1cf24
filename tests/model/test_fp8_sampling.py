"""Sampling in fp8: the error of attention and linears, what is replaced, and the GPU's kernels."""

import math
from dataclasses import replace

import pytest
import torch

from cosmos_cli.model import fp8_sampling, kernels, lora
from cosmos_cli.model.fp8_sampling import Fp8Linear
from cosmos_cli.model.lora_files import Change
from cosmos_cli.model.streaming import WeightStream
from tests.helpers.networks import SMALL, network
from tests.helpers.networks import inputs as a_pass

TOKENS, WIDTH, QUERIES = 8192, 128, 256


def relative(found, exact):
    return ((found.float() - exact).norm() / exact.norm()).item()


def unit(x):
    """Tokens with a root mean square of 1, as after the norms of queries and keys."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


def inputs(kind):
    """Queries, keys and values of one head, in bf16."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, 1, WIDTH, generator=generator) for _ in range(3))
    q, k = unit(q), unit(k)
    if kind == "one key has half of the weight":
        k = q * (math.log(TOKENS) + 0.5) / WIDTH**0.5
    if kind == "values of mean 1":
        v = v + 1
    return [x.bfloat16() for x in (q[:, :QUERIES], k, v)]


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("random", 0.06),
        ("one key has half of the weight", 0.053),
        ("values of mean 1", 0.01),
    ],
)
def test_fp8_attention_is_near_that_of_fp32(kind, bound):
    q, k, v = inputs(kind)
    exact = kernels.attention(q.float(), k.float(), v.float())
    error = relative(fp8_sampling.attend(q, k, v), exact)
    assert 1e-4 < error < bound


def test_a_constant_added_to_all_keys_or_to_a_channel_of_v_costs_no_precision():
    q, k, v = (x.float() for x in inputs("random"))
    exact = kernels.attention(q, k, v)
    plain = relative(fp8_sampling.attend(q, k, v), exact)
    moved = fp8_sampling.attend(q, k + 20 * torch.randn(WIDTH), v * torch.logspace(-3, 3, WIDTH))
    assert relative(moved / torch.logspace(-3, 3, WIDTH), exact) < 1.1 * plain


def test_fp8_linears_round_both_factors_to_three_digits():
    linear = torch.nn.Linear(512, 256, bias=False)
    x = torch.randn(2, 50, 512)
    # Tokens and channels of very different sizes each have a scale of their own.
    linear.weight.data *= torch.logspace(-3, 3, 256)[:, None]
    found, exact = Fp8Linear(linear)(x * torch.logspace(-3, 3, 50)[:, None]), linear(x)
    found = found / torch.logspace(-3, 3, 50)[:, None]
    assert (
        0.03 < relative(found / linear.weight.norm(dim=1), exact / linear.weight.norm(dim=1)) < 0.04
    )


def test_a_token_of_zeros_stays_zero():
    linear = torch.nn.Linear(32, 16, bias=False)
    assert not Fp8Linear(linear)(torch.zeros(1, 4, 32)).any()


FOUR = replace(SMALL, blocks=4)


def test_the_first_and_last_block_and_the_modulations_keep_their_format():
    net = network(FOUR)
    before = net(**a_pass())
    fp8_sampling.use_fp8(net.blocks, attention=True)
    replaced = {name for name, module in net.named_modules() if isinstance(module, Fp8Linear)}
    assert replaced == {f"blocks.{i}.{name}" for i in (1, 2) for name in fp8_sampling.LINEARS}
    assert 1e-4 < relative(net(**a_pass()), before) < 0.05


def test_a_lora_beside_the_weights_acts_in_fp8_too():
    changes = {
        f"net.blocks.{i}.{name}": Change(
            torch.randn(4, linear.in_features), torch.randn(linear.out_features, 4), 0.1, name
        )
        for net in [network(FOUR)]
        for i in range(4)
        for name in ("self_attn.q", "self_attn.out", "mlp.down")
        for linear in [net.blocks[i].get_submodule(name)]
    }
    plain, changed, in_fp8 = network(FOUR), network(FOUR), network(FOUR)
    lora.apply_unmerged(changed, [changes])
    lora.apply_unmerged(in_fp8, [changes])
    fp8_sampling.use_fp8(in_fp8.blocks, attention=False)
    exact = changed(**a_pass())
    assert relative(plain(**a_pass()), exact) > 0.1
    assert relative(in_fp8(**a_pass()), exact) < 0.05


def test_streamed_weights_give_the_same_output_in_fp8():
    resident, streamed = network(FOUR), network(FOUR)
    for net in (resident, streamed):
        net.requires_grad_(False)
        fp8_sampling.use_fp8(net.blocks, attention=True)
    streamed.weights = WeightStream(streamed.blocks, [0, 1, 2, 3], torch.device("cpu"))
    assert torch.equal(resident(**a_pass()), streamed(**a_pass()))


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "width"), [(32, 128), (8, 32)])
def test_fp8_on_a_gpu_equals_its_emulation(heads, width):
    q, k, v = (torch.randn(1, 1024, heads, width, dtype=torch.bfloat16) for _ in range(3))
    emulated = fp8_sampling.attend(q, k, v).float()
    run = torch.compile(fp8_sampling.attend)
    found = run(q.cuda(), k.cuda(), v.cuda()).float().cpu()
    exact = kernels.attention(q.float(), k.float(), v.float())
    # Both round in the same places, but not always in the same direction.
    assert relative(found, emulated) < 0.8 * relative(emulated, exact)
    linear = torch.nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
    x, on_cpu = torch.randn(64, 512, dtype=torch.bfloat16), Fp8Linear(linear)
    assert relative(Fp8Linear(linear.cuda())(x.cuda()).cpu(), on_cpu(x).float()) < 0.01
