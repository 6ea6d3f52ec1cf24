"""Prompts and videos that the guards block, and how generate reports it."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from cosmos_cli import paths
from cosmos_cli.errors import UserError
from cosmos_cli.generate.guards.guardrail import UNSAFE, BlockList, FrameFilter, Lemmas
from cosmos_cli.generate.jobs import Job, Weights
from cosmos_cli.generate.phases import Pipeline
from cosmos_cli.model.tiny import world
from cosmos_cli.recipe import loading
from tests.helpers.command import settings
from tests.helpers.stand_ins import stand_in_weights

SHIPPED = paths.EMBEDDED_DIR / "guardrail" / "blocklist"
# Verdicts of better-profanity 0.7.0 and NLTK 3.9.1, called as in the reference.
CASES = json.loads((Path(__file__).parent / "data" / "block_list.json").read_text())
QUICK = settings("num_steps=2", "guidance=0")


@pytest.fixture(scope="module")
def shipped():
    return BlockList(SHIPPED)


@pytest.mark.parametrize("verdict", [True, False])
def test_the_block_list_agrees_with_the_libraries_of_the_reference(shipped, verdict):
    prompts = [prompt for prompt, blocked in CASES if blocked is verdict]
    assert len(prompts) >= 100
    assert [p for p in prompts if bool(shipped.reason(p)) is not verdict] == []


@pytest.mark.parametrize("prompt", ["a 'nude' ball", "Nudes on a wall", "two nudes. The end"])
def test_words_that_those_libraries_miss_are_blocked(shipped, prompt):
    assert "nude" in shipped.reason(prompt)


def test_no_caption_of_the_synthetic_world_is_blocked(shipped):
    captions = {world.caption(world.sample_scene(seed), seed) for seed in range(300)}
    assert len(captions) > 100
    assert not {caption for caption in captions if shipped.reason(caption)}


def test_an_allowed_word_is_not_blocked_and_plurals_come_from_wordnet(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "lists")
    (tmp_path / "lists" / "custom" / "more.txt").write_text("kalf\nhaif\nvase\nglove box\n\n")
    (tmp_path / "lists" / "whitelist" / "more.txt").write_text("half\nVase\n")
    nltk_data = tmp_path / "lists" / "nltk_data" / "corpora"
    with zipfile.ZipFile(nltk_data / "wordnet.zip", "w") as archive:
        archive.writestr("wordnet/index.noun", "  1 licence\nkalf n 1 0 1 0 1\nlens n 1 0\n")
        archive.writestr("wordnet/noun.exc", "lenses lens\n")
    shutil.rmtree(nltk_data / "wordnet")
    own = BlockList(tmp_path / "lists")
    assert "kalf" in own.reason("two kalves, or rather kalfs")
    assert own.reason("haif a cup")
    # An i may stand for an l, but this word is allowed.
    assert not own.reason("half a vase")
    assert own.reason("the glove box")
    assert not own.reason("a glovebox")
    lemmas = Lemmas(tmp_path / "lists" / "nltk_data")
    assert [lemmas.singular(w) for w in ("lens", "lenses", "cups")] == ["lens", "lens", "cups"]


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        *((part, "missing") for part in ("custom", "exact_match", "whitelist", "nltk_data")),
        *((part, "empty") for part in ("custom", "exact_match", "nltk_data")),
    ],
)
def test_a_list_that_cannot_be_read_stops_everything(tmp_path, part, damage):
    shutil.copytree(SHIPPED, tmp_path / "lists")
    shutil.rmtree(tmp_path / "lists" / part)
    if damage == "empty":
        (tmp_path / "lists" / part).mkdir()
    with pytest.raises(UserError, match="guardrail cannot be read") as refused:
        BlockList(tmp_path / "lists")
    assert refused.value.code == 4


def small_filter(root, unsafe_bias=0.0):
    """Write a random frame filter that a bias makes call frames unsafe."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**sizes)).save_pretrained(root / "siglip")
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / "siglip")
    state = {}
    for i, (inputs, outputs) in {0: (32, 8), 3: (8, 6), 6: (6, 7)}.items():
        state[f"network.layers.{i}.weight"] = torch.randn(outputs, inputs)
        state[f"network.layers.{i}.bias"] = torch.randn(outputs)
    for i, width in {1: 8, 4: 6}.items():
        state |= {
            f"network.layers.{i}.weight": 1 + torch.rand(width),
            f"network.layers.{i}.bias": torch.randn(width),
            f"network.layers.{i}.running_mean": torch.randn(width),
            f"network.layers.{i}.running_var": 1 + torch.rand(width),
            f"network.layers.{i}.num_batches_tracked": torch.tensor(7),
        }
    state["network.layers.6.bias"][2] += unsafe_bias
    torch.save({"model": state}, root / "safety_filter.pt")
    return state


def test_the_frame_filter_is_siglip_and_the_released_classifier(tmp_path):
    state = small_filter(tmp_path)
    own = FrameFilter(tmp_path / "safety_filter.pt", tmp_path / "siglip", "cpu")
    pixels = torch.randint(0, 256, (3, 40, 48, 64), dtype=torch.uint8)

    def layer(x, i):
        return x @ state[f"network.layers.{i}.weight"].T + state[f"network.layers.{i}.bias"]

    def norm(x, i):
        part = {n: state[f"network.layers.{i}.{n}"] for n in ("running_mean", "running_var",
                                                              "weight", "bias")}  # fmt: skip
        scaled = (x - part["running_mean"]) / (part["running_var"] + 1e-5) ** 0.5
        return scaled * part["weight"] + part["bias"]

    vision = SiglipVisionModel.from_pretrained(tmp_path / "siglip")
    images = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels.unbind(1)]
    resized = [image.resize((32, 32), Image.Resampling.BICUBIC) for image in images]
    inputs = torch.stack([torch.from_numpy(np.array(image)) for image in resized])
    with torch.inference_mode():
        features = vision(inputs.permute(0, 3, 1, 2) / 127.5 - 1).pooler_output
    unit = features / features.norm(dim=1, keepdim=True)
    scores = layer(norm(layer(norm(layer(unit, 0), 1).relu(), 3), 4).relu(), 6)
    classes = scores.argmax(1).tolist()
    unsafe = next((i for i, found in enumerate(classes) if found), None)
    expected = "" if unsafe is None else f"frame {unsafe} may show {UNSAFE[classes[unsafe] - 1]}"
    assert own.reason(pixels) == expected


def test_an_unsafe_frame_blocks_and_so_do_nan_scores(tmp_path):
    small_filter(tmp_path, unsafe_bias=1e6)
    files = tmp_path / "safety_filter.pt", tmp_path / "siglip"
    pixels = torch.zeros(3, 20, 32, 32, dtype=torch.uint8)
    assert FrameFilter(*files, "cpu").reason(pixels) == "frame 0 may show violence"
    small_filter(tmp_path, unsafe_bias=float("nan"))
    assert "cannot be judged" in FrameFilter(*files, "cpu").reason(pixels)
    torch.save({"model": {"network.layers.0.weight": torch.zeros(2, 2)}}, files[0])
    with pytest.raises(UserError, match="another classifier"):
        FrameFilter(*files, "cpu")
    with pytest.raises(UserError, match="cosmos download"):
        FrameFilter(files[0], tmp_path / "nowhere", "cpu")


def test_a_blocked_video_is_not_written(tmp_path):
    small_filter(tmp_path, unsafe_bias=1e6)
    r = loading.load("tiny", settings("num_steps=2", "guidance=0")[1::2]).recipe
    base = Weights(paths.model_files(r.spec, r.checkpoints_dir).dit, "")
    job = Job("A red ball.", r, base, tmp_path / "out" / "x.mp4")
    pipeline = Pipeline(r, "cpu", in_turn=False)
    pipeline.load(r, base)
    pipeline.videos.frame_filter = FrameFilter(
        tmp_path / "safety_filter.pt", tmp_path / "siglip", "cpu"
    )
    (refused,) = pipeline.run([job])
    assert not refused.made
    assert refused.error.code == 8
    assert "frame filter" in str(refused.error)
    assert not job.path.parent.exists()
    pipeline.videos.frame_filter = None
    (result,) = pipeline.run([job])
    assert result.made
    assert result.error is None
    assert job.path.exists()


@pytest.mark.workflow
def test_a_blocked_prompt_is_exit_code_eight_and_the_others_are_made(cosmos):
    words = ["A red ball.", "A nude statue.", "A blue box."]
    (cosmos.cwd / "b.jsonl").write_text("".join(json.dumps({"prompt": w}) + "\n" for w in words))
    done = cosmos.json("generate", "--batch", "b.jsonl", *QUICK, code=8)
    assert {video["prompt"]: video["exit_code"] for video in done["videos"]} == dict(
        zip(words, [0, 8, 0], strict=True)
    )
    assert "block list" in done["error"]
    assert "nude" in done["error"]
    assert len(list(cosmos.cwd.glob("outputs/*"))) == 8
    about = json.loads(Path(done["artifacts"][0]).with_suffix(".json").read_text())
    assert about["guardrails"] == ["block list"]


@pytest.mark.workflow
def test_only_the_recipe_turns_guardrails_off_and_a_warning_says_so(cosmos):
    off = ["--prompt", "A nude statue.", "--set", "guardrails=off", *QUICK]
    assert "GUARDRAILS ARE OFF" in cosmos("generate", *off, "-o", "a").stderr
    (sidecar,) = cosmos.cwd.glob("a/*.json")
    assert json.loads(sidecar.read_text())["guardrails"] == "off"
    on = cosmos("generate", *off[:2], *QUICK, "-o", "a", code=8)
    assert "Traceback" not in on.stderr


@pytest.mark.workflow
def test_released_models_are_not_used_without_their_guardrails(cosmos):
    model = cosmos.cwd / "checkpoints" / "Cosmos-Predict1-7B-Text2World"
    stand_in_weights(model / "model.pt")
    refused = cosmos("generate", "nemo_assets", "--prompt", "A robot.", code=4)
    assert "guardrail" in refused.stderr
    assert "cosmos download" in refused.stderr
