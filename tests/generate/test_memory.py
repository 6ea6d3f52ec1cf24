"""The CPU memory that streamed weights need."""

import os
from pathlib import Path

import pytest

from cosmos_cli import cpu_memory
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import memory
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.recipe import loading

BLOCKS = 6


@pytest.fixture
def streamed():
    return loading.load("tiny", ["memory=streamed"]).recipe


def available(monkeypatch, size):
    monkeypatch.setattr(cpu_memory, "available_bytes", lambda: size)


def test_processes_that_share_a_copy_need_its_memory_once(streamed, monkeypatch):
    block = 4 * streamed.spec.dit.block_parameters
    file = os.memfd_create("test")
    shared = {(Weights(Path("model"), ""), "bf16"): Path(f"/proc/self/fd/{file}")}
    available(monkeypatch, BLOCKS * block)
    memory.require_cpu_memory(streamed, BLOCKS, "cpu", shared)
    other = {(Weights(Path("other"), ""), "bf16"): Path(f"/proc/self/fd/{file}")}
    with pytest.raises(UserError, match="6 of 6 blocks are streamed") as caught:
        memory.require_cpu_memory(streamed, BLOCKS, "cpu", shared | other)
    assert caught.value.code == ExitCode.ASSET
    # What another process has filled takes available memory, and is not needed again.
    os.write(file, bytes(2 * block))
    available(monkeypatch, 4 * block)
    memory.require_cpu_memory(streamed, BLOCKS, "cpu", shared)
    available(monkeypatch, 3 * block)
    with pytest.raises(UserError):
        memory.require_cpu_memory(streamed, BLOCKS, "cpu", shared)
    os.close(file)


def test_pinned_memory_of_one_process_is_rounded_as_pytorch_does(streamed, monkeypatch):
    block = 4 * streamed.spec.dit.block_parameters
    available(monkeypatch, BLOCKS * block)
    memory.require_cpu_memory(streamed, BLOCKS, "cpu")
    available(monkeypatch, BLOCKS * block - 1)
    with pytest.raises(UserError, match="close other programs"):
        memory.require_cpu_memory(streamed, BLOCKS, "cpu")
    # bf16 on a GPU.
    power = 1 << (block // 2 - 1).bit_length()
    assert power > block // 2
    available(monkeypatch, BLOCKS * power)
    memory.require_cpu_memory(streamed, BLOCKS, "cuda")
