"""What is not a number ends a run before it is saved, with step, clips and noise levels."""

import re
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from cosmos_cli import paths
from cosmos_cli.errors import UserError
from cosmos_cli.files import read_json, write_json
from cosmos_cli.generate.jobs import Job, Weights
from cosmos_cli.generate.phases import generate
from cosmos_cli.generate.video_models import load_denoiser
from cosmos_cli.model import weights
from cosmos_cli.model.finite import not_finite
from cosmos_cli.prep import embedding_files
from cosmos_cli.recipe import loading
from cosmos_cli.spec import TINY as SPEC
from cosmos_cli.train import metrics
from cosmos_cli.train.data import Batch
from tests.helpers.command import settings
from tests.helpers.runs import copy_of, find_run, options, train

TINY = paths.EMBEDDED_DIR / "model.safetensors"
FINAL = "net.final.linear.weight"


def plant(source, target, name, value):
    """A copy of a safetensors file with one number of a tensor replaced."""
    state = load_file(source)
    state[name].view(-1)[-1] = value
    save_file(state, target)
    return target


@pytest.mark.workflow
def test_a_loss_that_is_not_finite_stops_the_run(prepared, tmp_path):
    """All weights are finite, but so large that the loss overflows."""
    cosmos = copy_of(prepared, tmp_path)
    weights = load_file(TINY)
    weights[FINAL] *= 1e37
    save_file(weights, tmp_path / "base.safetensors")
    pairs = ("base=base.safetensors", "num_processes=2", "micro_batch_size=1", "holdout_share=0")
    cosmos("prep", "tiny", *options("nan", *pairs))
    err = train(cosmos, "nan", *pairs, code=6).stderr
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "step 1: the loss is not finite" in line
    # A clip of each process.
    assert len(re.findall(r"clip\d\S* \(sigma [0-9.]+\)", line)) == 2
    assert find_run(cosmos, "nan").resumable_steps() == []


@pytest.mark.workflow
@pytest.mark.parametrize("pairs", [("zero_stage=3", "num_processes=2"), ("zero_stage=1",)])
def test_a_base_that_is_not_finite_is_refused_before_the_first_step(prepared, tmp_path, pairs):
    cosmos = copy_of(prepared, tmp_path)
    plant(TINY, tmp_path / "base.safetensors", FINAL, float("nan"))
    pairs = ("base=base.safetensors", "micro_batch_size=1", *pairs, "max_steps=2")
    err = train(cosmos, "nan", *pairs, code=4).stderr
    assert "base.safetensors: holds numbers that are not finite" in err
    assert FINAL in err
    assert find_run(cosmos, "nan").resumable_steps() == []


def test_a_sum_that_overflows_is_not_reported_as_not_finite():
    large = torch.full((4,), 3e38)
    one = torch.tensor([1.0, float("nan"), 2.0])
    both = torch.tensor([float("inf"), float("-inf")]).bfloat16()
    tensors = {"large": large, "nan": one, "inf": both, "int": torch.ones(2, dtype=torch.int64)}
    assert not_finite({**tensors, "empty": torch.empty(0)}) == ["nan", "inf"]


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """A copy of the embedded model to spoil."""
    folder = tmp_path / "tiny"
    shutil.copytree(paths.EMBEDDED_DIR, folder)
    monkeypatch.setattr(paths, "EMBEDDED_DIR", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("model.safetensors", FINAL),
        ("model.safetensors", "net.blocks.0.self_attn.q_norm.weight"),
        ("tokenizer.safetensors", "std"),
        ("tokenizer.safetensors", "decoder.conv_out.0.conv3d.weight"),
        ("t5/model.safetensors", "shared.weight"),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_file_and_tensor(embedded, file, tensor, value):
    plant(embedded / file, embedded / file, tensor, value)
    small = ["num_frames=9", "height=64", "width=96", "num_steps=2"]
    r = loading.load("tiny", small).recipe
    base = paths.model_files(r.spec, r.checkpoints_dir).dit
    job = Job("A red ball.", r, Weights(base, "of the file"), embedded.parent / "out.mp4")
    with pytest.raises(UserError) as caught:
        list(generate([job], "cpu"))
    assert caught.value.code == 4
    where = embedded / "t5" if "t5" in file else embedded / file
    words = f"{where}: holds numbers that are not finite (NaN or infinity) in {tensor}"
    assert str(caught.value).startswith(words)
    assert not job.path.exists()


@pytest.mark.parametrize("format", ["pt", "safetensors", "diffusers"])
def test_the_tensor_has_the_name_that_the_file_has_for_it(tmp_path, format):
    state = weights.load_dit_state(TINY)
    state[FINAL][0, 0] = float("nan")
    if format == "diffusers":
        weights.save_diffusers(path := tmp_path / "model", state, SPEC.dit)
    else:
        weights.save_dit(path := tmp_path / f"model.{format}", state, format)
    r = loading.load("tiny").recipe
    names = {"pt": "net.final_layer.linear", "safetensors": "net.final.linear"}
    with pytest.raises(UserError, match="not finite") as caught:
        load_denoiser(r, path, "cpu")
    assert f"{path}: " in str(caught.value)
    assert f" {names.get(format, 'proj_out')}.weight;" in str(caught.value)


@pytest.mark.workflow
def test_a_latent_that_is_not_finite_ends_its_video_and_not_the_batch(cosmos):
    """With finite weights that are too large, as after a strength far beyond 1."""
    state = load_file(TINY)
    state[FINAL] *= 1e36
    save_file(state, cosmos.cwd / "large.safetensors")
    ask = ("--prompt", "A red ball.", "--prompt", "A blue ball.", *settings("num_steps=2"))
    done = cosmos.json("generate", "--model", "large.safetensors", *ask, code=4)
    assert [video["exit_code"] for video in done["videos"]] == [4, 4]
    assert all("latent is not finite" in video["error"] for video in done["videos"])
    assert not list(cosmos.cwd.rglob("*.mp4"))


@pytest.mark.workflow
def test_prep_and_train_refuse_an_embedding_that_is_not_finite(prepared, tmp_path):
    cosmos = copy_of(prepared, tmp_path)
    path = tmp_path / "datasets/tiny/t5_xxl/clip1.pickle"
    embedding = embedding_files.read_embedding(path, SPEC.text)
    embedding[-1, -1] = float("nan")
    embedding_files.write_embedding(path, embedding)
    # As in the manifest of an earlier version, without the hash that would tell.
    manifest = tmp_path / "datasets/tiny/manifest.json"
    listed = read_json(manifest)
    for clip in listed["clips"]:
        del clip["text_sha256"]
    write_json(manifest, listed)
    trained = train(cosmos, "nan", "max_steps=4", code=4)
    prepared = cosmos("prep", "tiny", *settings(), code=4)
    for done in (trained, prepared):
        assert "clip1.pickle: holds numbers that are not finite" in done.stderr


@pytest.mark.parametrize("norm", [-1.0, float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_the_run(norm):
    latent, one = torch.zeros(1, 16, 2, 8, 12), torch.tensor([0.5])
    batch = Batch(latent, one, latent, torch.zeros(1, 512, 64), one, ("a.safetensors",))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        metrics.require_finite_gradient(12.5, 4, [batch])
        with pytest.raises(UserError) as raised:
            metrics.require_finite_gradient(norm, 4, [batch])
    finally:
        dist.destroy_process_group()
    words = "step 5: the gradient is not finite: a.safetensors (sigma 0.5)"
    assert str(raised.value).startswith(words)
    assert raised.value.code == 6
