"""A LoRA from training to video, in real DeepSpeed processes on the CPU."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from cosmos_cli import files, hashes, paths
from cosmos_cli.model import lora, lora_files, weights
from cosmos_cli.model.tensor_names import DIFFUSERS, rename
from cosmos_cli.spec import TINY
from tests.helpers.runs import copy_of, find_run, losses, options, train

pytestmark = pytest.mark.workflow

LORA = ("lora_rank=4", "lora_alpha=6", "lora_targets=all", "micro_batch_size=1")


@pytest.fixture(scope="module")
def cosmos(prepared, tmp_path_factory):
    return copy_of(prepared, tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def whole(cosmos):
    """A run of six steps in one process, sharded as ever."""
    train(cosmos, "whole", *LORA, "num_processes=1", "max_steps=6")
    return find_run(cosmos, "whole")


SLOW = pytest.mark.slow


# The whole model is trained at stages 0, 2 and 3 in commands/test_train.py.
@pytest.mark.parametrize("stage", [1, 3, *(pytest.param(n, marks=SLOW) for n in (0, 2))])
def test_every_zero_stage_and_two_processes_train_alike(cosmos, whole, stage):
    pairs = ("num_processes=2", f"zero_stage={stage}", "max_steps=3")
    train(cosmos, f"stage{stage}", *LORA, *pairs)
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
    train(cosmos, name, *pairs, "max_steps=3")
    train(cosmos, name, *pairs, "max_steps=6")
    parts = find_run(cosmos, name)
    if processes == 2:
        train(cosmos, f"{name}whole", *pairs, "max_steps=6")
        whole = find_run(cosmos, f"{name}whole")
    assert losses(parts) == losses(whole)
    for kind in ("reg", "ema"):
        assert parts.lora(6, kind).read_bytes() == whole.lora(6, kind).read_bytes()


def test_only_the_factors_are_saved_and_they_have_moved(whole):
    fresh = TINY.dit.lora_parameters(4, "all")
    first, last = (lora.factors(lora_files.load_lora(whole.lora(n, "reg"))) for n in (3, 6))
    changes = lora_files.load_lora(whole.lora(6, "reg"))
    assert {change.scale for change in changes.values()} == {1.5}
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


@pytest.fixture(scope="module")
def promoted(cosmos, whole):
    """The folder of the run's last step, promoted."""
    done = cosmos("promote", "tiny", *options("whole", *LORA), "--step", "6", "--weights", "reg")
    assert "weights in bf16 kept 99% of the LoRA's change" in done.stderr
    return paths.promoted_dir(TINY, str(cosmos.cwd / "checkpoints"))


def test_promote_keeps_the_lora_beside_the_merged_weights(cosmos, whole, promoted):
    base = weights.load_dit_state(paths.EMBEDDED_DIR / "model.safetensors")
    merged = lora.merge(base, whole.lora(6, "reg"), 1.0)
    written = weights.load_dit_state(promoted / "model.pt")
    assert all(torch.equal(written[name], tensor) for name, tensor in merged.items())
    assert (promoted / "lora.safetensors").read_bytes() == whole.lora(6, "reg").read_bytes()
    own, comfyui = (
        lora_files.load_lora(promoted / name)
        for name in ("lora.safetensors", "lora_comfyui.safetensors")
    )
    for linear, change in own.items():
        assert torch.equal(comfyui[linear].b, change.scale * change.b)
    manifest = files.read_json(promoted / "manifest.json")
    assert manifest["lora"]["sha256"] == hashes.sha256_file(whole.lora(6, "reg"))
    assert 0.98 < manifest["lora"]["kept"] < 1
    assert manifest["base"]["sha256"] == hashes.sha256_file(
        paths.EMBEDDED_DIR / "model.safetensors"
    )


ASK = ("--set", "num_steps=2", "--prompt", "A teal robot.")


def video(cosmos, *more):
    """The mp4 of a prompt, its sidecar, and what the command said; made anew each time."""
    made = ("-o", cosmos.cwd / f"videos{len(list(cosmos.cwd.glob('videos*')))}")
    done = cosmos("generate", "tiny", *options("whole", *LORA), *ASK, *made, *more, "--json")
    path = cosmos.cwd / json.loads(done.stdout)["videos"][0]["path"]
    return path.read_bytes(), files.read_json(path.with_suffix(".json")), done.stderr


def test_promoted_and_beside_the_base_it_makes_the_same_video(cosmos, whole, promoted):
    file = whole.lora(6, "reg")
    by_promote, about, said = video(cosmos)
    beside, sidecar, _ = video(cosmos, "--model", "base", "--lora", file)
    _, of_merged, _ = video(cosmos, "--model", promoted / "model.pt")
    nothing, _, _ = video(cosmos, "--model", "base", "--lora", f"{file}:0")
    plain, _, _ = video(cosmos, "--model", "base")
    assert by_promote == beside
    assert nothing == plain != beside
    base = paths.EMBEDDED_DIR / "model.safetensors"
    assert f"using the base {base} with the LoRA {promoted / 'lora.safetensors'}" in said
    for used_by, path in ((about, promoted / "lora.safetensors"), (sidecar, file)):
        assert used_by["weights"] == {"path": str(base), "sha256": hashes.sha256_file(base)}
        assert used_by["loras"] == [
            {"path": str(path), "strength": 1.0, "sha256": hashes.sha256_file(file),
             "config_sha256": ""}
        ]  # fmt: skip
    assert of_merged["weights"]["path"] == str(promoted / "model.pt")
    assert of_merged["loras"] == []


def test_without_its_base_the_merged_weights_are_used_and_it_says_so(cosmos, promoted, tmp_path):
    copy = tmp_path / "elsewhere_post-trained"
    shutil.copytree(promoted, copy)
    manifest = files.read_json(copy / "manifest.json")
    manifest["base"]["sha256"] = "0" * 64
    files.write_json(copy / "manifest.json", manifest)
    _, about, said = video(cosmos, "--model", copy)
    assert "using the merged weights, which kept 99% of the LoRA's change" in said
    assert about["weights"]["path"] == str(copy / "model.pt")
    (copy / "lora.safetensors").write_bytes(b"")
    refused = cosmos("generate", "tiny", *ASK, "--model", copy, code=4)
    assert (
        "lora.safetensors: is missing or differs from what cosmos promote wrote" in refused.stderr
    )
    assert f"--model {copy / 'model.pt'}" in refused.stderr
    # As promote wrote it before it kept the LoRA.
    del manifest["lora"]
    files.write_json(copy / "manifest.json", manifest)
    (copy / "lora.safetensors").unlink()
    assert video(cosmos, "--model", copy)[1]["weights"] == about["weights"]


def test_a_lora_that_the_model_contains_is_not_counted_twice(cosmos, whole, promoted):
    for model in (promoted, promoted / "model.pt"):
        words = ("--model", model, "--lora", whole.lora(6, "reg"))
        refused = cosmos("generate", "tiny", *ASK, *words, code=2)
        assert "is in the promoted model already" in refused.stderr
    other = ("--model", promoted, "--lora", f"{whole.lora(3, 'reg')}:0.1")
    assert "comes from the same run as the promoted LoRA" in video(cosmos, *other)[2]


def test_evaluate_measures_what_generate_uses(cosmos, promoted):
    words = ("--model", "promoted", "--prompts", "1", "-o", "page.html")
    done = cosmos("evaluate", "tiny", *options("whole", *LORA, "num_steps=2"), *words)
    assert "using the base" in done.stderr


def test_a_folder_of_peft_is_given_by_its_name(cosmos, whole, tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    changes = lora_files.load_lora(whole.lora(6, "reg"))
    state = rename(lora.factors(changes), DIFFUSERS, folder)
    state = {f"base_model.model.{key}": value for key, value in state.items()}
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    files.write_json(folder / "adapter_config.json", settings)
    made, about, said = video(cosmos, "--model", "base", "--lora", folder)
    expected, _, _ = video(cosmos, "--model", "base", "--lora", whole.lora(6, "reg"))
    assert made == expected
    assert "rank 4, scale 1.5, strength 1" in said
    # The settings decide the video, and so are part of what it is known by.
    settings["lora_alpha"] = 60
    files.write_json(folder / "adapter_config.json", settings)
    other, changed, _ = video(cosmos, "--model", "base", "--lora", folder)
    assert other != made
    assert changed["key"] != about["key"]


def test_a_folder_without_one_lora_is_refused(cosmos, tmp_path):
    words = ("generate", "tiny", *ASK, "--model", "base", "--lora", tmp_path)
    assert "holds no LoRA file" in cosmos(*words, code=4).stderr
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        save_file({}, tmp_path / name)
    assert "holds several LoRA files" in cosmos(*words, code=4).stderr
    (tmp_path / name).unlink()
    assert "holds no tensors" in cosmos(*words, code=4).stderr


def test_two_processes_and_standard_input_apply_a_lora_too(cosmos, whole, tmp_path):
    lora_of = ("--model", "base", "--lora", f"{whole.lora(6, 'reg')}:0.5")
    lora_of += ("--set", "negative_prompt=a blue box")
    alone, _, _ = video(cosmos, *lora_of)
    two, _, _ = video(cosmos, *lora_of, "--num-processes", "2", "-o", tmp_path)
    assert two == alone
    words = ("generate", "tiny", *options("whole", *LORA), "--set", "num_steps=2", *lora_of)
    for memory in ("together", "in_turn"):
        folder = tmp_path / memory
        more = ("--prompts", "-", "--set", f"memory={memory}", "-o", folder)
        cosmos(*words, *more, stdin="A teal robot.\n")
        assert next(folder.glob("*.mp4")).read_bytes() == alone


def test_a_missing_lora_is_refused(cosmos):
    words = ("generate", "tiny", *options("whole"), "--prompt", "x", "--lora", "nowhere:0.5")
    assert "nowhere" in cosmos(*words, code=4).stderr
