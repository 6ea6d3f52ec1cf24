"""Check each package that cosmos needs, and say how to install or repair it. No torch."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cosmos_cli.setup import installs
from cosmos_cli.setup.installs import last_line
from cosmos_cli.setup.probes import Outcome

# Plain pip would download the CUDA build, several gigabytes, on every machine.
TORCH_FIX = "bash recipes/install.sh"
INSTALL = "`cosmos setup RECIPE --install`"

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One row of the table: the item, its status, what was found and how to fix it.

    `commands` are the commands with which `cosmos setup --install` fixes it.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
    commands: tuple[installs.Command, ...] = ()


def torch_row(outcome: Outcome) -> Check:
    """Return the row for torch itself."""
    if outcome.error:
        return Check("torch", "fail", last_line(outcome.error), TORCH_FIX)
    cuda = outcome.facts["cuda"]
    build = f"CUDA {cuda}" if cuda else "CPU"
    return Check("torch", "ok", f"{outcome.facts['version']}, {build}")


def rows_on_torch(outcomes: dict[str, Outcome], wanted: Iterable[str]) -> list[Check]:
    """Return the rows that depend on torch. Without torch they fail untried, with no commands."""
    torch = outcomes["torch"]
    if torch.error:
        names = ("FFmpeg and torchcodec", "DeepSpeed", "transformers")
        return [Check(name, "fail", "not tried without torch", TORCH_FIX) for name in names]
    return [
        _video(outcomes["video"]),
        _deepspeed(outcomes["deepspeed"], outcomes["deepspeed in 2 processes"]),
        *_transformer_engine(outcomes.get("transformer_engine"), torch, wanted),
        *_apex(outcomes.get("apex"), torch, wanted),
        _transformers(outcomes["transformers"]),
    ]


def _video(outcome: Outcome) -> Check:
    name = "FFmpeg and torchcodec"
    if not outcome.error:
        facts = outcome.facts
        found = f"FFmpeg {facts['ffmpeg']}, torchcodec {facts['torchcodec']}: mp4 written and read"
        return Check(name, "ok", found)
    # torchcodec tries one build per FFmpeg version and reports every failure. A failure that only
    # says that an FFmpeg version is absent does not matter.
    reasons = re.findall(r"^OSError: (?!Could not load)(.+)$", outcome.error, re.MULTILINE)
    others = [reason for reason in reasons if not re.search(r"lib(av|sw)\w*\.so", reason)]
    if reasons and not others:
        commands = installs.apt("ffmpeg")
        fix = INSTALL if commands else "install FFmpeg 4 to 8: apt-get install ffmpeg"
        return Check(name, "fail", "FFmpeg's libraries are missing", fix, commands)
    if others and "libpython" in others[0]:
        return _shared_python(name)
    if others:
        found = f"torchcodec does not match torch: {others[0][:100]}"
        return Check(name, "fail", found, INSTALL, installs.pip(installs.TORCHCODEC))
    if "No module named 'torchcodec'" in outcome.error:
        commands = installs.pip(installs.TORCHCODEC)
        return Check(name, "fail", "torchcodec is missing", INSTALL, commands)
    return Check(name, "fail", last_line(outcome.error), "fix the problem named here")


def _shared_python(name: str) -> Check:
    """Return the failed row for a Python whose shared library torchcodec cannot find."""
    folder, library = sysconfig.get_config_vars("LIBDIR", "INSTSONAME")
    found = f"torchcodec needs {library}, which is missing"
    if Path(str(folder), str(library)).exists():
        return Check(name, "fail", found, f"export LD_LIBRARY_PATH={folder}")
    package = f"libpython3.{sys.version_info.minor}"
    commands = installs.apt(package) if sys.base_prefix == "/usr" else ()
    fix = INSTALL if commands else "use a Python built with --enable-shared"
    return Check(name, "fail", found, fix, commands)


def _deepspeed(alone: Outcome, in_two: Outcome) -> Check:
    if not alone.error and not in_two.error:
        found = (
            f"{alone.facts['version']}: a ZeRO-3 step in 1 process on {alone.facts['backend']}, "
            f"in 2 on {in_two.facts['backend']}"
        )
        return Check("DeepSpeed", "ok", found)
    if "No module named 'deepspeed'" in alone.error:
        return Check("DeepSpeed", "fail", "missing", INSTALL, installs.pip(installs.DEEPSPEED))
    found = last_line(alone.error) if alone.error else f"in 2 processes: {last_line(in_two.error)}"
    fix = f"pip install --force-reinstall --no-deps '{installs.DEEPSPEED}'"
    return Check("DeepSpeed", "fail", found, fix)


def _transformer_engine(
    outcome: Outcome | None, torch: Outcome, wanted: Iterable[str]
) -> list[Check]:
    name, asked = "Transformer Engine", "transformer-engine" in wanted
    if outcome and not outcome.error:
        return [Check(name, "ok", f"{outcome.facts['version']}: agrees with torch on the GPU")]
    status: Status = "fail" if asked else "warn"
    if outcome and "No module named 'transformer_engine" not in outcome.error:
        fix = "pip uninstall transformer-engine, or install the one that matches torch"
        return [Check(name, status, last_line(outcome.error), fix)]
    if not torch.facts.get("gpus"):
        fix = "use a machine with NVIDIA GPUs, or leave out --with transformer-engine"
        return [Check(name, status, "no GPU to test it on", fix)] if asked else []
    fix = "`cosmos setup RECIPE --install --with transformer-engine`"
    found = "missing; cosmos runs without it"
    return [Check(name, status, found, fix, installs.transformer_engine(torch.facts["cuda"]))]


def _apex(outcome: Outcome | None, torch: Outcome, wanted: Iterable[str]) -> list[Check]:
    if outcome and not outcome.error:
        return [Check("Apex", "ok", "NVIDIA's Apex: its fused Adam agrees with torch on the GPU")]
    asked = "apex" in wanted
    status: Status = "fail" if asked else "warn"
    if outcome:
        fix = "pip uninstall apex, or build it again: cosmos does not need it"
        return [Check("Apex", status, last_line(outcome.error), fix)]
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations if spec else None) or ()
    if spec and not any(Path(folder, "optimizers").is_dir() for folder in folders):
        found = "the package apex is not NVIDIA's but PyPI's unrelated one"
        return [Check("Apex", "fail", found, "pip uninstall apex", installs.pip_uninstall("apex"))]
    if not asked or importlib.util.find_spec("amp_C"):
        return []
    if not torch.facts.get("cuda") or not shutil.which("nvcc"):
        found = "NVIDIA's Apex is missing, and building it needs nvcc and a CUDA build of torch"
        build = torch.facts.get("cuda") or "CPU"
        fix = f"install CUDA's toolkit and a CUDA build of torch ({build})"
        return [Check("Apex", "fail", found, fix)]
    fix = "`cosmos setup RECIPE --install --with apex`"
    return [Check("Apex", "fail", "NVIDIA's Apex is missing", fix, installs.apex())]


def _transformers(outcome: Outcome) -> Check:
    if outcome.error:
        return Check("transformers", "fail", last_line(outcome.error), TORCH_FIX)
    return Check("transformers", "ok", outcome.facts["version"])
