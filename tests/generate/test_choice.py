"""The model that `cosmos generate` chooses and what it reports; nothing is generated."""

import json
import os
import shutil

import pytest

from cosmos_cli import files, hashes, paths
from tests.helpers.stand_ins import stand_in_weights

pytestmark = pytest.mark.workflow

SEVEN, FOURTEEN = "Cosmos-Predict1-7B-Text2World", "Cosmos-Predict1-14B-Text2World"
TINY, VIDEO = "Cosmos-Tiny-Text2World", "Cosmos-Predict1-7B-Video2World"


@pytest.fixture(autouse=True)
def networks(cosmos):
    put_networks(cosmos.cwd / "checkpoints")
    put_networks(cosmos.cwd)


def put_networks(root):
    """Put the networks around the denoiser there, as far as a dry run looks at them."""
    (root / "google-t5/t5-11b").mkdir(parents=True)
    (root / "google-t5/t5-11b/config.json").write_text("{}")
    (root / paths.TOKENIZER_DIR).mkdir()


def choose(cosmos, *arguments, code=0):
    """Return the weights that a command would use, relative to its folder, and its stderr."""
    done = cosmos(
        "generate", *arguments, "--prompt", "A ball.", "--set", "guardrails=off", "--dry-run",
        "--json", code=code,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    if code:
        return done.stderr
    weights = json.loads(done.stdout)["weights"]
    assert weights["sha256"] == hashes.sha256_path(cosmos.cwd / weights["path"])
    assert f"({weights['path']})" in done.stderr
    return os.path.relpath(weights["path"], cosmos.cwd), done.stderr


def put(cosmos, name, content="weights", file="model.pt", changed=None):
    """Put weights into a folder in checkpoints, as a user would by hand."""
    path = cosmos.cwd / "checkpoints" / name / file
    stand_in_weights(path, content)
    if changed is not None:
        os.utime(path, (changed, changed))
    return cosmos.cwd / "checkpoints" / name


def promoted(cosmos, name, run="/runs/one", changed=None):
    """Write a folder with all files of `cosmos promote`."""
    folder = put(cosmos, name, name, changed=changed)
    manifest = {"sha256": hashes.sha256_path(folder / "model.pt"), "run": run}
    files.write_json(folder / "manifest.json", manifest)
    recipe = f"model: {name.partition('_')[0]}\ndataset_dir: d\nnum_frames: 17\n"
    (folder / "recipe.yaml").write_text(recipe)
    if changed is not None:
        os.utime(folder / "manifest.json", (changed, changed))
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [SEVEN, FOURTEEN])
@pytest.mark.parametrize("file", ["model.pt", "model.safetensors", "transformer/config.json"])
def test_a_model_without_a_manifest_is_used_with_a_warning(cosmos, name, file):
    put(cosmos, SEVEN)
    put(cosmos, FOURTEEN)
    folder = put(cosmos, f"{name}_post-trained", "tuned", file)
    weights = folder / file.partition("/")[0]
    asked = [], *(["--model", word] for word in (folder.name, "promoted", folder, weights))
    for arguments in asked:
        path, said = choose(cosmos, *arguments)
        assert path == f"checkpoints/{folder.name}/{file.partition('/')[0]}"
        (line,) = [line for line in said.splitlines() if line.startswith("warning")]
        assert "has no manifest.json, so its weights cannot be verified" in line
        assert "the sizes are those of the recipe my_videos" in line
        assert f"{name} (" in said
        assert "121 frames, 1280x704 at 24 fps, 35 steps, guidance 7" in said


def test_without_a_promoted_model_the_base_is_used_and_reported(cosmos):
    path, said = choose(cosmos)
    assert path.endswith("tiny/model.safetensors")
    assert "using the embedded tiny model" in said
    put(cosmos, FOURTEEN)
    assert "using the base model Cosmos-Predict1-14B" in choose(cosmos)[1]
    put(cosmos, SEVEN)
    path, said = choose(cosmos)
    assert path == f"checkpoints/{SEVEN}/model.pt"
    assert f"no Text2World model was promoted in {cosmos.cwd}/checkpoints: using" in said
    assert "121 frames, 1280x704 at 24 fps" in said
    assert choose(cosmos, "--model", "base")[0] == path
    assert choose(cosmos, "--set", f"model={FOURTEEN}")[0] == f"checkpoints/{FOURTEEN}/model.pt"


def test_a_model_that_is_named_has_its_own_sizes(cosmos):
    put(cosmos, SEVEN)
    (cosmos.cwd / "checkpoints" / SEVEN).rename(cosmos.cwd / "elsewhere")
    base = ("--set", f"model={SEVEN}", "--set", "base=elsewhere/model.pt")
    assert "121 frames, 1280x704 at 24 fps" in choose(cosmos, *base)[1]


def test_a_base_that_is_a_broken_link_is_an_error(cosmos):
    put(cosmos, SEVEN)
    model = cosmos.cwd / "checkpoints" / SEVEN / "model.pt"
    model.unlink()
    model.symlink_to("gone")
    assert f"{SEVEN}/model.pt: the weights are missing" in choose(cosmos, code=4)


def test_the_newest_promoted_model_is_used_and_the_others_are_listed(cosmos):
    put(cosmos, SEVEN)
    promoted(cosmos, f"{SEVEN}_post-trained", changed=3e8)
    promoted(cosmos, f"{SEVEN}_post-trained_robots", changed=2e8)
    put(cosmos, f"{TINY}_post-trained", changed=1e8)
    path, said = choose(cosmos)
    assert path == f"checkpoints/{SEVEN}_post-trained/model.pt"
    others = f"{SEVEN}_post-trained_robots, {TINY}_post-trained"
    assert f"one of 3; choose with --model: {others}" in said
    assert "17 frames" in said
    for word in ("robots", f"{SEVEN}_post-trained_robots"):
        path, said = choose(cosmos, "--model", word)
        assert path == f"checkpoints/{SEVEN}_post-trained_robots/model.pt"
        assert "warning" not in said
    assert (
        choose(cosmos, "--set", f"model={TINY}")[0] == f"checkpoints/{TINY}_post-trained/model.pt"
    )
    # A folder copied by hand counts too, also if its times are those of the training.
    put(cosmos, f"{TINY}_post-trained", changed=4e8)
    assert choose(cosmos)[0] == f"checkpoints/{TINY}_post-trained/model.pt"
    link = cosmos.cwd / "checkpoints" / f"{SEVEN}_post-trained_link" / "model.pt"
    link.parent.mkdir()
    link.symlink_to(cosmos.cwd / "checkpoints" / SEVEN / "model.pt")
    assert choose(cosmos)[0] == f"checkpoints/{link.parent.name}/model.pt"


def test_a_recipe_takes_the_model_of_its_own_run_first(cosmos):
    own = cosmos.cwd / "outputs/posttraining/diffusion_text2world/tiny"
    promoted(cosmos, f"{TINY}_post-trained_own", str(own), changed=1e8)
    promoted(cosmos, f"{TINY}_post-trained", changed=2e8)
    path, said = choose(cosmos, "tiny")
    assert path == f"checkpoints/{TINY}_post-trained_own/model.pt"
    assert "25 frames" in said
    path, said = choose(cosmos, "tiny", "--set", "name=third")
    assert path == f"checkpoints/{TINY}_post-trained/model.pt"
    assert "this model is from the run /runs/one, not from this recipe's run" in said
    assert "weights are missing; run `cosmos download" in choose(cosmos, "nemo_assets", code=4)
    put(cosmos, SEVEN)
    path, said = choose(cosmos, "nemo_assets")
    assert path == f"checkpoints/{SEVEN}/model.pt"
    assert f"no {SEVEN} was promoted in {cosmos.cwd}/checkpoints: using the base model" in said


def test_checkpoints_dir_and_home_are_where_the_user_says(cosmos, monkeypatch):
    monkeypatch.setenv("HOME", str(cosmos.cwd / "home"))
    promoted(cosmos, f"{SEVEN}_post-trained_robots")
    (cosmos.cwd / "checkpoints").rename(cosmos.cwd / "home")
    put_networks(cosmos.cwd / "checkpoints")
    elsewhere = ["--set", "checkpoints_dir=~/"]
    expected = f"home/{SEVEN}_post-trained_robots/model.pt"
    for asked in (
        elsewhere,
        ["--model", "robots", *elsewhere],
        ["nemo_assets", "--model", "robots", *elsewhere],
        ["--model", f"~/{SEVEN}_post-trained_robots"],
        ["--model", f"home/{SEVEN}_post-trained_robots/model.pt"],
    ):
        assert choose(cosmos, *asked)[0] == expected
    assert "tiny" in choose(cosmos)[0]


def test_a_model_of_another_machine_uses_the_networks_of_this_one(cosmos, tmp_path_factory):
    folder = promoted(cosmos, f"{SEVEN}_post-trained_robots")
    with (folder / "recipe.yaml").open("a") as recipe:
        recipe.write("checkpoints_dir: /there/checkpoints\n")
    usual, far = cosmos.cwd / "checkpoints", tmp_path_factory.mktemp("far: away #1") / "checkpoints"
    asked = ("--model", f"{SEVEN}_post-trained_robots")
    assert f"/there/checkpoints, the checkpoints_dir of {folder}" in choose(cosmos, *asked)[1]
    assert "/there" not in choose(cosmos, *asked, "--set", "checkpoints_dir=checkpoints")[1]
    folder = shutil.copytree(folder, far / folder.name)
    assert f"is not there: using {usual}" in choose(cosmos, "--model", folder)[1]
    put_networks(far)
    assert f"is not there: using {far}" in choose(cosmos, "--model", folder)[1]


def test_a_run_that_was_moved_is_still_the_recipes_own(cosmos):
    moved = "/there/outputs/posttraining/diffusion_text2world/tiny"
    promoted(cosmos, f"{TINY}_post-trained_own", moved, changed=1e8)
    promoted(cosmos, f"{TINY}_post-trained", changed=2e8)
    assert choose(cosmos, "tiny")[0] == f"checkpoints/{TINY}_post-trained_own/model.pt"


def test_a_path_wins_over_a_model_name_and_is_reported(cosmos):
    promoted(cosmos, f"{SEVEN}_post-trained_robots")
    (cosmos.cwd / "robots").mkdir()
    shutil.copy(paths.EMBEDDED_DIR / "model.safetensors", cosmos.cwd / "robots")
    path, said = choose(cosmos, "--model", "robots")
    assert path == "robots/model.safetensors"
    assert f"is the path {cosmos.cwd}/robots, not the model" in said
    assert f"{SEVEN}_post-trained_robots" in said
    assert "the sizes are those of the recipe tiny" in said


def test_an_input_chooses_a_video2world_model(cosmos):
    (cosmos.cwd / "a.png").write_bytes(b"not read by a dry run")
    shown = ("--image", "a.png")
    path, said = choose(cosmos, *shown)
    assert "Cosmos-Tiny-Video2World (" in said
    put(cosmos, VIDEO)
    assert choose(cosmos, *shown)[0] == f"checkpoints/{VIDEO}/model.pt"
    assert "tiny" in choose(cosmos)[0]
    promoted(cosmos, f"{VIDEO}_post-trained", changed=1e8)
    promoted(cosmos, f"{SEVEN}_post-trained", changed=2e8)
    promoted(cosmos, f"{TINY}_post-trained", changed=3e8)
    path, said = choose(cosmos, *shown)
    assert path == f"checkpoints/{VIDEO}_post-trained/model.pt"
    assert "one of" not in said
    assert choose(cosmos, "--rollout", "2")[0] == path
    (cosmos.cwd / "b.jsonl").write_text('{"prompt": "a", "visual_input": "a.png"}')
    assert choose(cosmos, "--batch", "b.jsonl")[0] == path
    assert choose(cosmos)[0] == f"checkpoints/{TINY}_post-trained/model.pt"
    said = choose(cosmos, "tiny", *shown, code=2)
    assert "use `--set model=Cosmos-Tiny-Video2World`" in said
    assert "model: Cosmos-Tiny" in cosmos("generate", "tiny", "--print-recipe").stdout
    assert "a.jpg: does not exist" in choose(cosmos, "--image", "a.jpg", code=4)


def test_an_unknown_or_ambiguous_name_is_refused(cosmos):
    promoted(cosmos, f"{SEVEN}_post-trained_robots")
    promoted(cosmos, f"{TINY}_post-trained_robots")
    assert "is the name of 2 models" in choose(cosmos, "--model", "robots", code=4)
    assert TINY in choose(cosmos, "tiny", "--model", "robots")[0]
    for word in ("nothing", "", ".", "../checkpoints/nothing", "robots/"):
        said = choose(cosmos, "--model", word, code=4)
        assert said.startswith("error: --model ") or "holds no model.pt" in said
    assert f"{SEVEN}_post-trained_robots" in choose(cosmos, "--model", "nothing", code=4)


def test_a_folder_without_a_model_is_skipped_with_a_warning(cosmos):
    checkpoints = cosmos.cwd / "checkpoints"
    (checkpoints / f"{SEVEN}_post-trained").mkdir(parents=True)
    (checkpoints / f"{FOURTEEN}_post-trained").write_text("cp made a file of it")
    video = put(cosmos, "Cosmos-Predict1-7B-WorldInterpolator_post-trained")
    path, said = choose(cosmos)
    assert "tiny" in path
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    assert [line.partition(" is ignored")[0] for line in warnings] == [
        f"warning: {checkpoints}/{FOURTEEN}_post-trained",
        f"warning: {checkpoints}/{SEVEN}_post-trained",
        f"warning: {video}",
    ]
    assert all("not a folder with model.pt" in line for line in warnings[:2])
    assert "not that of a known model" in warnings[2]
    said = choose(cosmos, "--model", f"{SEVEN}_post-trained", code=4)
    assert "holds no model.pt" in said


def test_a_model_that_cannot_be_read_is_never_skipped(cosmos):
    put(cosmos, SEVEN)
    folder = promoted(cosmos, f"{SEVEN}_post-trained")
    (folder / "model.pt").unlink()
    assert f"{folder}: holds no model.pt" in choose(cosmos, code=4)
    (folder / "model.pt").symlink_to("gone")
    assert f"{folder}/model.pt: the weights are missing" in choose(cosmos, code=4)
    shutil.rmtree(folder)
    folder.symlink_to("/nowhere/at/all")
    assert f"{folder}: is a broken link" in choose(cosmos, code=4)
    assert choose(cosmos, "--model", "base", "nemo_assets")[0] == f"checkpoints/{SEVEN}/model.pt"


def test_a_link_to_a_model_is_a_model(cosmos, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk") / "model"
    folder = promoted(cosmos, f"{SEVEN}_post-trained")
    shutil.move(folder, disk)
    folder.symlink_to(disk)
    assert choose(cosmos)[0] == f"checkpoints/{SEVEN}_post-trained/model.pt"


def test_a_manifest_without_a_hash_warns_and_a_wrong_hash_is_refused(cosmos):
    folder = promoted(cosmos, f"{SEVEN}_post-trained")
    whole = contents(folder)
    for content in ("{}", "[]", '{"sha256": 3}', "null"):
        (folder / "manifest.json").write_text(content)
        path, said = choose(cosmos)
        assert path == f"checkpoints/{SEVEN}_post-trained/model.pt"
        assert "names no sha256 in its manifest.json" in said
        assert "17 frames" in said
    for content in ("", "{", "\0"):
        (folder / "manifest.json").write_text(content)
        said = choose(cosmos, code=4)
        assert f"{folder}/manifest.json: is damaged" in said
        assert "cosmos promote" in said
    for path, content in whole.items():
        path.write_bytes(content)
    stand_in_weights(folder / "model.pt", "another")
    said = choose(cosmos, code=4)
    assert "is damaged: its sha256" in said
    assert "if the weights are yours, delete its manifest.json" in said


@pytest.mark.parametrize("asked", [[], ["nemo_assets"], ["--model", "robots"], ["path"]])
def test_a_model_that_a_killed_promote_moved_is_restored(cosmos, asked):
    put(cosmos, SEVEN)
    folder = promoted(cosmos, f"{SEVEN}_post-trained_robots")
    whole = contents(folder)
    folder.rename(folder.with_name(f".{folder.name}.old"))
    put(cosmos, f".{folder.name}.building", "half")
    asked = ["--model", folder] if asked == ["path"] else asked
    path, said = choose(cosmos, *asked)
    assert path == f"checkpoints/{folder.name}/model.pt"
    assert f"warning: {folder} was missing: put back" in said
    assert contents(folder) == whole
    assert "warning" not in choose(cosmos, *asked)[1]


def test_a_short_prompt_without_the_upsampler_of_nvidias_command_is_said(cosmos):
    put(cosmos, SEVEN)
    option = "--set upsampler=checkpoints/Cosmos-UpsamplePrompt1-12B-Text2World"
    _, said = choose(cosmos, "my_videos", "--model", "base")
    (line,) = [line for line in said.splitlines() if "NVIDIA's command" in line]
    assert line.startswith("the prompt has 2 words:")
    assert "run `cosmos download my_videos " in line
    assert f"{option} --for generate`" in line
    (cosmos.cwd / option.partition("=")[2]).mkdir()
    assert f"to turn it on, add `{option}`" in choose(cosmos, "my_videos", "--model", "base")[1]
    quiet = ("--model", "base", "--set", "upsampler_word_limit=1")
    assert "NVIDIA's command" not in choose(cosmos, "my_videos", *quiet)[1]


def test_a_batch_line_may_name_its_file(cosmos):
    lines = [
        {"prompt": "A ball.", "output": "robot/pour"},
        {"prompt": "A cube.", "output": "v1.5.mp4"},
        {"prompt": "A star."},
    ]
    batch = cosmos.cwd / "batch.jsonl"

    def plan(*lines, code=0):
        batch.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return cosmos.json("generate", "tiny", "--batch", "batch.jsonl", "--dry-run", code=code)

    made = [os.path.relpath(video["path"], cosmos.cwd) for video in plan(*lines)["videos"]]
    assert made[:2] == ["outputs/robot/pour.mp4", "outputs/v1.5.mp4"]
    assert made[2].startswith("outputs/a-star-")
    for output in ("/tmp/a.mp4", "../a.mp4", 5, "a\n", "a.webm"):
        error = plan({"prompt": "A ball.", "output": output}, code=2)["error"]
        assert error.startswith("batch.jsonl:1: ")
    twice = plan(lines[0], {**lines[1], "output": "robot/pour.mp4"}, code=2)
    assert "batch.jsonl:2: another video of this command has the output pour.mp4" in twice["error"]
