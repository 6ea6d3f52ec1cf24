"""The scores of feature models, on small random models of the same classes."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from transformers import BitImageProcessorPil, SiglipImageProcessorPil

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.evaluate import evaluation, features, samples
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.recipe import loading
from tests.helpers import feature_models
from tests.helpers.feature_models import DINO, SIGLIP, VJEPA
from tests.helpers.stand_ins import moving_square

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return feature_models.write(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def video(seed=0, height=48, width=80):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(3, 9, 6, 10, generator=generator)
    return (255 * F.interpolate(small, (height, width), mode="bilinear")).byte()


@pytest.mark.parametrize(("name", "processor"), [
    (DINO, BitImageProcessorPil), (SIGLIP, SiglipImageProcessorPil),
])  # fmt: skip
@pytest.mark.parametrize("size", [(48, 80), (80, 48), (20, 24)])
def test_frames_are_prepared_as_by_transformers_own_processor(root, name, processor, size):
    frames = video(0, *size).movedim(0, 1)
    own = features.Preparation(root / name)(frames)
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    theirs = processor(**feature_models.PREPARATIONS[name])(pictures, return_tensors="pt")
    level = 1 / 255 / min(feature_models.PREPARATIONS[name]["image_std"])
    assert own.shape == theirs.pixel_values.shape
    assert (own - theirs.pixel_values).abs().max() < 3.01 * level
    assert (own - theirs.pixel_values).abs().mean() < 0.3 * level


def test_the_likeness_is_the_mean_cosine_of_all_pairs_of_frames(root):
    model = features.Likeness(root / DINO)
    clips = [video(1), video(2)]
    model.learn(iter(clips))

    def vectors(pixels, count):
        found = model.model(pixel_values=model.frames(pixels, count)).pooler_output
        return F.normalize(found, dim=1)

    known = torch.cat([vectors(clip, features.CLIP_FRAMES) for clip in clips])
    pairs = vectors(video(3), features.FRAMES) @ known.T
    assert model.score(video(3), "") == pytest.approx(float(pairs.mean()), abs=1e-6)
    still = video(1)[:, :1].expand(-1, 9, -1, -1)
    model.learn([still])
    assert model.score(still, "") == pytest.approx(1, abs=1e-6)
    assert model.score(video(2), "") < 0.9999


def test_the_match_is_that_of_transformers_on_the_prompt_in_siglips_spelling(root):
    model = features.Match(root / SIGLIP)
    found = model.score(video(), "A red video, of: LEFT!")
    ids = torch.tensor([[2, 6, 3, 4, 5] + [1] * 59])
    both = model.model(input_ids=ids, pixel_values=model.frames(video(), features.FRAMES))
    assert found == pytest.approx(float((both.image_embeds @ both.text_embeds.T).mean()), abs=1e-6)
    assert found == model.score(video(), "a red   video of left")
    assert model.cut(["red " * 63, "red " * 64, "red " * 200]) == 2
    assert model.score(video(), "red " * 63) == model.score(video(), "red " * 63 + "left left")


def test_long_prompts_are_named_once(root, capsys):
    models = features.Models({features.MATCH: features.Match(root / SIGLIP)}, None)
    models.learn([], ["red " * 64, "red"], "cpu")
    said = capsys.readouterr().err
    assert "SigLIP reads only the first 64 tokens, and 1 of 2 prompts are longer" in said


def test_the_distance_reads_whole_videos_and_their_motion(root):
    model = features.Distance(root / VJEPA)
    moving = moving_square(25, 48, 80)
    vector = model.embed(moving)
    assert vector.shape == (32,)
    frames = model.prepare(moving[:, [i * 25 // 16 for i in range(16)]].movedim(0, 1))
    theirs = model.model.get_vision_features(frames[None])[0].mean(0)
    assert torch.equal(torch.from_numpy(vector), theirs.double())
    assert (model.embed(moving.flip(1)) != vector).any()
    assert model.embed(moving[:, :3]).shape == (32,)


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_the_cpu(root):
    found = []
    for device in ("cpu", "cuda"):
        likeness, match = features.Likeness(root / DINO), features.Match(root / SIGLIP)
        likeness.to(device).learn([video(1).to(device)])
        scores = [m.to(device).score(video(2).to(device), "a red") for m in (likeness, match)]
        vector = features.Distance(root / VJEPA).to(device).embed(video(3).to(device))
        found.append(torch.tensor([*scores, *vector]))
    assert torch.allclose(*found, atol=1e-3)


@pytest.mark.parametrize(("name", "change", "words"), [
    (DINO, "weights", "it lacks weights"),
    (DINO, "config.json", "is not a valid JSON file"),
    (SIGLIP, "preprocessor_config.json", "does not exist"),
    (SIGLIP, "tokenizer.json", "it has no tokenizer.json"),
    (VJEPA, "crop", "it reads 32x32 pixels, not (24, 24)"),
])  # fmt: skip
def test_a_damaged_model_is_one_line_with_the_command(tmp_path, name, change, words):
    folder = feature_models.write(tmp_path, name) / name
    if change == "weights":
        torch.manual_seed(0)
        other = feature_models.network(VJEPA)
        other.save_pretrained(tmp_path / "other")
        (tmp_path / "other" / "model.safetensors").rename(folder / "model.safetensors")
    elif change == "crop":
        settings = {**feature_models.PREPARATIONS[name], "crop_size": 24}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    elif change == "config.json":
        (folder / change).write_text("{")
    else:
        (folder / change).unlink()
    score = {DINO: features.LIKENESS, SIGLIP: features.MATCH, VJEPA: features.DISTANCE}[name]
    with pytest.raises(UserError) as error:
        features.load_models(features.Plan({score: folder}, {}, ()))
    assert error.value.code == ExitCode.ASSET
    assert words in str(error.value) and "--for evaluate" in str(error.value)
    assert str(folder) in str(error.value)


def test_what_cannot_be_measured_has_a_reason(root, tmp_path):
    r = loading.load("my_videos", [f"checkpoints_dir={root}"]).recipe
    assert list(features.plan_scores(r, 4, 3, 2).folders) == list(features.KEYS)
    found = features.plan_scores(r, 4, 0, 1)
    assert found.folders.keys() == {features.MATCH}
    assert found.reasons == {
        features.LIKENESS: "there are no training clips",
        features.DISTANCE: "it needs 2 held-out clips",
    }
    assert features.plan_scores(r, 1, 3, 2).reasons == {features.DISTANCE: "it needs 2 videos"}
    picture = r.model_copy(update={"num_frames": 1})
    assert features.plan_scores(picture, 4, 3, 2).reasons.keys() == {features.DISTANCE}
    elsewhere = r.model_copy(update={"checkpoints_dir": str(tmp_path), "match_model": "off"})
    assert features.plan_scores(elsewhere, 4, 3, 2).missing == (
        features.LIKENESS,
        features.DISTANCE,
    )
    assert features.plan_scores(r, 0, 3, 2) == features.Plan({}, {}, ())
    tiny = loading.load("tiny", []).recipe
    assert features.plan_scores(tiny, 4, 3, 2) == features.Plan({}, {}, ())
    typed = tiny.model_copy(update={"likeness_model": str(tmp_path), "match_model": "a/b"})
    assert features.plan_scores(typed, 4, 3, 2).missing == (features.MATCH,)
    assert (
        features.plan_scores(typed, 4, 3, 2)
        .reasons[features.LIKENESS]
        .startswith("there is no model")
    )
    own = replace(features.plan_scores(r, 4, 3, 2))
    chosen = r.model_copy(update={"likeness_model": str(root / DINO)})
    assert features.plan_scores(chosen, 4, 3, 2) == own


def test_cost_and_missing_models_are_said_before_anything_runs(tmp_path, capsys, monkeypatch):
    r = loading.load("my_videos", [f"checkpoints_dir={tmp_path}"]).recipe
    store = samples.Store(tmp_path, r, [samples.Trial("a", 0), samples.Trial("b", 1)], "cpu")
    models = {name: Weights(tmp_path, name) for name in ("base", "promoted")}
    found = evaluation.announce(r, models, store)
    said = capsys.readouterr().err
    assert f"2 videos of each model: 0 of 4 are in {tmp_path}, 4 must be made\n" in said
    assert "not measured: likeness: there are no training clips\n" in said
    assert "a model is missing: prompt match; run `cosmos download" in said
    assert (found["videos_to_make"], found["seconds"]) == (4, None)
    # On a GPU without earlier videos, the time is planned: 70 passes of 3.5 s.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    store.device = "cuda"
    assert store.cost(list(models.values()))[1] == pytest.approx(4 * 252, rel=0.05)
    # Later, it is that of the videos that are there.
    (first, _) = store.batches(models["base"])
    save_file({"x0": torch.zeros(1, 2)}, first.path, {"about": '{"seconds": 100}'})
    assert store.cost(list(models.values())) == (3, 300)
    first.path.write_bytes(first.path.read_bytes()[:-1])
    assert store.cost(list(models.values()))[0] == 4
