"""What is not a number ends a run before it is saved, with step, clips and noise levels."""

import re
import shutil

import pytest
import torch
import torch.distributed as dist
from conftest import Cosmos
from safetensors.torch import load_file, save_file
from test_train import find_run, options

from cosmos_cli import layout
from cosmos_cli.errors import UserError
from cosmos_cli.model import metrics
from cosmos_cli.model.data import Batch


@pytest.mark.workflow
def test_a_weight_that_is_not_finite_stops_the_run(prepared, tmp_path):
    shutil.copytree(prepared / "datasets", tmp_path / "datasets")
    cosmos = Cosmos(tmp_path)
    weights = load_file(layout.EMBEDDED_DIR / "model.safetensors")
    weights["net.final.linear.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "base.safetensors")
    pairs = ("base=base.safetensors", "num_processes=2", "micro_batch_size=1", "holdout_share=0")
    cosmos("prep", "tiny", *options("nan", *pairs))
    err = cosmos("train", "tiny", *options("nan", *pairs, "max_restarts=2"), code=6).stderr
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "step 1: the loss is not finite" in line
    # A clip of each process.
    assert len(re.findall(r"clip\d\S* \(sigma [0-9.]+\)", line)) == 2
    assert "restart" not in err
    assert find_run(cosmos, "nan").resumable_steps() == []


@pytest.mark.parametrize("norm", [-1.0, float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_the_run(norm):
    latent, one = torch.zeros(1, 16, 2, 8, 12), torch.tensor([0.5])
    batch = Batch(latent, one, latent, torch.zeros(1, 512, 64), one, ("a.safetensors",))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        metrics.require_finite_gradient(12.5, 4, [batch])
        with pytest.raises(UserError) as raised:
            metrics.require_finite_gradient(norm, 4, [batch])
    finally:
        dist.destroy_process_group()
    words = "step 5: the gradient is not finite: a.safetensors (sigma 0.5)"
    assert str(raised.value).startswith(words)
    assert raised.value.code == 6
