from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cosmos_cli import checks
from cosmos_cli.checks import Outcome
from cosmos_cli.errors import ExitCode, UserError

ROOT = Path(__file__).parents[1]
RUN_COSMOS = "from cosmos_cli.app import main; main()"


def cosmos(folder: Path, *words: str, python: str = sys.executable, **environment: str):
    """Runs a command line in `folder` with some environment variables replaced."""
    paths = [str(ROOT), *filter(None, [environment.pop("PYTHONPATH", "")])]
    return subprocess.run(
        [python, "-c", RUN_COSMOS, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def rows(answer: str) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in json.loads(answer)["checks"]}


@pytest.fixture
def environment_without(tmp_path):
    """Makes a virtual environment that has every package of this one except some."""

    def make(*prefixes: str) -> str:
        home = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        site = next(home.glob("lib/python3.*/site-packages"))
        for folder in (p for p in map(Path, sys.path) if p.name.endswith("-packages")):
            for entry in folder.iterdir():
                if not re.match(rf"({'|'.join(prefixes)})\b", entry.name):
                    (site / entry.name).symlink_to(entry)
        return str(home / "bin" / "python")

    return make


@pytest.fixture
def without_ffmpeg(tmp_path):
    """A folder for LD_LIBRARY_PATH in which FFmpeg's libraries are empty files."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    for version in range(56, 62):
        (folder / f"libavutil.so.{version}").touch()
    return str(folder)


def test_a_ready_machine_ends_with_the_next_command_and_nothing_is_installed(tmp_path):
    done = cosmos(tmp_path, "setup", "tiny", "--install", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "next: cosmos download tiny"
    assert re.search(r"FFmpeg and torchcodec +ok +FFmpeg \d", done.stdout)
    assert re.search(r"DeepSpeed +ok .*ZeRO-3 step", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_bare_environment_fails_row_by_row_in_one_json_object(tmp_path, environment_without):
    python = environment_without("torch", "torchcodec", "deepspeed", "transformers")
    done = cosmos(tmp_path, "setup", "--json", "--set", "output_root=/proc/x", python=python)
    assert done.returncode == ExitCode.ENVIRONMENT
    answer = json.loads(done.stdout)
    assert (answer["status"], answer["exit_code"]) == ("error", 3)
    assert answer["next"] == "cosmos setup tiny --set output_root=/proc/x --install"
    found = rows(done.stdout)
    assert found["torch"]["found"] == "ModuleNotFoundError: No module named 'torch'"
    failed = {name for name, row in found.items() if row["status"] == "fail"}
    assert failed >= {"torch", "transformers", "FFmpeg and torchcodec", "output_root"}
    assert all(found[name]["fix"] for name in failed)
    assert found["dataset_dir"]["status"] == found["Python"]["status"] == "ok"


def test_dry_run_prints_the_commands_that_mend_and_runs_none(
    tmp_path, environment_without, without_ffmpeg
):
    apex = tmp_path / "path" / "apex"
    apex.mkdir(parents=True)
    (apex / "__init__.py").touch()
    python = environment_without("deepspeed")
    words = ("setup", "tiny", "--install", "--dry-run", "--json")
    faults = {"LD_LIBRARY_PATH": without_ffmpeg, "PYTHONPATH": str(apex.parent)}
    done = cosmos(tmp_path, *words, python=python, XDG_CACHE_HOME=str(tmp_path), **faults)
    assert done.returncode == ExitCode.OK, done.stderr
    found = rows(done.stdout)
    assert found["torch"]["status"] == "ok"
    assert found["FFmpeg and torchcodec"]["found"] == "FFmpeg's libraries are missing"
    assert found["DeepSpeed"]["found"] == "missing"
    assert found["Apex"]["status"] == "warn"
    commands = json.loads(done.stdout)["commands"]
    assert commands[-1] == f"{python} -m pip install '{checks.DEEPSPEED}'"
    if shutil.which("apt-get"):
        assert "apt-get" in commands[0]
        assert commands[1].endswith("install -y --no-install-recommends ffmpeg")
    assert not (tmp_path / "cosmos").exists()


def test_a_broken_deepspeed_is_named_with_its_error(tmp_path):
    package = tmp_path / "path" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('half of it is gone')\n")
    done = subprocess.run(
        [sys.executable, "-c", "from cosmos_cli import checks; checks.probe_deepspeed()"],
        env={**os.environ, "PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    row = checks._deepspeed(Outcome({}, done.stderr))
    assert (row.status, row.found) == ("fail", "OSError: half of it is gone")
    assert not row.commands
    assert "--force-reinstall" in row.fix


def test_a_torchcodec_of_another_torch_is_told_apart_from_missing_ffmpeg():
    absent = "OSError: libavutil.so.60: cannot open shared object file: No such file or directory\n"
    wrong = "OSError: libnvrtc.so.13: cannot open shared object file: No such file or directory\n"
    assert "FFmpeg" in checks._video(Outcome({}, absent)).found
    row = checks._video(Outcome({}, absent + wrong))
    assert "does not match torch: libnvrtc.so.13" in row.found
    assert row.commands[0][-1] == checks.TORCHCODEC


def test_a_low_limit_of_open_files_is_a_warning():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert checks._open_files().status == "warn"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_install_shows_and_logs_every_command_and_stops_at_the_first_failure(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    works = (sys.executable, "-c", "print('done that')")
    fails = (sys.executable, "-c", "raise OSError('no network')")
    never = ("touch", str(tmp_path / "never"))
    log = checks.install([works])
    assert "done that" in log.read_text()
    with pytest.raises(UserError, match="OSError: no network") as caught:
        checks.install([fails, never])
    assert (caught.value.code, caught.value.where) == (ExitCode.ENVIRONMENT, str(log))
    assert "no network" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_what_install_fetches_is_what_the_package_declares_and_the_pins_allow():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert checks.TORCHCODEC in project["dependencies"]
    assert checks.DEEPSPEED in extras["train"]
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    for text in project["dependencies"] + extras["train"] + extras["test"]:
        wanted = Requirement(text)
        pin = pins[wanted.name.lower()]
        assert wanted.specifier.contains(pin), f"{text}, pinned {pin}"


def test_the_install_script_names_the_python_it_needs(tmp_path):
    for folder in ("recipes", ".ci"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "sed", "sha256sum"):
        (tools / name).symlink_to(shutil.which(name))
    old = tools / "python3"
    old.write_text('#!/usr/bin/env bash\n[ "$1" = --version ] && echo Python 3.9.18 || exit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["bash", "recipes/install.sh"],
        cwd=tmp_path,
        env={"PATH": f"{tools}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.ENVIRONMENT
    assert done.stderr == "error: Python 3.11, 3.12 or 3.13 is needed, found Python 3.9.18\n"
    assert not (tmp_path / ".venv").exists()
