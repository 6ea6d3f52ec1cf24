"""The promote and generate verbs on the embedded model."""

import json
import shutil
import signal
import time

import pytest
import torch
from conftest import Cosmos, settings

from cosmos_cli import layout
from cosmos_cli.model import video, weights

pytestmark = pytest.mark.workflow

QUICK = settings("num_steps=3", "guidance=2")


def digest(result, index=0):
    return layout.sha256_file(result["artifacts"][index])


def generate(cosmos, *arguments, code=0):
    done = cosmos.json("generate", *arguments, *QUICK, code=code)
    done["artifacts"] = [cosmos.cwd / path for path in done["artifacts"]]
    return done


def test_a_prompt_becomes_an_mp4_with_sidecar_text_and_contact_sheet(cosmos):
    result = generate(cosmos, "--prompt", "A red [bold]ball[/bold] moves left.")
    (path,) = result["artifacts"]
    info = video.probe(path)
    assert (info.frames, info.fps, info.height, info.width) == (9, 16.0, 64, 96)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["mp4_sha256"] == layout.sha256_file(path)
    assert about["seed"] == 1
    assert about["weights"]["sha256"] == layout.sha256_file(
        layout.EMBEDDED_DIR / "model.safetensors"
    )
    assert about["recipe"]["num_steps"] == 3
    assert path.with_suffix(".txt").read_text() == "A red [bold]ball[/bold] moves left.\n"
    assert path.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"


def test_the_same_seed_gives_the_same_file_alone_or_in_a_batch(cosmos):
    (cosmos.cwd / "batch.jsonl").write_text(
        '{"prompt": "A much longer prompt about a blue star that spins in place."}\n'
        "\n"
        '{"prompt": "A red ball.", "seed": 5}\n'
    )
    batch = generate(cosmos, "--batch", "batch.jsonl", "-o", "batch")
    alone = generate(cosmos, "--prompt", "A red ball.", "--seed", "5", "-o", "alone")
    other = generate(cosmos, "--prompt", "A red ball.", "--seed", "6", "-o", "other")
    assert digest(batch, 1) == digest(alone)
    assert digest(other) != digest(alone)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--prompt"),
        (["--prompt", "  "], "empty"),
        (["--batch", "missing.jsonl"], "missing.jsonl"),
        (["--batch", "bad.jsonl"], "bad.jsonl:2"),
        (["--prompt", "a", "--set", "num_frames=12"], "num_frames"),
        (["--prompt", "a", "--set", "height=100"], "height"),
        (["--prompt", "a", "--prompt", "b", "-o", "one.mp4"], "one file for 2"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(cosmos, arguments, word):
    (cosmos.cwd / "bad.jsonl").write_text('{"prompt": "fine"}\n{"text": "no prompt"}\n')
    done = cosmos("generate", *arguments, code=2)
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (cosmos.cwd / "outputs").exists()


def test_missing_weights_are_exit_code_four(cosmos):
    done = cosmos("generate", "nemo_assets", "--prompt", "a", code=4)
    assert "cosmos download" in done.stderr
    done = cosmos("generate", "--model", "nowhere", "--prompt", "a", code=4)
    assert "nowhere" in done.stderr


def test_an_output_that_cannot_be_written_is_exit_code_four(cosmos):
    (cosmos.cwd / "file").write_text("in the way")
    done = cosmos("generate", "--prompt", "a", "-o", "file/videos", *QUICK, code=4)
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_batch_has_only_whole_videos(cosmos):
    lines = [json.dumps({"prompt": "A ball.", "seed": seed}) for seed in range(500)]
    (cosmos.cwd / "batch.jsonl").write_text("\n".join(lines))
    process = cosmos.start("generate", "--batch", "batch.jsonl", *QUICK)
    deadline = time.monotonic() + 90
    while len(list(cosmos.cwd.glob("outputs/[!.]*.mp4"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    made = list(cosmos.cwd.glob("outputs/[!.]*.mp4"))
    assert len(made) >= 2
    assert all(video.probe(path).frames == 9 for path in made)
    assert not list(cosmos.cwd.glob("outputs/.*"))


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A folder with a finished run of two steps."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(prepared / "datasets", root / "datasets")
    cosmos = Cosmos(root)
    cosmos("train", "tiny", *RUN)
    return cosmos


RUN = settings(
    "max_steps=2", "global_batch_size=2", "learning_rate=1e-2", "warmup_steps=0",
    "lr_start_factor=1", "min_free_disk_gb=0.1",
)  # fmt: skip


def test_promote_describes_the_model_and_generate_finds_it(trained):
    promoted = trained.json("promote", "tiny", *RUN)
    folder = trained.cwd / "checkpoints" / "Cosmos-Tiny-Text2World_post-trained"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert promoted["step"] == manifest["step"] == 2
    assert manifest["weights"] == "ema"
    assert manifest["sha256"] == layout.sha256_file(folder / "model.pt")
    assert manifest["base"]["sha256"]
    assert min(manifest["relative_change"].values()) > 0
    assert "base_model: Cosmos-Tiny-Text2World" in (folder / "README.md").read_text()

    state = weights.load_dit_state(folder / "model.pt")
    (saved,) = trained.cwd.glob("outputs/*/*/*/checkpoints/iter_000000002_ema_model.pt")
    assert all(torch.equal(v, state[k]) for k, v in weights.load_dit_state(saved).items())

    result = trained.json("generate", "--prompt", "A square.", "--set", "num_steps=2")
    about = json.loads((trained.cwd / result["artifacts"][0]).with_suffix(".json").read_text())
    assert about["weights"]["sha256"] == manifest["sha256"]
    assert about["recipe"]["num_frames"] == 9

    base = trained.json(
        "generate", "--model", "base", "--prompt", "A square.", "-o", "base", *QUICK
    )
    assert json.loads((trained.cwd / base["artifacts"][0]).with_suffix(".json").read_text())[
        "weights"
    ]["path"].endswith("model.safetensors")


def test_promote_names_the_steps_there_are(trained):
    assert "saved are 2" in trained("promote", "tiny", "--step", "7", *RUN, code=4).stderr
    assert "latest" in trained("promote", "tiny", "--step", "last", *RUN, code=2).stderr
    other = trained("promote", "tiny", *RUN, "--set", "name=never", code=4)
    assert "cosmos train" in other.stderr


def test_promote_refuses_weights_that_do_not_differ_from_the_base(trained):
    (saved,) = trained.cwd.glob("outputs/*/*/*/checkpoints/iter_000000002_reg_model.pt")
    whole = saved.read_bytes()
    try:
        base = weights.load_dit_state(layout.EMBEDDED_DIR / "model.safetensors")
        weights.save_dit(saved, base, "pt")
        refused = trained("promote", "tiny", "--weights", "reg", *RUN, code=4)
        assert "does not differ" in refused.stderr
        saved.write_bytes(whole[: len(whole) // 2])
        refused = trained("promote", "tiny", "--weights", "reg", *RUN, code=4)
        assert saved.name in refused.stderr
        assert "Traceback" not in refused.stderr
    finally:
        saved.write_bytes(whole)
