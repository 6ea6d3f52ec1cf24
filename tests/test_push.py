"""promote --push against a hub on the loopback, with the faults of a real one."""

import copy
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file

from cosmos_cli import paths
from cosmos_cli.model import lora_files, weights
from cosmos_cli.model.edm import FIXED_SIGMAS
from cosmos_cli.paths import Run
from cosmos_cli.spec import TINY
from tests.helpers.command import settings
from tests.helpers.hub import Online, serve

pytestmark = pytest.mark.workflow

FOLDER = "Cosmos-Tiny-Text2World_post-trained"
BASE = paths.EMBEDDED_DIR / "model.safetensors"
REPO = ("models", "me/robots")
PROMPTS = ["A teal robot: it moves left.", "A red ball."]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a run that trained all weights, and one that trained a LoRA."""
    root = tmp_path_factory.mktemp("push")
    runs = root / "outputs/posttraining/diffusion_text2world"
    state = {name: tensor * 1.01 for name, tensor in weights.load_dit_state(BASE).items()}
    run = Run(runs / "tiny")
    weights.save_dit(run.model(4, "ema"), state, "pt")
    run.samples.mkdir()
    for i in range(2):
        run.sample(4, i).write_bytes(b"mp4 %d" % i)
    run.sample_prompts(4).write_text(json.dumps(PROMPTS))
    width = TINY.dit.width
    factors = {
        f"net.blocks.0.self_attn.q.lora_{side}.weight": torch.full(shape, 0.02)
        for side, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    lora_files.save_lora(Run(runs / "small").lora(4, "ema"), factors, 1.5)
    return root


WHOLE = ("tiny", *settings())
LORA = ("tiny", *settings("name=small"), "--set", "lora_rank=2", "--name", "small")


@pytest.fixture
def cosmos(root):
    cosmos = Online(root)
    cosmos.token = "right"
    cosmos.variables = {"HF_HUB_DISABLE_XET": "1"}
    with serve({}) as cosmos.hub:
        yield cosmos


def push(cosmos, *more, of=WHOLE, code=0):
    return cosmos.json("promote", *of, "--push", REPO[1], *more, code=code)


def pushed(cosmos):
    return {name: c for name, c in cosmos.hub.repos.get(REPO, {}).items() if name[0] != "."}


def sent(cosmos):
    """The requests that carry the content of a file."""
    return [path for method, path in cosmos.hub.log if "/lfs/" in path or "/commit/" in path]


def test_a_push_is_private_and_one_commit_and_a_second_sends_nothing(cosmos):
    done = push(cosmos)
    assert (done["push"]["private"], done["push"]["repo"]) == (True, "me/robots")
    assert cosmos.hub.commits == ["me/robots"]
    assert cosmos.hub.private == {"me/robots"}
    assert pushed(cosmos).keys() == {
        "README.md", "manifest.json", "model.pt", "recipe.yaml",
        "samples/step_000000004_sample0.mp4", "samples/step_000000004_sample1.mp4",
    }  # fmt: skip
    model = cosmos.cwd / "checkpoints" / FOLDER / "model.pt"
    assert pushed(cosmos)["model.pt"] == model.read_bytes()
    cosmos.hub.log.clear()
    again = push(cosmos)
    assert (again["push"]["uploaded"], again["push"]["bytes"]) == (0, 0)
    assert again["push"]["commit"] == done["push"]["commit"]
    assert sent(cosmos) == []
    assert push(cosmos, "--public")["push"]["private"] is False
    assert cosmos.hub.private == set()
    assert sent(cosmos) == []


def test_nothing_that_is_pushed_names_a_path_of_this_machine(cosmos):
    push(cosmos)
    assert "holds the model of another run" in push(cosmos, of=LORA, code=2)["error"]
    push(cosmos, "--yes", of=LORA)
    assert {"lora.safetensors", "lora_comfyui.safetensors"} <= pushed(cosmos).keys()
    for name, content in pushed(cosmos).items():
        if name.endswith((".md", ".json", ".yaml")):
            assert str(cosmos.cwd) not in content.decode(), name
            assert str(paths.EMBEDDED_DIR) not in content.decode(), name


def test_a_dry_run_lists_files_and_bytes_and_writes_nothing(cosmos):
    done = cosmos("promote", *WHOLE, "--push", REPO[1], "--dry-run", "--json")
    plan = json.loads(done.stdout)["push"]
    sizes = re.findall(r"^upload +(\S+ \w?B)  (\S+)$", done.stderr, re.MULTILINE)
    assert "model.pt" in {name for _, name in sizes}
    assert plan["uploaded"] == len(sizes)
    assert plan["bytes"] > BASE.stat().st_size
    assert {method for method, _ in cosmos.hub.log} == {"GET"}
    push(cosmos)
    plan = push(cosmos, "--dry-run")["push"]
    assert (plan["uploaded"], plan["bytes"]) == (0, 0)


def test_another_format_replaces_the_weights_in_one_commit(cosmos):
    push(cosmos)
    cosmos.hub.repos[REPO]["notes.txt"] = b"by hand"
    push(cosmos, "--format", "safetensors", "--name", "safe")
    assert len(cosmos.hub.commits) == 2
    assert {"model.safetensors", "notes.txt"} <= pushed(cosmos).keys()
    assert "model.pt" not in pushed(cosmos)


FAULTS = {
    "not allowed to create": ({"storm": {"repos/create": [403]}}, "the token may not write there"),
    "not allowed to upload": ({"storm": {"preupload": [403]}}, "the token may not write there"),
    "an upload is refused": ({"storm": {"/lfs/": [403]}}, "the token may not write there"),
    "cut at the commit": ({"hang_up": {"/commit/": 1}}, "cannot be reached"),
    "cut after the commit": ({"after": {"/commit/": 1}}, "cannot be reached"),
    "another push": ({"storm": {"/commit/": [412]}}, "was changed during the push"),
    "a bad request": ({"storm": {"/commit/": [400]}}, "the hub answered"),
}


RARE = {"not allowed to upload", "an upload is refused", "a bad request"}


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        pytest.param(*fault, id=name, marks=[pytest.mark.slow] if name in RARE else [])
        for name, fault in FAULTS.items()
    ],
)
def test_after_a_fault_the_same_command_completes_the_push(cosmos, faults, words):
    vars(cosmos.hub).update(copy.deepcopy(faults))
    failed = push(cosmos, code=4)["error"]
    assert re.match(r"https?://\S+/me/robots: ", failed)
    assert "\n" not in failed
    assert words in failed
    assert "run the same command again" in failed or "export HF_TOKEN" in failed
    committed = "after" in faults
    assert bool(pushed(cosmos)) == committed
    assert cosmos.hub.private == ({"me/robots"} if REPO in cosmos.hub.repos else set())
    arrived = set(cosmos.hub.blobs)
    cosmos.hub.log.clear()
    push(cosmos)
    assert "model.pt" in pushed(cosmos)
    assert len(cosmos.hub.commits) == 1
    assert not [path for path in sent(cosmos) if path.removeprefix("/lfs/") in arrived]


def test_xet_which_uploads_to_the_real_hub_reports_a_refusal_likewise(cosmos):
    """Only its first request is answered here: the store behind it has no stand-in."""
    cosmos.variables = {}
    cosmos.hub.storm = {"xet-write-token": [403]}
    assert "the token may not write there" in push(cosmos, code=4)["error"]
    assert not pushed(cosmos)


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_ctrl_c_ends_an_upload_at_once(cosmos, disabled):
    cosmos.variables = {"HF_HUB_DISABLE_XET": disabled}
    cosmos.hub.storm = {"xet-write-token": [500] * 9, "objects/batch": [503] * 9}
    process = cosmos.start("promote", *WHOLE, "--push", REPO[1])
    while not any(re.search("xet-write|batch", path) for _, path in cosmos.hub.log):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 130, err
    assert "the same command resumes" in err
    assert not pushed(cosmos)


def test_a_busy_hub_and_cut_uploads_are_tried_again(cosmos):
    cosmos.hub.storm = {"repos/create": [429], "objects/batch": [503], "/commit/": [429, 500]}
    cosmos.hub.hang_up = {"/lfs/": 1}
    push(cosmos)
    assert "model.pt" in pushed(cosmos)
    assert len(cosmos.hub.commits) == 1


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, "needs a token that may write; create one on"), ("wrong", "does not know the token")],
)
def test_without_a_valid_token_nothing_is_promoted_or_sent(cosmos, token, words):
    cosmos.token = token
    refused = push(cosmos, "--name", "other", code=4)["error"]
    assert words in refused
    assert not (cosmos.cwd / "checkpoints" / f"{FOLDER}_other").exists()
    assert {method for method, _ in cosmos.hub.log} <= {"GET"}


def test_a_public_repository_and_one_of_other_files_are_refused(cosmos):
    cosmos.hub.repos[REPO] = {"README.md": b"public"}
    assert "add `--public`" in push(cosmos, code=2)["error"]
    cosmos.hub.private = {"me/robots"}
    assert "did not push" in push(cosmos, code=2)["error"]
    push(cosmos, "--yes")
    assert "model.pt" in pushed(cosmos)


@pytest.mark.parametrize("name", ["robots", "a/b/c", "me/", "me/a b", "me/a--b", "", "../x"])
def test_a_name_that_is_no_repository_is_refused(cosmos, name):
    refused = cosmos("promote", *WHOLE, f"--push={name}", code=2).stderr
    assert "--push" in refused
    assert cosmos.hub.log == []


def test_public_without_push_is_refused(cosmos):
    assert "add `--push" in cosmos("promote", *WHOLE, "--public", code=2).stderr


def test_the_card_shows_licence_data_samples_and_scores(cosmos):
    sha256 = push(cosmos)["sha256"]
    record = {
        "prompts": 2, "files": [], "clips": "held-out", "models": {
            name: {"weights": digest, "edm": {f"sigma_{s:.2g}": value for s in FIXED_SIGMAS}}
            for name, digest, value in (("base", "0" * 64, 0.5), ("promoted", sha256, 0.25))
        },
    }  # fmt: skip
    page = cosmos.cwd / "outputs/evaluation.json"
    page.write_text(json.dumps(record))
    assert push(cosmos)["push"]["uploaded"] == 1
    card = pushed(cosmos)["README.md"].decode()
    assert "license: apache-2.0" in card
    assert "hf download me/robots --local-dir" in card
    assert f"| EDM error, sigma {FIXED_SIGMAS[0]:.2g} |  | 0.5000 | 0.2500 |" in card
    assert "text: 'A teal robot: it moves left.'" in card
    assert "url: samples/step_000000004_sample1.mp4" in card
    assert "## Data" in card
    del record["models"]["promoted"]["edm"]["sigma_" + f"{FIXED_SIGMAS[0]:.2g}"]
    page.write_text(json.dumps(record))
    said = cosmos("promote", *WHOLE, "--push", REPO[1]).stderr
    page.unlink()
    assert "evaluation.json: another version wrote it" in said
    assert "## Scores" not in pushed(cosmos)["README.md"].decode()


def test_what_a_colleague_downloads_makes_the_same_video(cosmos, tmp_path):
    push(cosmos)
    made = cosmos.json(
        "generate", "--prompt", "A ball.", "--model", FOLDER, *settings("num_steps=2")
    )
    folder = tmp_path / "checkpoints" / f"{FOLDER}_tiny"
    snapshot_download(REPO[1], endpoint=cosmos.hub.url, token="right", local_dir=folder)
    colleague = Online(tmp_path)
    colleague.hub = cosmos.hub
    other = colleague.json(
        "generate", "--prompt", "A ball.", "--model", folder.name, *settings("num_steps=2")
    )
    digests = [
        json.loads((cwd / done["artifacts"][0]).with_suffix(".json").read_text())["mp4_sha256"]
        for cwd, done in ((cosmos.cwd, made), (tmp_path, other))
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_the_example_of_the_card_loads_the_model_with_diffusers(cosmos, tmp_path, kind):
    """The code runs as it stands; only the folder of the base is filled in."""
    of, format_ = (LORA, "pt") if kind == "lora" else ((*WHOLE, "--name", "whole"), "diffusers")
    push(cosmos, "--format", format_, of=of)
    code = re.search(r"```python\n(.*?)```", pushed(cosmos)["README.md"].decode(), re.DOTALL)[1]
    base = weights.load_dit_state(BASE)
    weights.save_diffusers(tmp_path / "base" / "transformer", base, TINY.dit)
    code = code.replace('"FOLDER"', repr(str(tmp_path / "base")))
    code += 'torch.save(transformer.state_dict(), "state.pt")\n'
    environment = {**cosmos.environment(), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if kind == "whole":
        expected = load_file(
            cosmos.cwd
            / "checkpoints"
            / f"{FOLDER}_whole"
            / "transformer"
            / "diffusion_pytorch_model.safetensors"
        )
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], t.bfloat16()) for name, t in expected.items())
    else:
        factors = {name: t for name, t in state.items() if "lora_" in name}
        assert len(factors) == 2
        assert all(torch.all(t == torch.tensor(0.02).bfloat16()) for t in factors.values())
