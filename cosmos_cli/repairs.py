"""The commands that mend a machine, and how they are run or written down. No torch."""

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

from cosmos_cli import console, layout
from cosmos_cli.cache import cache_dir
from cosmos_cli.errors import ExitCode, UserError

TORCHCODEC = "torchcodec>=0.13,<0.14"
DEEPSPEED = "deepspeed>=0.19.8,<0.20"
TRANSFORMER_ENGINE = "transformer-engine[pytorch,core-cu{major}]>=2.9,<3"
# Apex has no releases; this commit builds with the torch that is pinned here.
APEX = "git+https://github.com/NVIDIA/apex@6424da3b4faa6c8f062da4a48c424fff3f02d42d"
# What the builds of both need and do not fetch, because they must see the installed torch.
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "ninja", "pybind11")

Command = tuple[str, ...]


def apt(package: str) -> tuple[Command, ...]:
    """The commands that install a package of Debian or Ubuntu; none where they cannot run."""
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


def pip(*requirements: str) -> tuple[Command, ...]:
    """The command that installs packages into this environment."""
    return ((sys.executable, "-m", "pip", "install", *requirements),)


def pip_uninstall(package: str) -> tuple[Command, ...]:
    """The command that removes a package from this environment."""
    return ((sys.executable, "-m", "pip", "uninstall", "--yes", package),)


def transformer_engine(cuda: str) -> tuple[Command, ...]:
    """The commands that build Transformer Engine for torch's version of CUDA, such as 13.0."""
    requirement = TRANSFORMER_ENGINE.format(major=cuda.partition(".")[0])
    build = _building(requirement, "NVTE_FRAMEWORK=pytorch")
    return (*pip(*BUILD_TOOLS, "nvidia-cudnn-frontend"), build)


def apex() -> tuple[Command, ...]:
    """The commands that build NVIDIA's Apex from its source; they need git and nvcc."""
    # Most of its twelve extensions are of two or three files, and they would wait for one another.
    build = _building(APEX, "APEX_CPP_EXT=1", "APEX_CUDA_EXT=1", "APEX_PARALLEL_BUILD=4")
    return (*pip(*BUILD_TOOLS), build)


def _building(requirement: str, *environment: str) -> Command:
    """The command that compiles a package against the installed torch.

    What it compiles includes headers of CUDA's libraries. A toolkit need not have them, but they
    came with torch's wheels; those of the toolkit go before.
    """
    wheels = Path(sysconfig.get_path("purelib"), "nvidia")
    headers = ":".join(map(str, sorted(wheels.glob("*/include"))))
    (build,) = pip("--no-build-isolation", requirement)
    return ("env", f"CPLUS_INCLUDE_PATH={headers}", *environment, *build)


def install(commands: Sequence[Command]) -> Path:
    """Runs the commands, each shown first; the log of what they printed.

    Raises:
        UserError: one of them failed; names the log.
    """
    log = cache_dir() / "setup.log"
    console.say(f"installing what is missing; the output of the commands goes to {log}")
    with layout.disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("a", encoding="utf-8")
    with stream:
        for command in commands:
            shown = shlex.join(command)
            console.say(f"$ {shown}")
            print(f"$ {shown}", file=stream, flush=True)
            begin = stream.tell()
            # No stdin: nobody may be there to answer.
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if done.returncode:
                said = log.read_bytes()[begin:].decode(errors="replace")
                raise UserError(
                    f"`{shown}` failed with code {done.returncode}: {last_line(said)}",
                    code=ExitCode.ENVIRONMENT,
                    where=str(log),
                    fix="run it by hand, then cosmos setup again",
                )
    return log


def script(commands: Sequence[Command], by_hand: Sequence[str]) -> str:
    """The commands as a shell script that stops at the first that fails.

    What no command mends stands in its comments.
    """
    notes = [f"# by hand: {text}" for text in by_hand]
    lines = [shlex.join(command) for command in commands]
    return "\n".join(["#!/usr/bin/env bash", "set -euxo pipefail", *notes, *lines])


def last_line(text: str) -> str:
    """The line of an output that says why: of a traceback its last exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(E|[\w.]+(Error|Exception)): ", line)]
    return ["", *lines, *exceptions][-1][:160]
