"""One copy of streamed weights for several processes: who fills it, and who frees it."""

import fcntl
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_cli.model import fp8_sampling, lora, streaming
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.lora_files import Change
from cosmos_cli.model.shared_weights import PAGE, SharedWeights
from tests.helpers.networks import SMALL, inputs, network

CPU = torch.device("cpu")
SIX = replace(SMALL, blocks=6)


@pytest.fixture
def path():
    file = os.memfd_create("test")
    yield Path(f"/proc/self/fd/{file}")
    os.close(file)


def loaded(path, streamed, changed=lambda net: None, seed=0):
    """A network that streams these blocks, as load_denoiser makes it, and those that it filled."""
    whole = network(SIX, seed).state_dict()
    with torch.device("meta"):
        net = DiT(SIX).requires_grad_(False)
    copy = SharedWeights(path)
    own = copy.lock_missing(streamed)
    streaming.allocate(net, net.blocks, own, CPU, set(streamed).difference(own))
    for name, weight in net.state_dict().items():
        weight.copy_(whole[name])
    changed(net)
    net.weights = streaming.WeightStream(net.blocks, streamed, CPU, copy)
    return net, own


def in_fp8(net):
    change = Change(torch.full((4, 64), 0.1), torch.full((64, 4), 0.1), 1.0, "key")
    lora.apply_unmerged(net, [{"net.blocks.1.self_attn.q": change}])
    fp8_sampling.use_fp8(net.blocks, attention=False)


def as_they_are(net):
    pass


@pytest.mark.parametrize("changed", [as_they_are, in_fp8])
def test_the_second_network_uses_the_weights_of_the_first(path, changed):
    plain = network(SIX).requires_grad_(False)
    changed(plain)
    expected = plain(**inputs())
    first, own = loaded(path, [1, 3, 5], changed)
    assert own == [1, 3, 5]
    # It streams other blocks too, and fills only those.
    second, own = loaded(path, [0, 1, 2, 3, 4, 5], changed)
    assert own == [0, 2, 4]
    for net in (first, second, first):
        assert torch.equal(net(**inputs()), expected)
    first.weights.weights[0].zero_()
    assert not second.weights.weights[1].any()


def test_pages_of_blocks_that_nobody_streams_are_never_allocated(path):
    net, _ = loaded(path, [5])
    status = path.stat()
    assert status.st_size > PAGE + 6 * streaming.block_bytes(net.blocks[0])
    assert status.st_blocks * 512 < status.st_size / 3


def test_others_wait_until_the_blocks_are_filled(path):
    copy, other = SharedWeights(path), SharedWeights(path)
    assert copy.lock_missing([0, 1]) == [0, 1]
    with pytest.raises(BlockingIOError):
        fcntl.flock(other.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    copy.mark_filled(0)
    copy.close()
    assert other.lock_missing([0]) == []
    assert other.lock_missing([0, 1]) == [1]
    other.close()


def test_another_process_fills_what_a_killed_one_did_not(path):
    child = os.fork()
    if not child:
        copy = SharedWeights(path)
        copy.lock_missing([0, 1, 2])
        copy.mark_filled(1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    other = SharedWeights(path)
    assert other.lock_missing([0, 1, 2]) == [0, 2]
    other.close()
