import pytest
import torch

from cosmos_cli.keys import Recipe
from cosmos_cli.model import engine
from cosmos_cli.model.data import Share


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
def test_between_nodes_each_holds_all_weights(monkeypatch, world, node, values, size):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    r = Recipe(dataset_dir="none", **values)
    config = engine.deepspeed_config(r, Share(0, 1, 1), torch.device("cpu"))
    assert config["zero_optimization"].get("zero_hpz_partition_size") == size
