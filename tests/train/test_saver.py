"""Saves in the background: what is on disk is what was trained when the save was asked for."""

import contextlib
import io
import os
import threading

import pytest
import torch

from cosmos_cli import cpu_memory, files, hashes
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.files import read_json, write_json
from cosmos_cli.hashes import sha256_file
from cosmos_cli.paths import MANIFEST_FILE
from cosmos_cli.recipe import loading, plan
from cosmos_cli.train import process, saver, staging
from tests.helpers import faulty_saves, forks
from tests.helpers.command import SMALL, Cosmos
from tests.helpers.runs import find_run, losses, train


def test_a_piecewise_hash_does_not_depend_on_how_the_data_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "PIECE", 100)
    data = bytes(range(203))
    path = tmp_path / "data"
    path.write_bytes(data)
    for parts in ([data], [data[:1], data[1:105], data[105:]], [data[:100], data[100:]]):
        written = hashes.PieceHash()
        for part in parts:
            written.update(part)
        read = [hashes.sha256_piece(path, i) for i in range(3)]
        assert written.hexdigest() == hashes.sha256_pieces(read)
    assert hashes.PieceHash().hexdigest() != written.hexdigest()


def reserved(size=10**7):
    made = staging.Staging(torch.device("cpu"))
    made.reserve(size, 1)
    return made


def test_a_copy_shares_its_storages_as_the_original_does():
    flat = torch.arange(10.0)
    state = {"all": flat, "part": flat[2:5], "step": torch.tensor(3), "names": ["a", (flat[:0],)]}
    made = reserved()
    copy = made.later(state)
    flat += 1
    made.fill(None)
    flat += 1
    assert torch.equal(copy["all"], torch.arange(10.0) + 1)
    assert copy["part"].data_ptr() == copy["all"][2:].data_ptr()
    assert copy["names"][1][0].numel() == 0
    assert copy["step"] == 3
    copied = {copy["all"].untyped_storage().nbytes(), copy["step"].untyped_storage().nbytes()}
    assert copied == {40, 8}


def test_memory_that_is_not_there_is_refused_before_it_is_touched(monkeypatch):
    monkeypatch.setattr(staging, "SPARE", 10**15)
    with pytest.raises(MemoryError, match="are available"):
        reserved()


@pytest.mark.parametrize(
    ("limit", "usage", "cache"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_the_limit_of_a_job_counts(tmp_path, monkeypatch, limit, usage, cache):
    monkeypatch.setattr(cpu_memory, "_CGROUPS", tmp_path)
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / usage).write_text("900000\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cache} 300000\n")
    assert cpu_memory.available_bytes() == 400_000
    (tmp_path / limit).write_text("max\n")
    assert cpu_memory.available_bytes() > 10**8


def damaged(trained, step):
    """The files of a save of which one changed byte goes unnoticed."""
    folder, missed = trained.run.resume_state(step), []
    states = [path for path in folder.rglob("*") if path.suffix == ".pt"]
    for path in [*states, trained.run.model(step, "ema")]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            trained.loads(step)
            missed.append(path.name)
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return missed


def small_saves(folder):
    """In a process of its own, saves of a small model; what is seen, by name."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    os.environ |= {**where, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    process.join_world(60)
    trained, seen = faulty_saves.Saver(folder), {}
    # The copy begins only when the next step is under way.
    writer_is_free = threading.Event()
    trained.saver.thread.submit(writer_is_free.wait)
    trained.saver.save(3)
    threading.Timer(1, writer_is_free.set).start()
    trained.learn(3)
    seen["changed"] = not all(map(torch.equal, trained.state(), trained.known))
    trained.saver.finish()
    seen["restored"] = trained.loads(3)
    seen["missed"] = damaged(trained, 3)
    # As an earlier version wrote it.
    manifest = trained.run.resume_state(3) / MANIFEST_FILE
    content = read_json(manifest)
    del content["pieces"]
    write_json(manifest, content)
    seen["restored_from_older"] = trained.loads(3)
    seen["missed_in_older"] = damaged(trained, 3)
    with contextlib.suppress(UserError), trained.saver:
        trained.saver.save(4)
        raise UserError("the loss is not finite", code=ExitCode.TRAINING)
    seen["newest"] = trained.run.last_step
    staging.SPARE = 10**15
    with contextlib.redirect_stderr(io.StringIO()) as said:
        waiting = saver.Saver(trained.engine, trained.ema, trained.run, trained.r, {})
        waiting.save(5)
    seen["warning"], seen["newest_after_waiting"] = said.getvalue(), trained.run.last_step
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    with forks.pool(1) as pool:
        return pool.submit(small_saves, tmp_path_factory.mktemp("small")).result()


@pytest.mark.workflow
def test_the_optimizer_step_waits_until_the_save_is_copied(seen):
    assert seen["changed"]
    assert seen["restored"]


@pytest.mark.workflow
def test_a_changed_byte_in_any_file_is_noticed_at_a_resume(seen):
    assert seen["missed"] == []


@pytest.mark.workflow
def test_a_manifest_of_an_earlier_version_is_still_verified(seen):
    assert seen["restored_from_older"]
    assert seen["missed_in_older"] == []


@pytest.mark.workflow
def test_a_save_under_way_is_completed_when_a_later_step_fails(seen):
    assert seen["newest"] == 4


@pytest.mark.workflow
def test_without_the_memory_for_a_copy_training_waits_and_says_so(seen):
    assert "warning: training waits while a save is written: its copy takes" in seen["warning"]
    assert "are available" in seen["warning"]
    assert seen["newest_after_waiting"] == 5


def on_disk(run):
    """The hashes of all files of a run's saves."""
    states = {step: run.resume_state(step) / MANIFEST_FILE for step in run.resumable_steps()}
    models = {path.name: sha256_file(path) for path in run.checkpoints.glob("iter_*.*")}
    return models, {step: read_json(path)["files"] for step, path in states.items()}


@pytest.mark.workflow
@pytest.mark.parametrize(
    "pairs",
    [
        ("num_processes=2", "micro_batch_size=1"),
        *(
            pytest.param(pairs, marks=pytest.mark.slow)
            for pairs in (
                ("num_processes=1",),
                ("num_processes=2", "micro_batch_size=1", "zero_stage=3"),
                ("num_processes=2", "sequence_parallel=2", "zero_stage=3"),
                ("num_processes=2", "micro_batch_size=1", "zero_stage=3", "offload=optimizer"),
                ("num_processes=2", "micro_batch_size=1", "zero_stage=3", "offload=parameters"),
                ("num_processes=1", "offload=optimizer"),
                ("num_processes=1", "lora_rank=4"),
            )
        ),
    ],
)
def test_saves_in_the_background_are_those_for_which_training_waits(prepared, pairs):
    cosmos, found = Cosmos(prepared), {}
    # Saves 2 and 3 wait for the ones before, and the last one for the disk.
    pairs = (*pairs, "max_steps=3", "save_every_steps=1", "keep_models=2")
    for way in ("background", "blocking"):
        name = "_".join((way, *pairs[:-3])).replace("=", "")
        said = train(cosmos, name, *pairs, f"saves={way}").stderr
        assert ("for saves in the background" in said) == (way == "background")
        assert said.count("training stood still for") == 3
        run = find_run(cosmos, name)
        found[way] = losses(run), on_disk(run)
        assert not list(run.checkpoints.glob(".*"))
    assert found["background"] == found["blocking"]
    # The plan counts what is copied: what the files hold, and what is rounded up.
    ranks = int(pairs[0].partition("=")[2])
    r = loading.load("tiny", [*SMALL, *pairs]).recipe
    written = sum(map(files.size_of, run.weight_files()[3])) + sum(
        entry["bytes"] for entry in found["blocking"][1][1][3].values()
    )
    planned = 1e9 * plan.plan(r, ranks, None).staged_gb - 2e6 * ranks
    assert planned == pytest.approx(written, rel=0.1)
