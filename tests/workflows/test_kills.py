"""Whatever is killed, and when: the same command resumes as if nothing had happened."""

import random
import shutil
import time

import psutil
import pytest

from cosmos_cli.files import read_json, stamp_of
from cosmos_cli.hashes import sha256_file
from cosmos_cli.paths import MANIFEST_FILE
from cosmos_cli.train import status
from tests.helpers.command import Cosmos
from tests.helpers.runs import find_run, options, train

pytestmark = pytest.mark.workflow

PAIRS = ("num_processes=2", "micro_batch_size=1", "save_every_steps=1", "max_steps=6")
# A start takes longer than any of its steps, and a step longer than its save.
START_SECONDS, STEP_SECONDS, SAVE_SECONDS = 12.0, 2.5, 0.3


def figures(run):
    """The lines of metrics.jsonl but for how long a step took."""
    return [{key: row[key] for key in row if key != "seconds"} for row in status.rows(run)]


def model_files(run):
    return {path.name: sha256_file(path) for path in run.checkpoints.glob("iter_*.pt")}


def assert_whole(run):
    """Whatever has the name of a resume state is one, to the last byte."""
    folders = {path for path in run.checkpoints.glob("iter_*") if path.is_dir()}
    assert folders == {run.resume_state(step) for step in run.resumable_steps()}
    for step in run.resumable_steps():
        folder = run.resume_state(step)
        manifest = read_json(folder / MANIFEST_FILE)
        found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        del found[MANIFEST_FILE]
        assert found.keys() == manifest["files"].keys()
        for name, entry in manifest["files"].items():
            assert found[name].stat().st_size == entry["bytes"]
            assert sha256_file(found[name]) == entry["sha256"]
        assert sha256_file(run.model(step, "ema")) == manifest["ema_sha256"]


@pytest.fixture(scope="module")
def undisturbed(prepared):
    """The figures and the model files of a run that nobody kills."""
    cosmos = Cosmos(prepared)
    train(cosmos, "undisturbed", *PAIRS)
    run = find_run(cosmos, "undisturbed")
    assert_whole(run)
    return figures(run), model_files(run)


def unfinished(cosmos, name, since):
    """Return the files of a save that has begun."""
    paths = cosmos.cwd.glob(f"outputs/*/*/{name}/checkpoints/.*.tmp*")
    return [path for path in paths if stamp_of(path)[1] > since * 1e9]


def wait_for_a_moment(cosmos, name, process, rng):
    """While a run starts, at any time of it, or while it saves."""
    kind = rng.choices(["start", "any", "save"], [0.2, 0.4, 0.4])[0]
    if kind == "start":
        time.sleep(rng.uniform(0, START_SECONDS))
        return
    began = time.time()
    while process.poll() is None and not unfinished(cosmos, name, began):
        time.sleep(0.002)
    time.sleep(rng.uniform(0, STEP_SECONDS if kind == "any" else SAVE_SECONDS))


def live_and_be_killed(cosmos, name, rng):
    """Starts the command and kills all of it or a rank; whether it ended by itself before."""
    process = cosmos.start("train", "tiny", *options(name, *PAIRS))
    everyone = [psutil.Process(process.pid)]
    wait_for_a_moment(cosmos, name, process, rng)
    if process.poll() is None:
        everyone += everyone[0].children(recursive=True)
    ranks = everyone[2:4]
    one = rng.random() < 0.5 and len(ranks) == 2
    for victim in [rng.choice(ranks)] if one else everyone:
        if victim.is_running():
            victim.kill()
    _, err = process.communicate(timeout=120)
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not alive, "a process was left behind"
    if process.returncode == 0:
        return True
    assert process.returncode == (6 if one else -9), err
    if one:
        (line,) = [line for line in err.splitlines() if line.startswith("error")]
        assert "was killed" in line
    assert "Traceback" not in err
    return False


# The three are a rank in a step, a rank at the start of a save, and all processes in a step.
@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit(prepared, undisturbed, kills):
    cosmos, rng = Cosmos(prepared), random.Random(kills)
    rows, files = undisturbed
    killed = inside_a_save = 0
    while killed < kills:
        name, ended = f"killed{kills}_{killed}", False
        while not ended and killed < kills:
            began = time.time()
            ended = live_and_be_killed(cosmos, name, rng)
            killed += not ended
            if not list(cosmos.cwd.glob(f"outputs/*/*/{name}")):
                # Killed before it had done anything.
                continue
            run = find_run(cosmos, name)
            inside_a_save += not ended and bool(unfinished(cosmos, name, began))
            assert_whole(run)
            assert model_files(run).items() <= files.items()
            known = figures(run)
            assert known == rows[: len(known)]
            print(f"kill {killed} of {kills}, {inside_a_save} inside a save", flush=True)
        train(cosmos, name, *PAIRS)
        run = find_run(cosmos, name)
        assert figures(run) == rows
        assert model_files(run) == files
        shutil.rmtree(run.root)
    if kills == 100:
        assert inside_a_save >= 10
