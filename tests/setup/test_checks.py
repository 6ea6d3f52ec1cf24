from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.recipe import loading
from cosmos_cli.setup import checks, installs, packages, probes
from cosmos_cli.setup.probes import Outcome, Probe
from tests.helpers.hub import serve

ROOT = Path(__file__).parents[2]
RUN_COSMOS = "from cosmos_cli.__main__ import main; main()"


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
        (site,) = home.glob("lib/python3.*/site-packages")
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
    for number in range(56, 62):
        (folder / f"libavutil.so.{number}").touch()
    return str(folder)


@pytest.mark.workflow
def test_a_ready_machine_gets_the_next_command_and_no_installation(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = cosmos(tmp_path, "setup", "tiny", "--install", XDG_CACHE_HOME=str(tmp_path / "cache"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    # Of all cores together; seven when they have nothing else to do.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20
    assert done.stderr.splitlines()[-1] == "next: cosmos download tiny"
    assert re.search(r"FFmpeg and torchcodec +ok +FFmpeg \d", done.stdout)
    assert re.search(r"DeepSpeed +ok .*ZeRO-3 step in 1 process on cpu, in 2 on cpu", done.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.workflow
def test_a_bare_environment_fails_row_by_row_in_one_json_object(tmp_path, environment_without):
    python = environment_without("torch", "torchcodec", "deepspeed", "transformers")
    done = cosmos(tmp_path, "setup", "--json", "--set", "output_root=/proc/x", python=python)
    assert done.returncode == ExitCode.ENVIRONMENT
    answer = json.loads(done.stdout)
    assert (answer["status"], answer["exit_code"]) == ("error", 3)
    # What --install cannot repair is named with what to do, and setup is not called next.
    assert answer["next"] == ""
    head, *to_do = answer["error"].splitlines()
    assert head.startswith("this machine is not ready: torch, ")
    assert "torch: bash recipes/install.sh" in to_do
    assert "the recipe tiny, as none was named" in done.stderr.splitlines()[0]
    found = rows(done.stdout)
    assert found["torch"]["found"] == "ModuleNotFoundError: No module named 'torch'"
    failed = {name for name, row in found.items() if row["status"] == "fail"}
    assert failed >= {"torch", "transformers", "DeepSpeed", "FFmpeg and torchcodec", "output_root"}
    planned = cosmos(tmp_path, "setup", "--dry-run", "--set", "output_root=/proc/x", python=python)
    assert planned.returncode == ExitCode.ENVIRONMENT
    assert "error: output_root: " in planned.stderr
    # pip would bring a torch of its own choice with DeepSpeed.
    assert found["DeepSpeed"]["fix"] == "bash recipes/install.sh"
    assert all(found[name]["fix"] for name in failed)
    assert found["dataset_dir"]["status"] == found["Python"]["status"] == "ok"


@pytest.mark.workflow
def test_dry_run_prints_the_install_commands_and_runs_none(
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
    assert found["Apex"]["status"] == "fail"
    assert "PyPI's unrelated one" in found["Apex"]["found"]
    commands = json.loads(done.stdout)["commands"]
    assert commands[-2] == f"{python} -m pip install '{installs.DEEPSPEED}'"
    assert commands[-1] == f"{python} -m pip uninstall --yes apex"
    if shutil.which("apt-get"):
        assert "apt-get" in commands[0]
        assert commands[1].endswith("install -y --no-install-recommends ffmpeg")
    assert not (tmp_path / "cosmos").exists()


def test_a_broken_deepspeed_is_named_with_its_error(tmp_path):
    package = tmp_path / "path" / "deepspeed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('half of it is gone')\n")
    done = subprocess.run(
        [sys.executable, "-c", "from cosmos_cli.setup import probes; probes.probe_deepspeed('')"],
        env={**os.environ, "PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    row = packages._deepspeed(Outcome({}, done.stderr), Outcome({}))
    assert (row.status, row.found) == ("fail", "OSError: half of it is gone")
    assert not row.commands
    assert "--force-reinstall" in row.fix


def test_a_torchcodec_of_another_torch_is_told_apart_from_missing_ffmpeg():
    absent = "OSError: libavutil.so.60: cannot open shared object file: No such file or directory\n"
    wrong = "OSError: libnvrtc.so.13: cannot open shared object file: No such file or directory\n"
    assert "FFmpeg" in packages._video(Outcome({}, absent)).found
    row = packages._video(Outcome({}, absent + wrong))
    assert "does not match torch: libnvrtc.so.13" in row.found
    assert row.commands[0][-1] == installs.TORCHCODEC


def test_a_low_limit_of_open_files_is_a_warning():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert checks._open_files().status == "warn"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_install_logs_every_command_and_stops_at_the_first_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    works = (sys.executable, "-c", "print('done that')")
    fails = (sys.executable, "-c", "raise OSError('no network')")
    never = ("touch", str(tmp_path / "never"))
    log = installs.install([works])
    assert "done that" in log.read_text()
    with pytest.raises(UserError, match="OSError: no network") as caught:
        installs.install([fails, never])
    # What stands above it in the log is of other commands.
    with pytest.raises(UserError, match=r"failed with code 1: no reason\."):
        installs.install([(sys.executable, "-c", "exit('no reason.')")])
    assert (caught.value.code, caught.value.where) == (ExitCode.ENVIRONMENT, str(log))
    assert "no network" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_install_uses_the_versions_of_pyproject_which_match_the_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert installs.TORCHCODEC in project["dependencies"]
    assert installs.DEEPSPEED in extras["train"]
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    for text in project["dependencies"] + extras["train"] + extras["test"]:
        wanted = Requirement(text)
        pin = pins[wanted.name.lower()]
        assert wanted.specifier.contains(pin), f"{text}, pinned {pin}"


def install_script(folder: Path, *words: str, path: str, release: Path = Path("/dev/null")):
    """Runs recipes/install.sh of a clone in `folder`, with another PATH."""
    for name in ("recipes", ".ci"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)
    done = subprocess.run(
        ["bash", "recipes/install.sh", *words],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder), "OS_RELEASE": str(release)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.ENVIRONMENT
    assert not (folder / ".venv").exists()
    return done.stderr


def fake(program: Path, script: str) -> None:
    program.write_text(f"#!/usr/bin/env bash\n{script}\n")
    program.chmod(0o755)


@pytest.fixture
def old_python(tmp_path):
    """A folder for PATH whose only Python is too old."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "cut", "dirname", "sed", "sha256sum"):
        (tools / name).symlink_to(shutil.which(name))
    fake(tools / "python3", '[ "$1" = --version ] && echo Python 3.10.12 || exit 1')
    return tools


@pytest.mark.parametrize(
    ("system", "commands"),
    [
        (
            "ID=ubuntu\nID_LIKE=debian",
            [
                "apt-get update && ",
                "add-apt-repository -y ppa:deadsnakes/ppa",
                "apt-get install -y python3.12 python3.12-venv",
            ],
        ),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', ["dnf install -y python3.12"]),
        (
            "ID=debian",
            [
                "curl -LsSf https://astral.sh/uv/install.sh | sh",
                "~/.local/bin/uv python install 3.12",
            ],
        ),
    ],
)
def test_the_install_script_prints_how_to_get_a_python(tmp_path, old_python, system, commands):
    (tmp_path / "os-release").write_text(system)
    fake(old_python / "sudo", "")
    said = install_script(tmp_path, path=str(old_python), release=tmp_path / "os-release")
    first, *printed = said.splitlines()
    assert first == "error: Python 3.11, 3.12 or 3.13 is needed, found Python 3.10.12. Run:"
    assert printed[-1] == "  bash recipes/install.sh"
    for line, command in zip(printed[:-1], commands, strict=True):
        assert line.strip().removeprefix("sudo ").startswith(command)


@pytest.mark.parametrize("where", [".pyenv/versions/3.12.1", "miniconda3/envs/x", "uv"])
def test_the_install_script_finds_a_python_that_is_not_on_the_path(tmp_path, old_python, where):
    python = tmp_path / where / "bin" / "python3"
    python.parent.mkdir(parents=True)
    fake(python, '[ "$1" = --version ] && echo Python 3.12.1 || exit 0')
    if where == "uv":
        fake(old_python / "uv", f"[ $1 = python ] && [ $2 = find ] && echo {python}")
    for name in ("grep", "tail"):
        (old_python / name).symlink_to(shutil.which(name))
    fake(old_python / "df", "echo Avail; echo '  105'")
    said = install_script(tmp_path, "--torch", "cpu", path=str(old_python))
    assert said.startswith("error: 1300 MB of disk space are needed")


@pytest.mark.parametrize(
    ("driver", "build"),
    [("580.65.06", "cu130"), ("610.1", "cu130"), ("570.124.06", "cu128"), ("560.35", "cu126"),
     ("535.183.01", "cu126"), ("470.256.02", "")],
)  # fmt: skip
def test_the_build_of_torch_is_the_newest_that_the_driver_runs(tmp_path, driver, build):
    tools = tmp_path / "bin"
    tools.mkdir()
    smi = '[ "$1" = -L ] && echo "GPU 0: NVIDIA H100" && exit'
    fake(tools / "nvidia-smi", f"{smi}\necho {driver}\necho {driver}")
    fake(tools / "df", "echo Avail; echo '  105'")
    said = install_script(tmp_path, path=f"{tools}{os.pathsep}{os.environ['PATH']}")
    assert installs.torch_build(driver) == build
    if not build:
        assert "driver 470.256.02 is too old: torch needs R525 or newer" in said
        assert "install.sh --torch cpu" in said
        assert "update the NVIDIA driver" in checks._fix_of_driver("13.0", driver)
        return
    assert said.splitlines()[0] == f"NVIDIA driver {driver}: {build}"
    assert "7000 MB" in said
    fix = f"bash recipes/install.sh --torch {build}"
    assert checks._fix_of_driver(None, driver) == fix
    assert (checks._fix_of_driver("13.0", driver) == fix) == (build != "cu130")
    constraints = (ROOT / "recipes" / f"constraints-{build}.txt").read_text()
    assert "-c ../.ci/constraints.txt\n" in constraints
    pinned = re.search(r"^torch==.*$", (ROOT / ".ci/constraints.txt").read_text(), re.MULTILINE)[0]
    assert build == "cu130" or f"{pinned}+{build}\n" in constraints


def test_the_install_script_names_the_disk_space_it_needs(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    fake(tools / "df", "echo Avail; echo '  105'")
    said = install_script(
        tmp_path, "--torch", "cpu", path=f"{tools}{os.pathsep}{os.environ['PATH']}"
    )
    assert said == f"error: 1300 MB of disk space are needed, {tmp_path} has 105 MB\n"


@pytest.mark.workflow
def test_print_writes_the_install_commands_as_a_valid_bash_script(tmp_path, environment_without):
    python = environment_without("deepspeed")
    words = ("setup", "--print", "--with", "transformer-engine", "--with", "apex")
    done = cosmos(tmp_path, *words, python=python)
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-1] == f"{python} -m pip install '{installs.DEEPSPEED}'"
    assert [line for line in lines if line.startswith("# by hand: Transformer Engine: ")]
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_builds_find_the_headers_in_torchs_wheels(tmp_path, monkeypatch):
    for name in ("cudnn", "cu13"):
        (tmp_path / "nvidia" / name / "include").mkdir(parents=True)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    *_, build = installs.transformer_engine("13.0")
    headers = [tmp_path / "nvidia" / name / "include" for name in ("cu13", "cudnn")]
    assert build[1] == f"CPLUS_INCLUDE_PATH={headers[0]}:{headers[1]}"
    assert build[-2:] == ("--no-build-isolation", "transformer-engine[pytorch,core-cu13]>=2.9,<3")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["te-cu13"] == [build[-1]]
    *_, apex = installs.apex()
    assert re.fullmatch(r"git\+https://github.com/NVIDIA/apex@[0-9a-f]{40}", apex[-1])
    assert {build[1], "APEX_CPP_EXT=1", "APEX_CUDA_EXT=1"} < set(apex)


def test_a_missing_extra_is_a_failure_only_when_it_is_asked_for():
    gpu = {"name": "H100", "bytes": 8e10, "capability": [9, 0]}
    torch = Outcome({"cuda": "13.0", "gpus": [gpu]})
    (row,) = packages._transformer_engine(None, torch, [])
    assert (row.status, checks.mending([row])) == ("warn", [])
    (row,) = packages._transformer_engine(None, torch, ["transformer-engine"])
    assert checks.mending([row]) == list(installs.transformer_engine("13.0"))
    assert packages._apex(None, torch, []) == []
    (row,) = packages._apex(None, torch, ["apex"])
    assert row.status == "fail"


@pytest.mark.workflow
def test_a_rank_that_fails_ends_its_group_at_once(monkeypatch, tmp_path):
    (tmp_path / "deepspeed.py").write_text(
        "import os, time\n"
        "if os.environ['RANK'] == '0': time.sleep(50)\n"
        "raise OSError('rank 1 has no link')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    started = time.monotonic()
    outcome = probes.run_probes([Probe("two", "deepspeed", ranks=2)])["two"]
    assert "rank 1 has no link" in outcome.error
    assert time.monotonic() - started < 30


@pytest.mark.workflow
@pytest.mark.parametrize("package", ["torch", "deepspeed"])
def test_a_crash_in_a_probe_or_in_its_parent_is_named(monkeypatch, tmp_path, package):
    """In a probe, or in the process from which all are forked."""
    (tmp_path / f"{package}.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    outcomes = probes.run_probes([Probe(name, name) for name in ("torch", "deepspeed")])
    assert outcomes[package].error == "died of SIGABRT"
    assert (outcomes["torch"].error == "") == (package == "deepspeed")


@pytest.mark.workflow
def test_a_probe_that_hangs_is_a_failed_row_that_blames_no_package(monkeypatch, tmp_path):
    (tmp_path / "deepspeed.py").write_text("import time\ntime.sleep(50)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(probes, "PROBE_SECONDS", 8)
    tiny = loading.load("tiny").recipe
    (row,) = [row for row in checks.run_checks(tiny) if row.name == "DeepSpeed"]
    assert (row.status, row.found) == ("fail", "did not finish in time")
    assert "less busy" in row.fix


@pytest.mark.slow
@pytest.mark.skipif(not version("torch").endswith("+cpu"), reason="CUDA's torch fits the wheel")
def test_install_repairs_a_wrong_torchcodec_and_a_missing_deepspeed(tmp_path, environment_without):
    python = environment_without("torchcodec", "deepspeed")
    wrong = [python, "-m", "pip", "install", "--quiet", "--no-deps", "torchcodec==0.17.0"]
    if subprocess.run(wrong, check=False).returncode:
        pytest.skip("there is no package index")
    words = ("setup", "tiny", "--json")
    own = {"python": python, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = cosmos(tmp_path, *words, **own)
    assert done.returncode == ExitCode.ENVIRONMENT
    found = rows(done.stdout)
    assert "torchcodec does not match torch" in found["FFmpeg and torchcodec"]["found"]
    assert found["DeepSpeed"]["found"] == "missing"
    done = cosmos(tmp_path, *words, "--install", **own)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert not [name for name, row in rows(done.stdout).items() if row["status"] == "fail"]
    log = (tmp_path / "cache" / "cosmos" / "setup.log").read_text()
    assert log.count("-m pip install") == 2


@pytest.mark.workflow
def test_closed_repositories_fail_and_a_missing_network_warns(tmp_path):
    model, tokenizer = (
        "nvidia/Cosmos-Predict1-7B-Text2World",
        "nvidia/Cosmos-Tokenize1-CV8x8x8-720p",
    )
    repos = {("models", model): {"model.pt": b""}, ("models", tokenizer): {"mean_std.pt": b""}}
    environment = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": ""}
    with serve(repos, gated=[model]) as hub:
        done = cosmos(tmp_path, "setup", "nemo_assets", HF_ENDPOINT=hub.url, **environment)
    assert done.returncode == ExitCode.ENVIRONMENT
    refused = [line for line in done.stdout.splitlines() if line.startswith("model hub  ")]
    assert any(f"https://huggingface.co/{model}: needs a token" in line for line in refused)
    assert not any(tokenizer in line for line in refused)
    environment["HF_HUB_OFFLINE"] = "1"
    done = cosmos(tmp_path, "setup", "nemo_assets", "--json", **environment)
    assert rows(done.stdout)["model hub"]["status"] == "warn"


@pytest.mark.workflow
def test_install_does_not_start_with_a_read_only_home_or_a_full_disk(tmp_path, environment_without):
    words = ("setup", "tiny", "--install", "--json", "--set", "min_free_disk_gb=1e6")
    own = {"python": environment_without("deepspeed"), "HOME": "/proc", "XDG_CACHE_HOME": ""}
    done = cosmos(tmp_path, *words, **own)
    assert done.returncode == ExitCode.ENVIRONMENT, done.stderr
    assert "-m pip" not in done.stderr
    found = rows(done.stdout)
    assert found["free disk"]["status"] == "fail"
    # The other verbs work without a cache.
    assert found["XDG_CACHE_HOME"]["status"] == "warn"
    assert "/proc/.cache/cosmos" in found["XDG_CACHE_HOME"]["found"]
    assert "`export XDG_CACHE_HOME=FOLDER`" in found["XDG_CACHE_HOME"]["fix"]


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_other_systems_are_refused_with_one_sentence(tmp_path, system):
    # What Windows lacks cannot be imported.
    program = (
        f"import sys; sys.platform = {system!r}; sys.modules.update(fcntl=None, resource=None); "
        + RUN_COSMOS
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "setup"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.ENVIRONMENT
    (line,) = done.stderr.splitlines()
    assert "WSL2" in line
    assert done.stdout == ""
