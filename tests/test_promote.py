"""The formats that promote writes, on a checkpoint made without training."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
import torch

from cosmos_cli import exchange, hashes, model_card, paths, promote
from cosmos_cli.commands.promote import FormatOption
from cosmos_cli.errors import UserError
from cosmos_cli.model import weights
from cosmos_cli.paths import Run
from cosmos_cli.recipe import loading
from tests.helpers.command import settings

MODEL = "Cosmos-Tiny-Text2World"
FOLDER = f"{MODEL}_post-trained"
TINY = paths.EMBEDDED_DIR / "model.safetensors"


@pytest.fixture
def trained(cosmos):
    """Return a folder with a checkpoint of step 4 whose weights differ slightly from the base."""
    state = {name: tensor * 1.01 for name, tensor in weights.load_dit_state(TINY).items()}
    run = Run(cosmos.cwd / "outputs/posttraining/diffusion_text2world/tiny")
    weights.save_dit(run.model(4, "ema"), state, "pt")
    cosmos.state = state
    return cosmos


@pytest.mark.workflow
def test_generate_loads_whichever_format_was_promoted_last(trained):
    """Another format replaces the whole folder, so no older weights remain in it."""
    digests = set()
    for format_, name in paths.MODEL_FORMATS.items():
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
    assert manifest["base"]["sha256"] == hashes.sha256_file(TINY)
    assert manifest["recipe"]["model"] == MODEL
    assert "license: apache-2.0" in (folder / "README.md").read_text()


RUN = settings()


@pytest.fixture
def twice(trained):
    """Return `trained` with a second run, whose weights differ."""
    state = {name: tensor * 1.02 for name, tensor in trained.state.items()}
    run = Run(trained.cwd / "outputs/posttraining/diffusion_text2world/second")
    weights.save_dit(run.model(4, "ema"), state, "pt")
    return trained


SECOND = [*RUN, "--set", "name=second"]


def used(cosmos, *arguments):
    """Return the weights that generate would load. It has checked their hash."""
    done = cosmos.json("generate", "--prompt", "A ball.", "--dry-run", *arguments)
    return done["weights"]


def listing(cosmos):
    return sorted(path.name for path in (cosmos.cwd / "checkpoints").iterdir())


@pytest.mark.workflow
def test_two_runs_are_promoted_side_by_side_and_generate_uses_either(twice):
    first = twice.json("promote", "tiny", *RUN)
    refused = twice("promote", "tiny", *SECOND, "--step", "4", code=2).stderr
    assert "holds the model of another run" in refused
    assert "--set lora_rank=0 --set name=second --step 4 --name second`, or" in refused
    second = twice.json("promote", "tiny", *SECOND, "--name", "second")
    assert second["artifacts"] == [str(twice.cwd / "checkpoints" / f"{FOLDER}_second" / "model.pt")]
    assert second["next"].endswith("--model second")
    assert used(twice)["sha256"] == second["sha256"]
    assert used(twice, "--model", "second")["sha256"] == second["sha256"]
    assert used(twice, "--model", FOLDER)["sha256"] == first["sha256"]
    assert used(twice, "tiny", *RUN)["sha256"] == first["sha256"]
    assert used(twice, "tiny", *SECOND)["sha256"] == second["sha256"]
    refused = twice("promote", "tiny", *RUN, "--name", "second", code=2).stderr
    assert "--name tiny" in refused
    twice("promote", "tiny", *RUN, "--name", "second", "--yes")
    assert used(twice, "--model", "second")["sha256"] == first["sha256"]
    assert listing(twice) == [FOLDER, f"{FOLDER}_second"]
    measured = twice.json(
        "evaluate", "--model", "base", "--model", FOLDER, "--model", "second", "--prompts", "1",
        *settings("num_steps=2"),
    )  # fmt: skip
    assert list(measured["models"]) == ["base", FOLDER, "second"]


@pytest.mark.workflow
@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".a", "-a", "a b", "base", "promoted", "a" * 101, "é" * 60, "a\n"]
)
def test_a_name_that_cannot_be_part_of_a_folder_name_is_refused(trained, name):
    refused = trained("promote", "tiny", *RUN, f"--name={name}", code=2).stderr
    assert "--name" in refused
    assert not (trained.cwd / "checkpoints").exists()


@pytest.mark.workflow
@pytest.mark.parametrize("manifest", [None, "{}", "[]", "{"])
def test_files_that_promote_did_not_write_are_replaced_only_with_yes(trained, manifest):
    folder = trained.cwd / "checkpoints" / FOLDER
    folder.mkdir(parents=True)
    (folder / "model.pt").write_text("by hand")
    if manifest:
        (folder / "manifest.json").write_text(manifest)
    for more in ([], ["--dry-run"]):
        refused = trained("promote", "tiny", *RUN, *more, code=2).stderr
        assert "holds files that promote did not write; keep both with `cosmos promote" in refused
        assert (folder / "model.pt").read_text() == "by hand"
    done = trained.json("promote", "tiny", *RUN, "--yes")
    assert used(trained)["sha256"] == done["sha256"]


@pytest.mark.workflow
def test_a_model_copied_by_hand_makes_a_video(trained):
    folder = trained.cwd / "checkpoints" / FOLDER
    folder.mkdir(parents=True)
    (saved,) = trained.cwd.glob("outputs/*/*/*/checkpoints/iter_000000004_ema_model.pt")
    shutil.copy(saved, folder / "model.pt")
    made = trained.json("generate", "--prompt", "A ball.", *settings("num_steps=2"))
    about = json.loads((trained.cwd / made["artifacts"][0]).with_suffix(".json").read_text())
    assert about["weights"] == made["weights"]
    assert made["weights"]["sha256"] == hashes.sha256_file(saved)


@pytest.mark.workflow
def test_a_second_promotion_into_the_same_folder_is_refused_at_once(twice):
    with exchange.alone(twice.cwd / "checkpoints" / FOLDER):
        refused = twice("promote", "tiny", *RUN, code=2).stderr
        assert f"{FOLDER}: another cosmos promote is writing this model; wait for it" in refused
        twice("promote", "tiny", *RUN, "--name", "other")
    started = [twice.start("promote", "tiny", *which, "--yes") for which in (RUN, SECOND)]
    errors = [process.communicate(timeout=100)[1] for process in started]
    assert sorted(process.returncode for process in started) in ([0, 0], [0, 2]), errors
    assert used(twice, "--model", FOLDER)
    assert listing(twice) == [FOLDER, f"{FOLDER}_other"]


@pytest.mark.workflow
def test_a_full_disk_leaves_the_old_model_and_nothing_unfinished(twice):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))

    process = twice.start("promote", "tiny", *RUN, preexec_fn=limit)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, listing(twice)) == (4, []), err
    first = twice.json("promote", "tiny", *RUN)
    process = twice.start("promote", "tiny", *SECOND, "--yes", preexec_fn=limit)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 4
    assert "cannot be written" in err
    assert used(twice)["sha256"] == first["sha256"]
    assert listing(twice) == [FOLDER]


@pytest.mark.workflow
# Both signals raise the same exception.
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_promotion_leaves_the_old_model_and_nothing_else(twice, number):
    first = twice.json("promote", "tiny", *RUN)
    process = twice.start("promote", "tiny", *SECOND, "--yes")
    building = twice.cwd / "checkpoints" / f".{FOLDER}.building"
    while not list(building.glob(".*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 128 + number, err
    assert used(twice)["sha256"] == first["sha256"]
    assert listing(twice) == [FOLDER]


@pytest.mark.workflow
@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_old_or_the_new_model_is_used(twice, kills):
    """Half of the kills hit the writing phase, which is shorter than the start."""
    rng = random.Random(kills)
    digests = {twice.json("promote", "tiny", *which, "--yes")["sha256"] for which in (SECOND, RUN)}
    building = twice.cwd / "checkpoints" / f".{FOLDER}.building"
    started = time.monotonic()
    twice.start("promote", "tiny", *RUN).communicate(timeout=100)
    whole = time.monotonic() - started
    for kill in range(kills):
        process = twice.start("promote", "tiny", *(SECOND, RUN)[kill % 2], "--yes")
        if kill % 2:
            while not building.exists() and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(0, whole))
        process.kill()
        process.communicate(timeout=100)
        found = used(twice)
        assert found["path"] == str(twice.cwd / "checkpoints" / FOLDER / "model.pt")
        assert found["sha256"] in digests
    done = twice.json("promote", "tiny", *RUN, "--yes")
    assert used(twice)["sha256"] == done["sha256"]
    assert listing(twice) == [FOLDER]


def under_strace(cosmos, log, *options):
    """Promote the second run under strace."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed (apt-get install strace)")
    command = [sys.executable, "-m", "cosmos_cli"]
    traced = subprocess.run(
        ["strace", "-f", "-qq", "-o", log, *options, *command, "promote", "tiny", *SECOND, "--yes"],
        cwd=cosmos.cwd, env=cosmos.environment(), capture_output=True, text=True, check=False,
        timeout=200,
    )  # fmt: skip
    if "ptrace" in traced.stderr:
        pytest.skip(f"strace may not trace here: {traced.stderr.strip()}")
    return traced


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("call", "moments"),
    [
        ("rename", [-2]),
        pytest.param("rename", [-3, -1], marks=pytest.mark.slow),
        pytest.param("renameat2", [-1], marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_the_exchange_leaves_a_model(twice, tmp_path, call, moments):
    """For rename, renameat2 is made to fail, so the last three renames swap the folders instead.

    The kill comes before the call, so all earlier renames have happened.
    """
    log = tmp_path / "strace"
    lacking = ["-e", "inject=renameat2:error=EINVAL"] if call == "rename" else []
    first = twice.json("promote", "tiny", *RUN)
    under_strace(twice, log, "-e", "trace=rename,renameat2", *lacking)
    second = used(twice)["sha256"]
    assert second != first["sha256"]
    calls = [line for line in log.read_text().splitlines() if f" {call}(" in line]
    for moment in moments:
        assert f"{FOLDER}" in calls[moment]
        twice("promote", "tiny", *RUN, "--yes")
        inject = f"inject={call}:signal=KILL:when={len(calls) + 1 + moment}"
        killed = under_strace(twice, log, *lacking, "-e", inject)
        assert killed.returncode in (-9, 137), killed.stderr
        left = f".{FOLDER}.old" in listing(twice)
        assert left == (call == "rename" and moment != -3)
        assert (FOLDER in listing(twice)) == (moment != -2)
        new = call == "rename" and moment == -1
        assert used(twice)["sha256"] == (second if new else first["sha256"])
    assert twice.json("promote", "tiny", *SECOND, "--yes")["sha256"] == second
    assert listing(twice) == [FOLDER]


@pytest.mark.workflow
def test_on_a_disk_without_locks_promote_warns_and_continues(twice, tmp_path):
    done = under_strace(twice, tmp_path / "strace", "-e", "inject=flock:error=ENOLCK")
    assert done.returncode == 0, done.stderr
    assert "cannot be locked" in done.stderr
    assert listing(twice) == [FOLDER]


@pytest.mark.workflow
def test_a_recipe_of_another_model_than_the_run_is_refused(trained):
    run = Run(trained.cwd / "outputs/posttraining/diffusion_text2world/tiny")
    run.resolved.write_text(loading.dump(loading.load("tiny").recipe))
    other = (
        "tiny",
        "--set",
        "model=Cosmos-Tiny-Video2World",
        "--set",
        "group=diffusion_text2world",
    )
    refused = trained("promote", *other, code=2)
    assert f"this run trained {MODEL}" in refused.stderr
    refused = trained("evaluate", *other, "--steps", "all", code=2)
    assert f"this run trained {MODEL}" in refused.stderr


@pytest.mark.workflow
def test_an_unknown_format_is_refused(trained):
    refused = trained("promote", "tiny", "--format", "gguf", code=2)
    assert "safetensors" in refused.stderr


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("tensor", "in_file"),
    [("net.final.linear.weight", "net.final_layer.linear.weight"),
     ("logvar.weight", "logvar.1.weight")],
)  # fmt: skip
def test_a_checkpoint_that_is_not_finite_is_refused_by_tensor(trained, tensor, in_file):
    trained.state[tensor].view(-1)[0] = float("nan")
    run = Run(trained.cwd / "outputs/posttraining/diffusion_text2world/tiny")
    weights.save_dit(run.model(4, "ema"), trained.state, "pt")
    err = trained("promote", "tiny", "--set", "lora_rank=0", code=4).stderr
    words = (
        f"{run.model(4, 'ema')}: holds numbers that are not finite (NaN or infinity) in {in_file};"
    )
    assert words in err
    assert not list((trained.cwd / "checkpoints").iterdir())


def about(format_):
    return {
        "format": format_, "weights": "ema", "step": 4, "run": "r", "base": {}, "checkpoint": {},
    }  # fmt: skip


@pytest.mark.parametrize("format_", paths.MODEL_FORMATS)
def test_a_model_derived_from_nvidias_says_so_as_its_licence_asks(tmp_path, format_):
    r = loading.load("nemo_assets").recipe
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
        f"license_link: {model_card.LICENCE_URL}",
        "library_name: cosmos-posttrain",
        "pipeline_tag: text-to-video",
    ]
    assert "Built on NVIDIA Cosmos" in card


def test_weights_that_do_not_read_back_as_written_are_not_put_in_place(tmp_path, monkeypatch):
    r = loading.load("tiny").recipe
    state = weights.load_dit_state(TINY)
    true_save = weights.save_dit

    def save_damaged(path, state, format_):
        true_save(path, {**state, "net.t_norm.weight": state["net.t_norm.weight"] + 1}, format_)

    monkeypatch.setattr(weights, "save_dit", save_damaged)
    with pytest.raises(UserError, match="does not read back as it was written"):
        promote._write_folder(r, tmp_path / "model", state, about("pt"))
    assert not (tmp_path / "model").exists()


def test_every_format_is_offered():
    assert {*get_args(get_args(FormatOption)[0])} == {*paths.MODEL_FORMATS}
