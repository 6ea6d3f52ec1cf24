"""Which parts sample in fp8 on which GPU, and how a GPU that cannot is refused."""

import importlib.util

import pytest

from cosmos_cli import gpus
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import precision
from cosmos_cli.gpus import Gpu
from cosmos_cli.recipe import loading


def parts(monkeypatch, *capabilities, value="fp8"):
    """The parts in fp8 on a machine whose driver reports these GPUs."""
    machine = [Gpu(i, f"GPU {i}", each) for i, each in enumerate(capabilities)]
    monkeypatch.setattr(gpus, "of_machine", lambda: machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return precision.fp8_parts(loading.load("tiny", [f"sampling_precision={value}"]).recipe)


def test_fp8_is_off_unless_the_recipe_asks_for_it(monkeypatch):
    assert parts(monkeypatch, (7, 0), value="bf16") == ()


def test_ada_multiplies_in_fp8_and_a_cpu_emulates_all(monkeypatch):
    assert parts(monkeypatch, (8, 9)) == ("linears",)
    assert parts(monkeypatch) == ("linears", "attention")


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch):
    with pytest.raises(UserError) as refused:
        parts(monkeypatch, (8, 9), (8, 0))
    assert refused.value.code == ExitCode.ENVIRONMENT
    assert "GPU 1, GPU 1, does not compute in fp8" in str(refused.value)
    assert "--set sampling_precision=bf16" in str(refused.value)


@pytest.mark.skipif(importlib.util.find_spec("cudnn") is not None, reason="cudnn is installed")
def test_hopper_needs_the_frontend_of_cudnn(monkeypatch):
    with pytest.raises(UserError, match=r'pip install -e "\.\[fp8\]"'):
        parts(monkeypatch, (9, 0))
