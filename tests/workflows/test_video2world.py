"""Video2World from end to end: a dataset of Text2World, training, promotion, pictures, rollouts."""

import json
import signal
import time

import pytest
from PIL import Image

from cosmos_cli import files, hashes, paths
from cosmos_cli.model import mp4, video
from cosmos_cli.train import status
from tests.helpers.command import settings
from tests.helpers.runs import assert_same_model, copy_of, find_run, losses, options, train
from tests.helpers.stand_ins import moving_square

pytestmark = pytest.mark.workflow

LONGER = "num_frames=17"
MODEL = ("model=Cosmos-Tiny-Video2World", LONGER)
# A model that lacks the columns of the mask.
TEXT2WORLD = f"base={paths.EMBEDDED_DIR / 'model.safetensors'}"
QUICK = settings(*MODEL, "num_steps=2", "guidance=2")


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A folder with a run of two steps, on a dataset that a recipe of Text2World prepared."""
    cosmos = copy_of(prepared, tmp_path_factory.mktemp("trained"))
    cosmos("prep", "tiny", *settings(LONGER, "holdout_share=0.5"))
    pairs = (*MODEL, TEXT2WORLD, "max_steps=2", "save_every_steps=1", "holdout_share=0.5")
    train(cosmos, "whole", *pairs)
    return cosmos


def generate(cosmos, *arguments, code=0):
    done = cosmos.json("generate", *arguments, *QUICK, code=code)
    return {path: hashes.sha256_file(cosmos.cwd / path) for path in done["artifacts"]}, done


def picture(folder):
    clip = moving_square(20, 64, 96)
    mp4.write_mp4(folder / "clip.mp4", clip, 16, 18)
    Image.fromarray(clip[:, 0].permute(1, 2, 0).numpy()).save(folder / "first.png")


def test_a_resumed_run_equals_a_whole_one(trained):
    pairs = (*MODEL, TEXT2WORLD, "save_every_steps=1", "holdout_share=0.5")
    said = train(trained, "parts", *pairs, "max_steps=1")
    assert "start at zero" in said.stderr
    assert "resumed at step 1" in train(trained, "parts", *pairs, "max_steps=2").stderr
    whole, parts = find_run(trained, "whole"), find_run(trained, "parts")
    assert losses(parts) == losses(whole)
    assert_same_model(whole, parts, 2)
    measured = [row for row in status.rows(whole) if "heldout" in row]
    assert {"heldout_given_0", "heldout_given_1", "heldout_given_2"} <= measured[-1].keys()
    assert "given 2" in whole.report.read_text()


def test_a_lora_on_text2world_weights_is_refused(trained):
    pairs = (*MODEL, TEXT2WORLD, "holdout_share=0.5", "lora_rank=4")
    words = ("train", "tiny", *options("lora", *pairs))
    (refused,) = trained.ranks(1, *words, code=2)
    assert "a LoRA does not train them" in refused.stderr
    assert "`--set lora_rank=0`" in refused.stderr


def test_a_lora_on_its_own_weights_trains_in_parallel_as_alone(trained):
    base = find_run(trained, "whole").model(2, "reg")
    own = (*MODEL, f"base={base}", "lora_rank=4", "max_steps=2", "micro_batch_size=1")
    train(trained, "one", *own, "holdout_share=0.5")
    shared = ("num_processes=2", "sequence_parallel=2", "activation_checkpointing=all")
    train(trained, "two", *own, *shared, "holdout_share=0.5")
    alone, split = (losses(find_run(trained, name)) for name in ("one", "two"))
    assert len(alone) == 2
    for before, after in zip(alone, split, strict=True):
        assert after == pytest.approx(before, rel=1e-3)


def test_a_picture_continues_with_the_promoted_model(trained):
    picture(trained.cwd)
    pairs = settings(*MODEL, TEXT2WORLD, "name=whole", "max_steps=2")
    promoted = trained.json("promote", "tiny", *pairs)
    folder = trained.cwd / "checkpoints" / "Cosmos-Tiny-Video2World_post-trained"
    sha256 = files.read_json(folder / "manifest.json")["sha256"]
    assert promoted["step"] == 2
    assert "generate --image FILE --prompt" in promoted["next"]
    few = ("--set", "num_steps=2")
    for shown, model in ((("--image", "first.png"), "Video2World"), ((), "Text2World")):
        done = trained.json("generate", *shown, "--prompt", "A square moves right.", *few)
        about = json.loads((trained.cwd / done["artifacts"][0]).with_suffix(".json").read_text())
        assert about["model"] == f"Cosmos-Tiny-{model}"
        assert (about["weights"]["sha256"] == sha256) == bool(shown)
        assert bool(about["input"]) == bool(shown)


def test_a_bad_input_of_a_batch_does_not_stop_the_others(cosmos):
    picture(cosmos.cwd)
    (cosmos.cwd / "broken.png").write_bytes((cosmos.cwd / "first.png").read_bytes()[:100])
    entries = (
        {"image": "first.png"}, {"visual_input": "clip.mp4"}, {"image": "missing.png"},
        {"image": "broken.png"}, {"video": "clip.mp4", "num_input_frames": 1}, {},
    )  # fmt: skip
    text = "\n".join(json.dumps({"prompt": "A square moves right.", **one}) for one in entries)
    (cosmos.cwd / "b.jsonl").write_text(text)
    one, done = generate(cosmos, "--batch", "b.jsonl", "-o", "one", code=4)
    assert len(one) == 4
    errors = [made["error"] for made in done["videos"] if "error" in made]
    assert ["missing.png" in error for error in errors] == [True, False]
    assert "broken.png: is damaged" in errors[1]
    shared, _ = generate(
        cosmos, "--image", "first.png", "--prompt", "A square moves right.", "-o", "shared",
        "--num-processes", "2",
    )  # fmt: skip
    assert set(shared.values()) <= set(one.values())


def test_a_killed_rollout_resumes_after_its_last_segment(cosmos):
    picture(cosmos.cwd)
    ask = ("--video", "clip.mp4", "--prompt", "A square moves right.", "--rollout", "3")
    whole, done = generate(cosmos, *ask, "-o", "whole")
    (path,) = whole
    assert video.probe(cosmos.cwd / path).frames == 17 + 2 * 8
    process = cosmos.start("generate", *ask, "-o", "cut", *QUICK)
    while not list(cosmos.cwd.glob("cut/.*.segments/state.json")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode == -signal.SIGKILL:
        assert not list(cosmos.cwd.glob("cut/[!.]*.mp4"))
    again = cosmos("generate", *ask, "-o", "cut", *QUICK)
    assert "segments were generated before" in again.stderr
    assert "sharpness" in again.stderr
    (made,) = cosmos.cwd.glob("cut/*.mp4")
    assert hashes.sha256_file(made) == whole[path]
    assert not list(cosmos.cwd.glob("cut/.*"))
    assert isinstance(done["videos"][0]["input"], str)
