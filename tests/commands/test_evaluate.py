"""The evaluate command in real processes."""

import json
import shutil

import pytest
import torch

from cosmos_cli.evaluate import evaluation
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.model import weights
from cosmos_cli.recipe import loading
from cosmos_cli.train import status
from tests.helpers import feature_models, runs
from tests.helpers.command import Cosmos, settings
from tests.helpers.stand_ins import stand_in_weights

pytestmark = pytest.mark.workflow

QUICK = settings("num_steps=2", "guidance=0")


def test_a_model_is_measured_on_the_synthetic_world_and_the_dataset(prepared, tmp_path):
    page = tmp_path / "e.html"
    done = Cosmos(prepared).json("evaluate", "--prompts", "2", "-o", page, *QUICK)
    (about,) = done["models"].values()
    assert set(about) == {"weights", "edm", "scores", "video_scores", "nearest_clip"}
    assert done["comparisons"] == []
    assert all(0 <= share <= 1 for share in about["scores"].values())
    assert all(0 < error < 5 for error in about["edm"].values())
    html = page.read_text()
    assert done["artifacts"][0] == str(page)
    assert html.count("<video") == len(list(tmp_path.glob("*.mp4"))) == 2
    assert 'src="http' not in html


def test_clips_of_another_size_are_measured_with_a_warning_or_refused(prepared, tmp_path):
    ask = ("evaluate", "--prompts", "0", "--model", "base", "--dry-run", *QUICK)
    longer = (*ask, "-o", tmp_path / "e.html", "--set", "num_frames=17")
    words = "was prepared with num_frames = 9"
    assert words in Cosmos(prepared)(*longer).stderr
    frames = ("--set", "model=Cosmos-Tiny-Video2World")
    assert words in Cosmos(prepared)(*longer, *frames, code=5).stderr


def test_each_model_is_read_once(prepared, monkeypatch, tmp_path):
    monkeypatch.chdir(prepared)
    read, load = [], weights.load_dit_state
    monkeypatch.setattr(weights, "load_dit_state", lambda path: read.append(path) or load(path))
    r = loading.load("tiny", [pair for pair in QUICK if pair != "--set"]).recipe
    path = r.model_files.dit
    models = {name: Weights(path, "") for name in ("one", "two")}
    store = evaluation.open_store(r, 1, "cpu", tmp_path)
    figures, samples = evaluation.evaluate(r, models, store, 1)
    assert read == [path] * 2
    assert figures["models"]["one"]["edm"] == figures["models"]["two"]["edm"]
    assert torch.equal(samples["one"][0].pixels, samples["two"][0].pixels)


def test_scores_of_feature_models_are_compared_and_videos_made_once(prepared, tmp_path):
    feature_models.write(tmp_path / "checkpoints")
    shutil.copy(TINY_WEIGHTS, prepared / "copy.safetensors")
    words = ("--model", "base", "--model", "copy.safetensors", "--prompts", "2", *QUICK)
    words += ("--set", f"checkpoints_dir={tmp_path / 'checkpoints'}", "-o", tmp_path / "e.html")
    cosmos = Cosmos(prepared)
    planned = cosmos.json("evaluate", *words, "--dry-run", "--require", "prompt-match")
    assert (planned["videos"], planned["videos_to_make"]) == (6, 6)
    done = cosmos("evaluate", *words, "--require", "likeness", "--json", code=6)
    done = json.loads(done.stdout)
    assert "--require likeness: copy.safetensors is not better" in done["error"]
    assert done["models"]["base"]["features"].keys() == {"likeness", "prompt match"}
    *_, likeness, match, distance = done["comparisons"]
    assert (likeness["score"], match["score"]) == ("likeness", "prompt match")
    assert (distance["score"], distance["better"]) == ("held-out distance", "lower")
    assert (distance["difference"], distance["p"], distance["low"]) == (0, 1, None)
    assert distance["verdict"] == "no difference that these 3 videos can show"
    alone = done["models"]["base"]["held_out_distance"]["distance"]
    assert distance["before"] == pytest.approx(alone)
    html = (tmp_path / "e.html").read_text()
    assert "features of SigLIP, which reads the first 64 tokens" in html
    assert "permutation test" in html and "in features of V-JEPA 2" in html
    # A second evaluation makes no video, and agrees to the bit.
    again = cosmos("evaluate", *words, "--json")
    assert "6 of 6 are in" in again.stderr and "steps" not in again.stderr
    assert {**json.loads(again.stdout), "status": 0} | {"exit_code": 6, "error": done["error"]} == {
        **done, "status": 0,
    }  # fmt: skip


def test_the_saves_of_a_run_are_scored_and_their_videos_made_once(prepared, tmp_path):
    cosmos = runs.copy_of(prepared, tmp_path)
    pairs = ("lora_rank=2", "save_every_steps=2", "max_steps=4", "ema_rate=0.25")
    runs.train(cosmos, "saves", *pairs)
    run = runs.find_run(cosmos, "saves")
    words = ("evaluate", *runs.options("saves", *pairs), *QUICK, "--prompts", "1", "--steps")
    planned = cosmos.json(*words, "2,4", "--dry-run")
    assert (planned["videos"], planned["videos_to_make"], planned["seconds"]) == (6, 6, None)
    assert list(planned["models"]) == ["base", "step 2", "step 4"]
    cosmos(*words, "2")
    planned = cosmos("evaluate", *words[1:], "all", "--dry-run", "--json")
    assert "4 of 6 are in" in planned.stderr and "2 must be made, about" in planned.stderr
    done = cosmos.json(*words, "all")
    found = json.loads(run.scores.read_text())
    assert found == done["steps"]
    assert found["means"].keys() == {"0", "2", "4"}
    assert found["best_step"] == status.best_step(run) in (2, 4)
    assert found["chosen_step"] in (0, 2, 4)
    assert {row["model"] for row in done["comparisons"]} == {"step 2", "step 4"}
    html = (cosmos.cwd / "outputs" / "evaluation.html").read_text()
    assert html.count("<h2>Scores of the saves") == 1
    assert html.count("higher is better over step") == run.report.read_text().count(
        "higher is better over step"
    )
    assert "consistency over step" in run.report.read_text()
    for text, code, words_ in (
        ("3", 4, "step 3 is not saved; use `--steps 2,4`"),
        ("best", 2, "'best' is neither all nor a list of steps"),
        ("", 2, "'' is neither all nor a list of steps"),
    ):
        assert words_ in cosmos(*words, text, code=code).stderr
    assert "neither --model nor --require" in cosmos(*words, "all", "--require", "x", code=2).stderr
    refused = cosmos(*words, "all", "--prompts", "0", code=2).stderr
    assert "add `--prompts 24`" in refused


def test_a_model_that_is_not_better_ends_with_code_6_after_its_page(prepared, tmp_path):
    shutil.copy(TINY_WEIGHTS, prepared / "copy.safetensors")
    models = ("--model", "base", "--model", "copy.safetensors")
    arguments = ("evaluate", *models, "--prompts", "2", "--require", "better", *QUICK)
    done = Cosmos(prepared).json(*arguments, "-o", tmp_path / "e.html", code=6)
    assert (done["status"], done["exit_code"]) == ("error", 6)
    assert "copy.safetensors is not better: no score is better" in done["error"]
    assert {row["difference"] for row in done["comparisons"]} == {0}
    assert {row["verdict"][:13] for row in done["comparisons"]} == {"no difference"}
    assert [row["score"] for row in done["comparisons"]] == [
        "EDM error", "colour", "shape", "motion", "concept", "consistency",
        "frame consistency", "flicker", "motion amount", "sharpness",
    ]  # fmt: skip
    page = (tmp_path / "e.html").read_text()
    assert "copy.safetensors compared with base" in page and "lower is better" in page


TINY_WEIGHTS = loading.load("tiny", []).recipe.model_files.dit
WEIGHTS_VIDEO2WORLD = loading.load("tiny_video2world", []).recipe.model_files.dit


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("better",), 4, "no Cosmos-Tiny-Text2World model was promoted yet"),
        (("better", "--model", "base", "--model", "base"), 2, "no second model"),
        (("x", "--model", "base", "--model", TINY_WEIGHTS), 2, "no such score"),
    ],
)
def test_a_requirement_is_checked_before_anything_runs(cosmos, options, code, words):
    assert words in cosmos("evaluate", "tiny", "--require", *options, code=code).stderr


def test_a_video2world_model_can_be_required_to_follow_motion(cosmos):
    models = ("--model", "base", "--model", WEIGHTS_VIDEO2WORLD)
    arguments = ("evaluate", "tiny_video2world", "--dry-run", *models, "--require")
    done = cosmos.json(*arguments, "position_error_free_motion_9_given")
    assert (done["dry_run"], done["prompts"]) == (True, 24)
    assert "can require better, psnr_free_motion_1_given" in cosmos(*arguments, "x", code=2).stderr


def test_a_video2world_model_without_clips_to_continue_is_refused(cosmos):
    done = cosmos("evaluate", "tiny_video2world", "--prompts", "0", code=2)
    assert "there are none; add `--prompts 24`" in done.stderr


def test_models_whose_pages_would_share_a_name_are_refused(cosmos):
    names = [word for name in ("aa/b", "aa_b", "x/aa_b") for word in ("--model", name)]
    refused = cosmos("evaluate", "tiny", "--prompts", "0", *names, code=2)
    assert "would have the same name on the page" in refused.stderr


def test_measuring_promoted_needs_a_promoted_model(cosmos):
    done = cosmos("evaluate", "tiny", "--model", "promoted", "--prompts", "0", code=4)
    assert "--model promoted: no Cosmos-Tiny-Text2World model was promoted yet" in done.stderr


def test_without_a_prepared_dataset_there_is_nothing_to_measure_the_7b_on(cosmos):
    stand_in_weights(cosmos.cwd / "model.pt")
    done = cosmos("evaluate", "nemo_assets", "--model", "model.pt", code=5)
    assert "cosmos_nemo_assets/manifest.json: the dataset is not prepared" in done.stderr
