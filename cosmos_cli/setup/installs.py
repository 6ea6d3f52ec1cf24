"""Commands that install what a machine lacks, run one by one or written as a script. No torch."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from cosmos_cli import console, files
from cosmos_cli.errors import environment_error
from cosmos_cli.generate.answers import cache_dir

TORCHCODEC = "torchcodec>=0.13,<0.14"
DEEPSPEED = "deepspeed>=0.19.8,<0.20"
TRANSFORMER_ENGINE = "transformer-engine[pytorch,core-cu{major}]>=2.9,<3"
# Apex has no releases. This commit builds with the pinned version of torch.
APEX = "git+https://github.com/NVIDIA/apex@6424da3b4faa6c8f062da4a48c424fff3f02d42d"
# Transformer Engine and Apex build without isolation, to compile against the installed torch. pip
# then does not install their build requirements.
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "ninja", "pybind11")

Command = tuple[str, ...]


def apt(package: str) -> tuple[Command, ...]:
    """Return the commands that install a Debian or Ubuntu package; none without apt-get or sudo."""
    root = () if os.geteuid() == 0 else ("sudo", "-n")
    if not all(map(shutil.which, (*root[:1], "apt-get"))):
        return ()
    # A machine that has just booted may still be installing its own updates.
    wait = ("-o", "DPkg::Lock::Timeout=120")
    quiet = ("env", "DEBIAN_FRONTEND=noninteractive")
    return (
        (*root, "apt-get", *wait, "update"),
        (*root, *quiet, "apt-get", *wait, "install", "-y", "--no-install-recommends", package),
    )


def torch_build(driver: str) -> str:
    """Return the newest build of torch that an NVIDIA driver such as 535.183.01 runs, or "".

    Source: NVIDIA's CUDA Toolkit Release Notes, "CUDA Toolkit and Corresponding Driver Versions". A
    driver of R525 or newer runs every CUDA 12, by minor version compatibility.
    """
    release = int(driver.partition(".")[0])
    builds = {580: "cu130", 570: "cu128", 525: "cu126"}
    return next((build for least, build in builds.items() if release >= least), "")


def pip(*requirements: str) -> tuple[Command, ...]:
    """Return the command that installs packages into this environment."""
    return ((sys.executable, "-m", "pip", "install", *requirements),)


def pip_uninstall(package: str) -> tuple[Command, ...]:
    """Return the command that removes a package from this environment."""
    return ((sys.executable, "-m", "pip", "uninstall", "--yes", package),)


def transformer_engine(cuda: str) -> tuple[Command, ...]:
    """Return the commands that build Transformer Engine for torch's CUDA version, such as 13.0."""
    requirement = TRANSFORMER_ENGINE.format(major=cuda.partition(".")[0])
    build = _build_command(requirement, "NVTE_FRAMEWORK=pytorch")
    return (*pip(*BUILD_TOOLS, "nvidia-cudnn-frontend"), build)


def apex() -> tuple[Command, ...]:
    """Return the commands that build NVIDIA's Apex from source; they need git and nvcc."""
    # Most of its twelve extensions have two or three files, too few to keep all cores busy. So four
    # extensions are built at a time.
    build = _build_command(APEX, "APEX_CPP_EXT=1", "APEX_CUDA_EXT=1", "APEX_PARALLEL_BUILD=4")
    return (*pip(*BUILD_TOOLS), build)


def _build_command(requirement: str, *environment: str) -> Command:
    """Return the command that compiles a package against the installed torch.

    The sources include headers of CUDA's libraries. A toolkit may lack them, so the headers in
    torch's wheels are added. The compiler prefers those of the toolkit.
    """
    wheels = Path(sysconfig.get_path("purelib"), "nvidia")
    headers = ":".join(map(str, sorted(wheels.glob("*/include"))))
    (build,) = pip("--no-build-isolation", requirement)
    return ("env", f"CPLUS_INCLUDE_PATH={headers}", *environment, *build)


def install(commands: Sequence[Command]) -> Path:
    """Show and run each command, and return the path of the log of their output.

    Raises:
        UserError: a command failed. The error names the log.
    """
    log = cache_dir() / "setup.log"
    console.say(f"installing what is missing; the output of the commands goes to {log}")
    with files.disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("a", encoding="utf-8")
    with stream:
        for command in commands:
            shown = shlex.join(command)
            console.say(f"$ {shown}")
            print(f"$ {shown}", file=stream, flush=True)
            begin = stream.tell()
            # Without stdin a command that asks a question fails instead of waiting for an answer.
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if done.returncode:
                output = log.read_bytes()[begin:].decode(errors="replace")
                what = f"`{shown}` failed with code {done.returncode}: {last_line(output)}"
                fix = "run that command yourself, then `cosmos setup RECIPE` again"
                raise environment_error(log, what, fix)
    return log


def script(commands: Sequence[Command], by_hand: Sequence[str]) -> str:
    """Return the commands as a shell script that stops at the first failure.

    `by_hand` is what no command can fix; each becomes a comment.
    """
    notes = [f"# by hand: {text}" for text in by_hand]
    lines = [shlex.join(command) for command in commands]
    return "\n".join(["#!/usr/bin/env bash", "set -euxo pipefail", *notes, *lines])


def last_line(text: str) -> str:
    """Return the last exception of a traceback, or else the last line of the output."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(E|[\w.]+(Error|Exception)): ", line)]
    return ["", *lines, *exceptions][-1][:160]
