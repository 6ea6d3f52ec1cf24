"""The recipe and the base that a run was trained with."""

import pytest

from cosmos_cli import files, hashes
from cosmos_cli.paths import MANIFEST_FILE, Run
from cosmos_cli.recipe import loading
from cosmos_cli.train import resumes


@pytest.fixture
def run(tmp_path):
    """A run whose save says that it was trained on own.safetensors."""
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"own weights")
    run = Run(tmp_path / "run")
    state = run.resume_state(2)
    state.mkdir(parents=True)
    files.write_text(run.resolved, loading.dump(recipe(own)))
    files.write_json(state / MANIFEST_FILE, {"base": hashes.sha256_path(own), "files": {}})
    return run


def recipe(base=None):
    return loading.load("tiny", [f"base={base}"] if base else []).recipe


def test_the_base_of_a_run_counts_unless_it_is_gone_or_replaced(run, tmp_path):
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    assert resumes.trained_recipe(recipe(other), run).base == str(own)
    assert resumes.trained_recipe(recipe(), run).base == str(own)
    own.write_bytes(b"other weights")
    assert run.resumable_steps() == [2]
    assert resumes.trained_recipe(recipe(other), run).base == str(other)
    own.unlink()
    assert resumes.trained_recipe(recipe(other), run).base == str(other)
