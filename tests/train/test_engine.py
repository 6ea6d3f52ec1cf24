import os
import sys
from pathlib import Path

import pytest
import torch

from cosmos_cli import spec
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import edm, weights
from cosmos_cli.model.dit import DiT
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import engine, process
from cosmos_cli.train.data import Share
from tests.helpers import forks

STAND_IN = Path(__file__).parent / "data/stand_in"
SMALL = spec.ModelSpec(
    name="small",
    dit=spec.DiTSpec(
        width=32, blocks=3, heads=2, text_channels=16, adaln_rank=4, max_t=8, max_hw=8
    ),
)


@pytest.mark.parametrize(
    ("world", "node", "values", "size"),
    [
        (16, 8, {}, 8),
        (8, 8, {}, None),
        (16, 8, {"hpz_partition_size": 1}, None),
        (8, 8, {"hpz_partition_size": 4}, 4),
        (16, 8, {"zero_stage": 2}, None),
    ],
)
def test_hpz_shards_the_weights_within_a_node(monkeypatch, world, node, values, size):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    r = Recipe(dataset_dir="none", **values)
    config = engine.deepspeed_config(r, Share(0, 1, 1), torch.device("cpu"))
    assert config["zero_optimization"].get("zero_hpz_partition_size") == size


@pytest.mark.workflow
def test_a_failed_adamw_build_is_a_one_line_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    r = Recipe(dataset_dir="none", optimizer="deepspeed")
    with pytest.raises(UserError) as caught:
        engine.build_optimizer(r, [torch.nn.Parameter(torch.ones(4))], torch.device("cpu"))
    assert caught.value.code == ExitCode.ENVIRONMENT
    assert caught.value.what.startswith("DeepSpeed cannot compile its AdamW here: ")
    assert "\n" not in str(caught.value)


def losses_of_three_steps(folder, stage, kernels):
    """In a process of its own: those of a model of three blocks, from the same weights."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    os.environ |= {**where, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    sys.path.append(str(STAND_IN))
    process.join_world(60)
    spec.MODELS["small"] = SMALL
    net = DiT(SMALL.dit)
    net.init_weights(torch.Generator().manual_seed(0))
    base = folder / "base.safetensors"
    weights.save_dit(base, edm.EDMLoss(net, SMALL).state_dict(), "safetensors")
    r = Recipe(dataset_dir="none", precision="fp32", zero_stage=stage, global_batch_size=1)
    changes = {"model": "small", "base": str(base), "transformer_engine": kernels}
    trained = engine.build(r.model_copy(update=changes), Share(0, 1, 1), torch.device("cpu"))
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x0, noise = (torch.randn(1, 16, 1, 8, 8, generator=generator) for _ in range(2))
        loss, _ = trained(x0, torch.ones(1), noise, torch.zeros(1, 4, 16), torch.ones(1))
        trained.backward(loss)
        trained.step()
        found.append(loss.item())
    return found, "transformer_engine" in sys.modules


@pytest.mark.workflow
@pytest.mark.parametrize("stage", [0, 3])
def test_transformer_engine_uses_our_weights_at_any_zero_stage(tmp_path, stage):
    with forks.pool(2) as pool:
        folders = [tmp_path / name for name in ("off", "all")]
        for folder in folders:
            folder.mkdir()
        runs = [pool.submit(losses_of_three_steps, path, stage, path.name) for path in folders]
        (plain, absent), (engines, present) = (run.result() for run in runs)
    assert present and not absent
    assert engines == plain
    assert len({*plain}) == 3
