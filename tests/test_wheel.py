"""A wheel holds all that the command needs, away from the clone that it was built in."""

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from cosmos_cli.model import video
from tests.helpers.command import settings

pytestmark = pytest.mark.workflow

ROOT = Path(__file__).parents[1]


def run(*words, cwd, **variables):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=cwd, env=clean | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment with the wheel, which finds its dependencies in this one."""
    folder = tmp_path_factory.mktemp("wheel")
    # A build leaves folders in its source.
    source = folder / "source"
    for name in ("cosmos_cli", "recipes"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", ".")
    run(sys.executable, "-m", "pip", *build, cwd=source)
    (wheel,) = source.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, symlinks=True)
    target = run(
        environment / "bin/python",
        "-c",
        "import site; print(site.getsitepackages()[0])",
        cwd=folder,
    ).strip()
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-cache-dir", wheel)
    run(sys.executable, "-m", "pip", "--python", environment, *install, cwd=folder)
    # A plain path; the .pth file in it that leads to the clone is not followed.
    Path(target, "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    shutil.rmtree(source)
    return environment / "bin"


def test_the_installed_command_is_the_one_of_the_wheel(installed, tmp_path):
    where = run(
        installed / "python", "-c", "import cosmos_cli; print(cosmos_cli.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)
    for verb in ("setup", "download", "prep", "train", "promote", "generate", "evaluate"):
        assert verb in run(installed / "cosmos", "--help", cwd=tmp_path)
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    listed = json.loads(run(installed / "cosmos", "recipes", "list", "--json", cwd=tmp_path))
    assert {row["name"] for row in listed["recipes"]} == shipped


def test_the_wheel_has_every_file_of_the_package(installed):
    (package,) = installed.parent.glob("lib/*/site-packages/cosmos_cli")
    ours = {path.relative_to(ROOT / "cosmos_cli") for path in (ROOT / "cosmos_cli").rglob("*.*")}
    ours = {path for path in ours if "__pycache__" not in path.parts}
    assert not ours - {path.relative_to(package) for path in package.rglob("*.*")}


def test_the_wheel_generates_a_video(installed, tmp_path):
    words = ("generate", "--prompt", "A red ball.", *settings("num_steps=2"), "--json")
    here = {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    made = json.loads(run(installed / "cosmos", *words, cwd=tmp_path, **here))
    (path,) = made["artifacts"]
    assert video.read_frames(tmp_path / path, range(9)).float().std() > 5
