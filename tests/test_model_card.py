"""What a model card says of data, licence and loading, and which texts go with the model."""

import json

import yaml

from cosmos_cli import hashes, model_card, push_files
from cosmos_cli.recipe import loading

ABOUT = {"step": 4, "weights": "ema", "format": "diffusers", "dataset_manifest_sha256": None}


def recipe(tmp_path, *pairs):
    own = (f"checkpoints_dir={tmp_path}", f"dataset_dir={tmp_path / 'robots'}", *pairs)
    return loading.load("nemo_assets", own).recipe


def prepared(tmp_path):
    """A dataset of three videos, of which one is held out and one rejected; returns its hash."""
    rows = [("used", "train", 5.0), ("used", "heldout", 4.0), ("rejected", "train", 9.0)]
    videos = [{"verdict": v, "split": split, "seconds": s} for v, split, s in rows]
    path = tmp_path / "robots" / "manifest.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"settings": {}, "videos": videos, "clips": [{}] * 7}))
    return hashes.sha256_file(path)


def test_the_data_are_counted_if_the_dataset_is_the_one_of_the_training(tmp_path):
    r, digest = recipe(tmp_path), prepared(tmp_path)
    card = model_card.card(r, {**ABOUT, "dataset_manifest_sha256": digest})
    assert "`robots`: 2 videos with captions, 9 s in all, cut into 7 clips. Held out from" in card
    assert "(https://huggingface.co/datasets/nvidia/Cosmos-NeMo-Assets)" in card
    other = model_card.card(r, {**ABOUT, "dataset_manifest_sha256": "0" * 64})
    assert "Its videos are not counted here" in other
    assert str(tmp_path) not in card + other


def test_prompts_of_any_kind_stay_one_field_of_the_card(tmp_path):
    prompts = ['A "robot": it says | no\n---\n# yes', "'", "a: [b"]
    samples = tuple((f"samples/{i}.mp4", prompt) for i, prompt in enumerate(prompts))
    card = model_card.card(recipe(tmp_path), ABOUT, model_card.Extras("me/robots", samples))
    fields = yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])
    expected = ['A "robot": it says | no --- # yes', "'", "a: [b"]
    assert [entry["text"] for entry in fields["widget"]] == expected
    assert fields["license_link"] == model_card.LICENCE_URL


def test_a_video2world_model_is_used_with_a_picture(tmp_path):
    text = model_card.card(recipe(tmp_path), ABOUT)
    assert "text-to-video" in text
    assert "CosmosTextToWorldPipeline" in text
    card = model_card.card(recipe(tmp_path, "model=Cosmos-Predict1-7B-Video2World"), ABOUT)
    assert "pipeline_tag: image-to-video" in card
    assert "base_model: nvidia/Cosmos-Predict1-7B-Video2World" in card
    assert "cosmos generate --image FILE --prompt" in card
    assert "CosmosVideoToWorldPipeline" in card
    assert "sigma_min=0.0002" in card


def test_the_licence_of_the_base_goes_with_a_derived_model(tmp_path, capsys):
    r, folder = recipe(tmp_path), tmp_path / "model"
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"weights")
    (folder / "notes.txt").write_bytes(b"by hand")
    assert [item.name for item in push_files.of_folder(r, folder)] == ["model.pt"]
    assert "has no LICENSE: before you distribute the model, add a copy" in capsys.readouterr().err
    base = tmp_path / r.model
    base.mkdir()
    (base / "LICENSE.md").write_text("the licence")
    (folder / "NOTICE").write_text("the notice")
    found = {item.name for item in push_files.of_folder(r, folder)}
    assert found == {"model.pt", "NOTICE", "LICENSE.md"}


def test_a_pushed_recipe_has_no_absolute_path(tmp_path):
    r = recipe(tmp_path, f"base={tmp_path / 'base.pt'}", f"output_root={tmp_path}")
    kept = push_files.portable(r)
    assert (kept.dataset_dir, kept.base, kept.output_root) == ("datasets/robots", None, "outputs")
    assert str(tmp_path) not in loading.dump(kept)
