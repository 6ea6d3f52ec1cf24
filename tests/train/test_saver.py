"""Saves in the background: what is on disk is what was trained when the save was asked for."""

import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from cosmos_cli.files import PIECE, PieceHash, read_json, sha256_file, sha256_piece, sha256_pieces
from cosmos_cli.paths import MANIFEST_FILE
from cosmos_cli.train import process, staging
from tests.helpers import faulty_saves
from tests.helpers.command import Cosmos
from tests.helpers.runs import find_run, losses, train


def test_a_piecewise_hash_does_not_depend_on_how_the_data_arrives(tmp_path):
    data = bytes(range(256)) * (PIECE // 128) + b"end"
    path = tmp_path / "data"
    path.write_bytes(data)
    whole, split = PieceHash(), PieceHash()
    whole.update(data)
    for part in (data[:1], data[1 : PIECE + 5], data[PIECE + 5 :]):
        split.update(part)
    read = sha256_pieces([sha256_piece(path, i) for i in range(3)])
    assert whole.hexdigest() == split.hexdigest() == read


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
    monkeypatch.setattr(staging, "_CGROUPS", tmp_path)
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / usage).write_text("900000\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cache} 300000\n")
    assert staging.available_bytes() == 400_000
    (tmp_path / limit).write_text("max\n")
    assert staging.available_bytes() > 10**8


def what_a_late_copy_saves(folder):
    """In a process of its own: a save whose copy begins only when the next step is under way."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    os.environ |= {**where, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    process.join_world(60)
    trained = faulty_saves.Saver(folder)
    writer_is_free = threading.Event()
    trained.saver.thread.submit(writer_is_free.wait)
    trained.saver.save(3)
    threading.Timer(1, writer_is_free.set).start()
    trained.learn(3)
    changed = not all(map(torch.equal, trained.state(), trained.known))
    trained.saver.finish()
    return changed, trained.loads(3)


@pytest.mark.workflow
def test_the_optimizer_step_waits_until_the_save_is_copied(tmp_path):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        changed, same = pool.submit(what_a_late_copy_saves, tmp_path).result()
    assert changed
    assert same


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
