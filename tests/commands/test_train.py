"""The training verb in real DeepSpeed processes on the CPU."""

import contextlib
import fcntl
import functools
import json
import shutil
import signal
import time

import psutil
import pytest
from safetensors.torch import load_file, save_file

from cosmos_cli.errors import UserError
from cosmos_cli.files import read_json, write_json
from cosmos_cli.hashes import sha256_file
from cosmos_cli.paths import EMBEDDED_DIR
from cosmos_cli.prep.holdout import split_clips
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import preflight, resumes
from tests.helpers.command import Cosmos
from tests.helpers.runs import (
    assert_same_model,
    copy_of,
    find_run,
    losses,
    options,
    start_training,
    train,
    under_torchrun,
)

pytestmark = pytest.mark.workflow


@pytest.fixture
def cosmos(prepared):
    return Cosmos(prepared)


@pytest.fixture(scope="module")
def whole(prepared):
    """Trains, once, with a number of processes that have one clip at a time."""

    @functools.cache
    def trained(processes):
        cosmos, name = Cosmos(prepared), f"whole{processes}"
        pairs = (f"num_processes={processes}", "micro_batch_size=1")
        train(cosmos, name, *pairs, "max_steps=6" if processes == 1 else "max_steps=8")
        return find_run(cosmos, name)

    return trained


@pytest.fixture(scope="module")
def at_once(prepared):
    """The losses of four steps of one process with two clips at a time."""
    cosmos = Cosmos(prepared)
    train(cosmos, "at_once", "num_processes=1", "micro_batch_size=2", "max_steps=4")
    return losses(find_run(cosmos, "at_once"))


@pytest.mark.parametrize("processes", [1, 2])
def test_six_steps_equal_three_a_stop_and_three_more(cosmos, whole, processes):
    name, pairs = f"parts{processes}", (f"num_processes={processes}", "micro_batch_size=1")
    train(cosmos, name, *pairs, "max_steps=3")
    again = train(cosmos, name, *pairs, "max_steps=6")
    assert "resumed at step 3" in again.stderr
    one, parts = whole(processes), find_run(cosmos, name)
    assert [row[0] for row in losses(parts)] == [1, 2, 3, 4, 5, 6]
    assert losses(one)[:6] == losses(parts)
    assert_same_model(one, parts, 6)
    assert one.model(6, "ema").read_bytes() == parts.model(6, "ema").read_bytes()


def test_one_process_with_two_clips_equals_two_processes_with_one(whole, at_once):
    pair = losses(whole(2))[:4]
    assert len(at_once) == len(pair) == 4
    for row, other in zip(at_once, pair, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_under_a_launcher_the_command_is_one_rank(cosmos, whole):
    """Ranks that the command starts itself are compared with this run where one of them is lost."""
    done = under_torchrun(cosmos, "joined", "max_steps=2")
    assert done.returncode == 0, done.stderr
    assert losses(find_run(cosmos, "joined")) == losses(whole(2))[:2]


def test_accumulated_gradients_equal_those_of_one_batch(whole, at_once):
    for row, other in zip(losses(whole(1))[:4], at_once, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


# A LoRA is trained at stage 1 in workflows/test_lora.py.
@pytest.mark.parametrize("stage", [0, 2, pytest.param(1, marks=pytest.mark.slow)])
def test_every_zero_stage_trains_alike(cosmos, whole, stage):
    pairs = ("num_processes=2", "micro_batch_size=1", "max_steps=3")
    train(cosmos, f"stage{stage}", *pairs, f"zero_stage={stage}")
    rows = losses(find_run(cosmos, f"stage{stage}"))
    for row, other in zip(rows, losses(whole(2))[:3], strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("mode", ["most", "all", pytest.param("attention", marks=pytest.mark.slow)])
def test_activation_checkpointing_does_not_change_the_training(cosmos, whole, mode):
    pairs = ("num_processes=2", "micro_batch_size=1", "max_steps=2")
    train(cosmos, mode, *pairs, f"activation_checkpointing={mode}")
    assert losses(find_run(cosmos, mode)) == losses(whole(2))[:2]


def test_training_lowers_the_error(cosmos):
    pairs = ("num_processes=1", "max_steps=25", "save_every_steps=25", "text_dropout=0")
    train(cosmos, "learns", *pairs)
    rows = losses(find_run(cosmos, "learns"))
    assert sum(row[2] for row in rows[-8:]) < 0.9 * sum(row[2] for row in rows[:8])


# SIGTERM ends a run in workflows/test_run_history.py.
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_signal_saves_the_step_and_the_same_command_resumes(cosmos, number, code):
    name = f"stopped{code}"
    pairs = ("num_processes=2", "micro_batch_size=1", "save_every_steps=500")
    process = start_training(cosmos, name, *pairs, "max_steps=500")
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    run = find_run(cosmos, name)
    (step,) = run.resumable_steps()
    assert not list(run.checkpoints.glob(".*"))
    train(cosmos, name, *pairs, f"max_steps={step + 1}")
    assert run.resumable_steps()[-1] == step + 1


def test_a_signal_in_the_first_second_ends_the_command(cosmos):
    process = cosmos.start("train", "tiny", *options("early", "max_steps=500"))
    started = time.monotonic()
    while time.monotonic() - started < 60 and not psutil.Process(process.pid).children():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_failed_save_is_reported_even_if_a_signal_asked_for_it(cosmos, number):
    name = f"failing{int(number)}"
    pairs = ("num_processes=1", "save_every_steps=500", "max_steps=500")
    process = start_training(cosmos, name, *pairs)
    run = find_run(cosmos, name)
    for step in range(1, 501):
        run.model(step, "reg").mkdir()
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4, err
    assert "_reg_model.pt: cannot be written: Is a directory" in err
    assert not run.resumable_steps()


def test_under_a_launcher_ranks_report_errors_and_a_run_is_locked(cosmos):
    dataset = cosmos.cwd / "datasets" / "tiny"
    train, _ = split_clips(read_json(dataset / "manifest.json"))
    latents = {path: path.read_bytes() for path in (dataset / clip["latent"] for clip in train)}
    words = ("train", "tiny", *options("torn", "micro_batch_size=1", "max_steps=2"))
    try:
        for path, content in latents.items():
            path.write_bytes(content[:100])
        failed = cosmos.ranks(2, *words, code=None)
    finally:
        for path, content in latents.items():
            path.write_bytes(content)
    assert all(rank.returncode for rank in failed)
    told = "".join(rank.stderr for rank in failed).splitlines()
    assert any(
        line.startswith("error") and "is not the latent that the manifest lists" in line
        for line in told
    ), told
    with (find_run(cosmos, "torn").root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (second,) = cosmos.ranks(1, *words, code=2)
    assert "another process is training this run" in second.stderr


def test_ranks_of_a_killed_command_keep_the_lock_until_they_saved(cosmos):
    pairs = ("num_processes=1", "save_every_steps=500", "max_steps=500")
    process = start_training(cosmos, "orphan", *pairs)
    (launcher,) = psutil.Process(process.pid).children()
    ranks = launcher.children()
    process.kill()
    process.wait()
    again = cosmos("train", "tiny", *options("orphan", *pairs), code=2)
    assert "another process" in again.stderr
    # The ranks hold the pipes, so this is also the wait for them.
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs([launcher, *ranks], timeout=60)
    assert not alive
    assert find_run(cosmos, "orphan").resumable_steps()


def test_a_killed_rank_is_named_and_nothing_is_left_behind(cosmos):
    pairs = ("num_processes=2", "micro_batch_size=1", "save_every_steps=2", "max_steps=500")
    process = start_training(cosmos, "killed", *pairs, step=3)
    launcher, *_ = psutil.Process(process.pid).children()
    ranks = launcher.children()
    assert len(ranks) == 2
    ranks[1].kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 6, err
    assert "rank 1: was killed" in err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs([launcher, *ranks], timeout=10)
    assert not alive
    last = find_run(cosmos, "killed").resumable_steps()[-1]
    on = train(cosmos, "killed", *pairs[:3], f"max_steps={last + 2}")
    assert f"resumed at step {last}" in on.stderr


def test_the_newest_and_every_nth_resume_states_are_kept(cosmos):
    pairs = ("num_processes=1", "save_every_steps=1", "max_steps=5", "keep_last=2")
    done = train(cosmos, "pruned", *pairs, "keep_every_steps=2")
    run = find_run(cosmos, "pruned")
    for said in ("loading the base weights", f"report: {run.report}"):
        assert said in done.stderr
    assert run.resumable_steps() == [2, 4, 5]
    assert run.saved_steps("reg") == run.saved_steps("ema") == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def finished(prepared):
    """A run of two steps that is done."""
    cosmos = Cosmos(prepared)
    train(cosmos, "finished", "num_processes=1", "max_steps=2")
    return cosmos


@pytest.mark.parametrize(
    ("pair", "word"),
    [
        ("optimizer=deepspeed", "optimizer = "),
        ("seed=5", "seed = 0"),
        ("global_batch_size=4", "global_batch_size = 2"),
        ("dataset_dir=other", "dataset_dir = "),
    ],
)
def test_a_changed_fixed_key_is_refused_and_named_in_a_few_lines(finished, pair, word):
    words = options("finished", "num_processes=1", "max_steps=3", pair)
    other = finished.cwd / "other"
    if not other.exists():
        shutil.copytree(finished.cwd / "datasets" / "tiny", other)
        manifest = read_json(other / "manifest.json")
        del manifest["clips"][-1]
        write_json(other / "manifest.json", manifest)
    for more in ([], ["--dry-run"]):
        refused = finished("train", "tiny", *words, *more, code=2)
        assert f"this run was started with {word}" in refused.stderr
        assert len(refused.stderr.splitlines()) < 5


def test_equivalent_values_of_fixed_keys_resume_the_run(finished):
    same = ("optimizer=torch", f"dataset_dir={finished.cwd}/datasets/tiny")
    words = options("finished", "num_processes=1", "max_steps=3", *same)
    assert finished.json("train", "tiny", *words, "--dry-run")["from"] == 2


def test_a_run_resumes_with_the_same_dataset_in_another_folder(finished):
    (finished.cwd / "moved").symlink_to("datasets/tiny")
    same = ("optimizer=torch", "dataset_dir=moved")
    words = options("finished", "num_processes=1", "max_steps=3", *same)
    assert finished.json("train", "tiny", *words, "--dry-run")["from"] == 2


def test_a_lora_resumes_only_with_the_base_it_was_trained_on(cosmos, tmp_path):
    base = tmp_path / "base.safetensors"
    base.write_bytes((EMBEDDED_DIR / "model.safetensors").read_bytes())
    pairs = (f"base={base}", "lora_rank=4", "num_processes=1")
    train(cosmos, "beside", *pairs, "max_steps=1")
    base = base.rename(tmp_path / "moved.safetensors")
    pairs = (f"base={base}", *pairs[1:])
    words = options("beside", *pairs, "max_steps=2")
    assert cosmos.json("train", "tiny", *words, "--dry-run")["from"] == 1
    state = load_file(base)
    save_file({name: tensor / 2 for name, tensor in state.items()}, base)
    refused = cosmos("train", "tiny", *options("beside", *pairs, "max_steps=2"), code=2)
    assert "this run was started with other base weights" in refused.stderr
    # The recipe of the run names the old path of the base, the user's the new one.
    refused = cosmos("promote", "tiny", *options("beside", *pairs), code=4)
    assert f"{base}: is not the base that the run was trained on" in refused.stderr
    save_file(state, base)
    # After one step of the warmup, the factors are still zero.
    refused = cosmos("promote", "tiny", *options("beside", *pairs), code=4)
    assert "does not differ from the base weights" in refused.stderr


def test_a_base_at_a_new_path_is_compared_if_the_old_one_is_there(tmp_path, capsys):
    old, same, other = (tmp_path / name for name in ("old.pt", "same.pt", "other.pt"))
    for path, content in ((old, "a"), (same, "a"), (other, "b")):
        path.write_text(content)
    assert resumes._is_moved(str(old), str(same))
    assert not resumes._is_moved(str(old), str(other))
    assert not resumes._is_moved(None, str(same))
    old.unlink()
    assert resumes._is_moved(str(old), str(other))
    assert "continues from its own weights" in capsys.readouterr().err


def test_a_folder_that_deepspeed_would_not_find_is_refused(cosmos):
    refused = cosmos("train", "tiny", *options("x", "output_root=runs [1]"), code=2)
    assert "contains '['" in refused.stderr


def test_more_processes_than_gpus_are_refused(monkeypatch):
    r = Recipe(dataset_dir="none", num_processes=4)
    for found, fits in ((0, False), (1, False), (4, True)):
        monkeypatch.setattr(preflight, "gpu_names", lambda found=found: ["NVIDIA H100"] * found)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="4 processes"):
            preflight.check_gpus(r, 4)


def test_a_finished_run_has_nothing_to_do(finished):
    done = finished.json("train", "tiny", *options("finished", "num_processes=1", "max_steps=2"))
    assert done["step"] == 2


def test_a_run_killed_before_its_last_measurement_makes_it_up(finished):
    run, pairs = find_run(finished, "finished"), ("num_processes=1", "max_steps=2")
    rows = run.metrics.read_text().splitlines(keepends=True)
    assert "heldout" in rows[-1]
    run.metrics.write_text("".join(rows[:-1]))
    run.result.unlink()
    done = train(finished, "finished", *pairs, words=["--json"])
    assert json.loads(done.stdout)["best_step"] == 2
    assert run.metrics.read_text().splitlines(keepends=True) == rows
    assert read_json(run.result)["step"] == 2


@pytest.mark.parametrize(
    ("pairs", "word"),
    [
        (["transformer_engine=linears", "precision=bf16"], "Transformer Engine is not installed"),
        (["optimizer=apex"], "NVIDIA's Apex is not installed"),
    ],
)
def test_missing_kernels_are_refused_before_any_process_starts(cosmos, pairs, word):
    started = time.monotonic()
    refused = cosmos("train", "tiny", *options("kernels", *pairs), code=3)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert word in line
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_deepspeed_adamw_matches_torch_and_resumes_bit_for_bit(cosmos, tmp_path):
    # torch keeps there what it compiles.
    cosmos.cache = tmp_path
    compiled = ("num_processes=1", "optimizer=deepspeed")
    train(cosmos, "torch", "num_processes=1", "max_steps=3")
    train(cosmos, "deepspeed", *compiled, "max_steps=3")
    for steps in (2, 3):
        done = train(cosmos, "halves", *compiled, f"max_steps={steps}")
        assert "optimizer: DeepSpeedCPUAdam" in done.stderr
    by_torch, by_deepspeed = (losses(find_run(cosmos, name)) for name in ("torch", "deepspeed"))
    for row, other in zip(by_torch, by_deepspeed, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    assert by_deepspeed == losses(find_run(cosmos, "halves"))


def test_a_damaged_resume_state_is_refused(finished):
    run = find_run(finished, "finished")
    shard = next((run.resume_state(2) / "zero").glob("*optim*"))
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        pairs = ("num_processes=1", "max_steps=3")
        refused = train(finished, "finished", *pairs, code=4)
        assert "is damaged" in refused.stderr
    finally:
        shard.write_bytes(whole)


def test_an_indivisible_batch_is_refused_before_any_process_starts(cosmos):
    pairs = ("num_processes=auto", "global_batch_size=3", "micro_batch_size=2")
    started = time.monotonic()
    refused = cosmos("train", "tiny", *options("odd", *pairs), code=2)
    assert "global_batch_size" in refused.stderr
    assert time.monotonic() - started < 5


def poison(cosmos, split):
    """Puts a NaN into a clip of a split, and returns the name of its latent."""
    folder = cosmos.cwd / "datasets" / "tiny"
    manifest = read_json(folder / "manifest.json")
    clip = split_clips(manifest)[split == "heldout"][0]
    victim = folder / clip["latent"]
    latent = load_file(victim)["latent"]
    latent[0, 0, 0, 0] = float("nan")
    save_file({"latent": latent}, victim)
    clip["sha256"] = sha256_file(victim)
    write_json(folder / "manifest.json", manifest)
    return victim.name


def test_a_nan_in_the_data_stops_the_run_and_names_clip_and_sigma(prepared, tmp_path):
    cosmos = copy_of(prepared, tmp_path / "poisoned")
    victim = poison(cosmos, "train")
    pairs = ("num_processes=1", "max_steps=30", "max_restarts=2")
    refused = cosmos("train", "tiny", *options("nan", *pairs), code=6)
    # It would come again.
    assert "restart" not in refused.stderr
    for words in (victim, "sigma", "step "):
        assert words in refused.stderr


def test_a_nan_in_a_held_out_clip_stops_the_run_and_names_clip_and_sigma(prepared, tmp_path):
    cosmos = copy_of(prepared, tmp_path / "poisoned")
    victim = poison(cosmos, "heldout")
    refused = train(cosmos, "nan", "num_processes=1", "max_steps=30", code=6)
    for words in (victim, "sigma", "held-out"):
        assert words in refused.stderr


def test_an_unprepared_or_stale_dataset_is_refused(prepared, tmp_path):
    cosmos = Cosmos(tmp_path)
    refused = cosmos("train", "tiny", *options("x"), code=5)
    assert "cosmos prep" in refused.stderr
    shutil.copytree(prepared / "datasets", tmp_path / "datasets")
    stale = cosmos("train", "tiny", *options("x", "num_frames=17"), code=5)
    assert "num_frames = 9" in stale.stderr
    meta = next((tmp_path / "datasets" / "tiny" / "metas").iterdir())
    caption = meta.read_text()
    meta.write_text("Something else.")
    edited = cosmos("train", "tiny", *options("x"), code=5)
    assert f"{meta.name}: was edited since prep" in edited.stderr
    meta.write_text(caption)
    path = tmp_path / "datasets" / "tiny" / "manifest.json"
    listed = path.read_text()
    manifest = read_json(path)
    for video in manifest["videos"]:
        video["caption_source"] = "prompt"
    write_json(path, manifest)
    other = cosmos("train", "tiny", *options("x", "prompt=A green dinosaur."), code=5)
    assert "made with another prompt than 'A green dinosaur.'" in other.stderr
    path.write_text(listed)
    next((tmp_path / "datasets" / "tiny" / "videos").iterdir()).unlink()
    stale = cosmos("train", "tiny", *options("x"), code=5)
    assert "older than the videos" in stale.stderr


def test_a_lost_process_restarts_the_run_from_its_last_save(cosmos, whole):
    pairs = ("num_processes=2", "micro_batch_size=1", "save_every_steps=2", "max_steps=8")
    process = start_training(cosmos, "lost", *pairs, "max_restarts=1", step=3)
    launcher, *_ = psutil.Process(process.pid).children()
    launcher.children()[1].kill()
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert "rank 1: was killed" in err
    assert "restart 1 of 1" in err
    assert losses(find_run(cosmos, "lost")) == losses(whole(2))
