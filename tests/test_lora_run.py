"""A LoRA from training to video, in real DeepSpeed processes on the CPU."""

import shutil

import pytest
import torch
from conftest import Cosmos
from test_train import find_run, losses, options

from cosmos_cli import layout
from cosmos_cli.model import lora, weights
from cosmos_cli.model.spec import TINY

pytestmark = pytest.mark.workflow

LORA = ("lora_rank=4", "lora_alpha=6", "lora_targets=all", "micro_batch_size=1")


@pytest.fixture(scope="module")
def cosmos(prepared, tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    shutil.copytree(prepared / "datasets", root / "datasets")
    return Cosmos(root)


@pytest.fixture(scope="module")
def whole(cosmos):
    """A run of six steps in one process, sharded as ever."""
    cosmos("train", "tiny", *options("whole", *LORA, "num_processes=1", "max_steps=6"))
    return find_run(cosmos, "whole")


SLOW = pytest.mark.slow


# The whole model is trained at stages 0, 2 and 3 in test_train.py.
@pytest.mark.parametrize("stage", [1, 3, *(pytest.param(n, marks=SLOW) for n in (0, 2))])
def test_every_zero_stage_and_two_processes_train_alike(cosmos, whole, stage):
    pairs = ("num_processes=2", f"zero_stage={stage}", "max_steps=3")
    cosmos("train", "tiny", *options(f"stage{stage}", *LORA, *pairs))
    ours, alone = losses(find_run(cosmos, f"stage{stage}")), losses(whole)[:3]
    assert len(ours) == 3
    for row, other in zip(ours, alone, strict=True):
        assert row[:3] == pytest.approx(other[:3], rel=1e-4)


@pytest.mark.parametrize(
    ("processes", "stage"), [(1, 3), *(pytest.param(2, n, marks=SLOW) for n in (1, 3))]
)
def test_three_steps_a_stop_and_three_more_equal_six(cosmos, whole, processes, stage):
    name = f"parts{processes}{stage}"
    pairs = (*LORA, f"num_processes={processes}", f"zero_stage={stage}")
    cosmos("train", "tiny", *options(name, *pairs, "max_steps=3"))
    cosmos("train", "tiny", *options(name, *pairs, "max_steps=6"))
    parts = find_run(cosmos, name)
    if processes == 2:
        cosmos("train", "tiny", *options(f"{name}whole", *pairs, "max_steps=6"))
        whole = find_run(cosmos, f"{name}whole")
    assert losses(parts) == losses(whole)
    for kind in ("reg", "ema"):
        assert parts.lora(6, kind).read_bytes() == whole.lora(6, kind).read_bytes()


def test_only_the_factors_are_saved_and_they_have_moved(whole):
    fresh = TINY.dit.lora_parameters(4, "all")
    first, _ = lora.load(whole.lora(3, "reg"))
    last, scale = lora.load(whole.lora(6, "reg"))
    assert scale == 1.5
    assert sum(factor.numel() for factor in last.values()) == fresh
    assert not any(torch.equal(first[name], last[name]) for name in last)
    assert not list(whole.checkpoints.glob("*_model.pt"))
    # fp32 masters and two moments of the factors, and no base.
    state = sum(p.stat().st_size for p in (whole.resume_state(6) / "zero").rglob("*.pt"))
    assert 12 * fresh < state < 12 * fresh + 1e6


def test_a_lora_is_not_continued_as_something_else(cosmos, whole):
    for change in ("lora_rank=0", "lora_rank=8", "lora_targets=attention", "lora_alpha=4"):
        pairs = (*LORA, "num_processes=1", "max_steps=8", change)
        refused = cosmos("train", "tiny", *options("whole", *pairs), code=2)
        assert f"started with {change.partition('=')[0]} =" in refused.stderr


def test_promoted_and_merged_at_load_it_makes_the_same_video(cosmos, whole):
    pairs = options("whole", *LORA)
    cosmos("promote", "tiny", *pairs, "--step", "6", "--weights", "reg")
    base = weights.load_dit_state(layout.EMBEDDED_DIR / "model.safetensors")
    merged = lora.merge(base, whole.lora(6, "reg"), 1.0)
    folder = layout.promoted_dir(TINY, str(cosmos.cwd / "checkpoints"))
    promoted = weights.load_dit_state(folder / "model.pt")
    assert all(torch.equal(promoted[name], tensor) for name, tensor in merged.items())

    def video(*more):
        command = ["generate", "tiny", *pairs, "--set", "num_steps=2", "--prompt", "A teal robot."]
        made = cosmos.json(*command, *more)
        path = cosmos.cwd / made["videos"][0]["path"]
        return path.read_bytes(), layout.read_json(path.with_suffix(".json"))

    file = whole.lora(6, "reg")
    by_promote, _ = video()
    at_load, sidecar = video("--model", "base", "--lora", file)
    nothing, _ = video("--model", "base", "--lora", f"{file}:0")
    plain, _ = video("--model", "base")
    assert by_promote == at_load
    assert nothing == plain != at_load
    (used,) = sidecar["loras"]
    assert used == {"path": str(file), "strength": 1.0, "sha256": layout.sha256_file(file)}


def test_a_missing_lora_is_refused(cosmos):
    words = ("generate", "tiny", *options("whole"), "--prompt", "x", "--lora", "nowhere:0.5")
    assert "nowhere" in cosmos(*words, code=4).stderr
