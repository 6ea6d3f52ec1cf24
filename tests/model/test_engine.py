import pytest
import torch

from cosmos_cli.errors import ExitCode, UserError
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


def test_an_adamw_that_cannot_be_compiled_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    r = Recipe(dataset_dir="none", optimizer="deepspeed")
    with pytest.raises(UserError) as caught:
        engine.build_optimizer(r, [torch.nn.Parameter(torch.ones(4))], torch.device("cpu"))
    assert caught.value.code == ExitCode.ENVIRONMENT
    assert caught.value.what.startswith("DeepSpeed cannot compile its AdamW here: ")
    assert "\n" not in str(caught.value)
