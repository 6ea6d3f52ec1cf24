"""The formats that promote writes, on a checkpoint made without training."""

import json

import pytest
import torch
from conftest import settings

from cosmos_cli import layout, recipe
from cosmos_cli.layout import Run
from cosmos_cli.model import promote, weights

MODEL = "Cosmos-Tiny-Text2World"
FOLDER = f"{MODEL}_post-trained"
TINY = layout.EMBEDDED_DIR / "model.safetensors"


@pytest.fixture
def trained(cosmos):
    """A folder with a checkpoint of step 4, a little off the base."""
    state = {name: tensor * 1.01 for name, tensor in weights.load_dit_state(TINY).items()}
    run = Run(cosmos.cwd / "outputs/posttraining/diffusion_text2world/tiny")
    weights.save_dit(run.model(4, "ema"), state, "pt")
    cosmos.state = state
    return cosmos


@pytest.mark.workflow
def test_generate_loads_whichever_format_was_promoted_last(trained):
    """A folder of another format is replaced whole, so that no older weights lie beside."""
    digests = set()
    for format_, name in layout.MODEL_FORMATS.items():
        done = trained.json("promote", "tiny", "--format", format_, "--set", "lora_rank=0")
        assert done["format"] == format_
        folder = trained.cwd / "checkpoints" / FOLDER
        assert done["artifacts"] == [str(folder / name)]
        assert {path.name for path in folder.iterdir()} == {
            name, "README.md", "manifest.json", "recipe.yaml",
        }  # fmt: skip
        kept = weights.load_dit_state(folder / name)
        expected = {k: v for k, v in trained.state.items() if format_ != "diffusers" or "net" in k}
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[k], v) for k, v in expected.items())
        made = trained.json("generate", "--prompt", "A ball.", "-o", format_, "--seed", "3",
                            *settings("num_steps=2"))  # fmt: skip
        about = json.loads((trained.cwd / made["artifacts"][0]).with_suffix(".json").read_text())
        assert about["weights"] == {"path": str(folder / name), "sha256": done["sha256"]}
        assert about["attention"] in ("flash", "math")
        digests.add(about["mp4_sha256"])
    assert len(digests) == 1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["weights"], manifest["format"]) == (4, "ema", "diffusers")
    assert manifest["base"]["sha256"] == layout.sha256_file(TINY)
    assert manifest["recipe"]["model"] == MODEL
    assert "license" not in (folder / "README.md").read_text()


@pytest.mark.workflow
def test_an_unknown_format_is_refused(trained):
    refused = trained("promote", "tiny", "--format", "gguf", code=2)
    assert "safetensors" in refused.stderr


def about(format_):
    return {
        "format": format_, "weights": "ema", "step": 4, "run": "r", "base": {}, "checkpoint": {},
    }  # fmt: skip


@pytest.mark.parametrize("format_", layout.MODEL_FORMATS)
def test_a_model_derived_from_nvidias_says_so_as_its_licence_asks(tmp_path, format_):
    r = recipe.load("nemo_assets").recipe
    state = {"net.t_norm.weight": torch.ones(8), "net.pos_embedder.t": torch.ones(2, 8)}
    state |= {f"net.pos_embedder.{axis}": torch.ones(3, 8) for axis in "hw"}
    promote._write_folder(r, tmp_path / "model", state, about(format_))
    notice = (tmp_path / "model" / "NOTICE").read_text()
    assert "Licensed by NVIDIA Corporation under the NVIDIA Open Model License" in notice
    fields, _, card = (
        (tmp_path / "model" / "README.md").read_text().removeprefix("---\n").partition("---\n")
    )
    assert fields.splitlines() == [
        "base_model: nvidia/Cosmos-Predict1-7B-Text2World",
        "license: other",
        "license_name: nvidia-open-model-license",
        f"license_link: {promote.LICENCE_URL}",
        "library_name: cosmos-posttrain",
        "pipeline_tag: text-to-video",
    ]
    assert "Built on NVIDIA Cosmos" in card


def test_weights_that_do_not_read_back_as_written_are_not_put_in_place(tmp_path, monkeypatch):
    r = recipe.load("tiny").recipe
    state = weights.load_dit_state(TINY)
    true_save = weights.save_dit

    def save_damaged(path, state, format_):
        true_save(path, {**state, "net.t_norm.weight": state["net.t_norm.weight"] + 1}, format_)

    monkeypatch.setattr(weights, "save_dit", save_damaged)
    with pytest.raises(promote.UserError, match="not written as it should be"):
        promote._write_folder(r, tmp_path / "model", state, about("pt"))
    assert not (tmp_path / "model").exists()
