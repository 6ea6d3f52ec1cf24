"""The CPU memory that streamed weights need."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import memory
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.recipe import loading

BLOCKS = 6


@pytest.fixture
def streamed():
    return loading.load("tiny", ["memory=streamed"]).recipe


def available(monkeypatch, size):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))


def test_processes_that_share_a_copy_need_its_memory_once(streamed, monkeypatch):
    block = 4 * streamed.spec.dit.block_parameters
    file = os.memfd_create("test")
    shared = {(Weights(Path("model"), ""), "bf16"): Path(f"/proc/self/fd/{file}")}
    available(monkeypatch, BLOCKS * block)
    memory.require_cpu_memory(streamed, BLOCKS, "cpu", shared)
    other = {(Weights(Path("other"), ""), "bf16"): Path(f"/proc/self/fd/{file}")}
    with pytest.raises(UserError, match="6 of 6 blocks do not fit") as caught:
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


def test_the_copy_of_one_process_is_rounded_as_pytorch_does(streamed, monkeypatch):
    block = 4 * streamed.spec.dit.block_parameters
    power = 1 << (block - 1).bit_length()
    assert power > block
    available(monkeypatch, BLOCKS * power)
    memory.require_cpu_memory(streamed, BLOCKS, "cpu")
    available(monkeypatch, BLOCKS * power - 1)
    with pytest.raises(UserError):
        memory.require_cpu_memory(streamed, BLOCKS, "cpu")
