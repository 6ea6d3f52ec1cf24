from dataclasses import replace

import pytest
import torch
from torch import nn

from cosmos_cli.model import lora, streaming
from cosmos_cli.train import checkpoint
from tests.helpers.networks import SMALL, inputs, network

CPU = torch.device("cpu")
SIX = replace(SMALL, blocks=6)


def adapted():
    """A network of six blocks with a random LoRA, as training holds it."""
    module = nn.Module()
    module.net = network(SIX)
    lora.attach(module, module.net.blocks, 4, 0.5, "attention_mlp")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in checkpoint.trained(module).values():
            parameter.normal_(std=0.2, generator=generator)
    return module


def gradients(module):
    module.zero_grad()
    loss = module.net(**inputs()).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in checkpoint.trained(module).values())]


@pytest.mark.parametrize("mode", ["attention", "all"])
@pytest.mark.parametrize("streamed", [[0, 1, 2, 3, 4, 5], [1, 3, 5], [2], [0, 5]])
@pytest.mark.parametrize("kept_on_cpu", [0, 4])
def test_a_streamed_network_trains_to_the_bit_like_a_resident_one(mode, streamed, kept_on_cpu):
    plain, module = adapted(), adapted()
    plain.net.activation_checkpointing = module.net.activation_checkpointing = mode
    module.net.weights = streaming.WeightStream(module.net.blocks, streamed, CPU)
    module.net.activations = streaming.ActivationStream(kept_on_cpu, CPU)
    expected = gradients(plain)
    # Twice, with a pass without gradients between: the buffers then hold other blocks.
    assert all(map(torch.equal, gradients(module), expected))
    with torch.no_grad():
        assert torch.equal(module.net(**inputs()), plain.net(**inputs()))
    assert all(map(torch.equal, gradients(module), expected))


def test_streamed_blocks_share_two_buffers_and_keep_their_weights_once():
    module = adapted()
    whole = {name: p.detach().clone() for name, p in module.net.named_parameters()}
    stream = streaming.WeightStream(module.net.blocks, [1, 2, 4, 5], CPU)
    places = {
        p.untyped_storage().data_ptr()
        for i in (1, 2, 4, 5)
        for p in module.net.blocks[i].parameters()
        if not p.requires_grad
    }
    assert places == {buffer.untyped_storage().data_ptr() for buffer in stream.buffers}
    assert all(
        p.data_ptr() % streaming.ALIGNED_BYTES == 0
        for i in (1, 2, 4, 5)
        for p in module.net.blocks[i].parameters()
    )
    assert len(stream.weights) == 4
    for i in range(6):
        stream.bring(i)
        own = module.net.blocks[i].named_parameters()
        assert all(torch.equal(p, whole[f"blocks.{i}.{name}"]) for name, p in own)


def test_a_pass_copies_each_streamed_block_once():
    module = adapted()
    module.net.weights = stream = streaming.WeightStream(module.net.blocks, [0, 2, 3, 5], CPU)
    with torch.no_grad():
        module.net(**inputs())
        for _ in range(2):
            before = stream.copies
            module.net(**inputs())
            assert stream.copies - before == 4
    module.net.activation_checkpointing = "all"
    gradients(module)
    before = stream.copies
    gradients(module)
    # The two blocks at each end of the pass are still there when the direction changes.
    assert stream.copies - before == 2 * (4 - 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU driver grants pinned memory")
def test_where_pinning_is_refused_the_memory_is_pageable():
    with pytest.raises(RuntimeError):
        torch.empty(8, pin_memory=True)
    memory = streaming.pinned(8, torch.device("cuda"))
    assert len(memory) == 8
    assert not memory.is_pinned()
