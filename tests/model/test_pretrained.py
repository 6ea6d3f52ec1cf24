"""A folder of transformers is loaded whole or refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from cosmos_cli.errors import UserError
from cosmos_cli.model import pretrained
from cosmos_cli.paths import EMBEDDED_DIR


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(EMBEDDED_DIR / "t5", tmp_path / "t5")


def load(folder):
    with pretrained.reading_pretrained(folder, "is not whole", "download it"):
        return pretrained.load_model(T5EncoderModel, folder, torch.float32)


def test_a_missing_weight_is_named_instead_of_initialised(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "encoder.final_layer_norm.weight"
    del state[name]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"is not whole: it lacks weights, {name} among") as refused:
        load(folder)
    assert (refused.value.code, refused.value.where) == (4, str(folder))


def test_a_missing_config_is_not_replaced_by_a_default(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        load(folder)


def test_a_file_that_is_too_large_is_named_with_the_fix_of_the_model(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="download it"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"d_model": 256}, "has the shape [128, 128], but config.json describes [128, 256]"),
        ({"d_model": "x"}, "expected int"),
        ({"d_model": -1}, "negative dimension"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(folder, changes, found, capfd):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(UserError) as refused:
        load(folder)
    assert found in refused.value.what
    assert "\n" not in str(refused.value)
    # transformers would print a table of all tensors.
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("content", ["{}", "[]", "null", "[" * 200_000])
def test_settings_of_another_kind_are_one_line(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match="is not whole: "):
        load(folder)
