"""Is this machine able to run a recipe? Checks, and the commands that mend it. No torch.

What needs torch runs in a child process of its own, so that a broken installation is a failed row.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from cosmos_cli import console, launch, layout
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.layout import Run

if TYPE_CHECKING:
    from cosmos_cli.keys import Recipe

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
TORCHCODEC = "torchcodec>=0.13,<0.14"
DEEPSPEED = "deepspeed>=0.19.8,<0.20"

PROBE_SECONDS = 60
# Below these something is likely to fail, but not certain to.
SHARED_MEMORY_BYTES = 1e9
OPEN_FILES = 1024
WORKING_MEMORY_BYTES = 4e9

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One row: what was looked at, the verdict, what was found and how a person mends it.

    `commands` are those that `install` may run to mend it.
    """

    name: str
    status: Status
    found: str
    fix: str = ""
    commands: tuple[tuple[str, ...], ...] = ()


def run_checks(r: Recipe) -> list[Check]:
    """Every check that matters for the recipe, in the order in which they build on one another."""
    gpus = launch.gpu_names()
    outcomes = _run_probes(on_gpu=bool(gpus))
    return [
        _python(),
        _system(),
        _torch(outcomes["torch"]),
        _gpus(outcomes["torch"], gpus, r),
        _video(outcomes["video"]),
        _deepspeed(outcomes["deepspeed"]),
        *_apex(),
        _transformers(outcomes["transformers"]),
        _disk(r),
        _memory(r),
        _shared_memory(),
        _open_files(),
        _writable("output_root", r.output_root),
        _writable("dataset_dir", r.dataset_dir),
        _writable("checkpoints_dir", r.checkpoints_dir),
        _clock(),
    ]


# --- repairs --------------------------------------------------------------------------------------


def repairs(checks: Iterable[Check]) -> list[tuple[str, ...]]:
    """The commands that mend the failed checks, each once; nothing that works is touched."""
    commands = (c for check in checks if check.status == "fail" for c in check.commands)
    return list(dict.fromkeys(commands))


def install(commands: Sequence[tuple[str, ...]]) -> Path:
    """Runs the commands, each shown first; the log of what they printed.

    Raises:
        UserError: one of them failed; names the log.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    log = Path(cache) / "cosmos" / "setup.log"
    console.say(f"installing what is missing; the output of the commands goes to {log}")
    with layout.disk_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        stream = log.open("a", encoding="utf-8")
    with stream:
        for command in commands:
            shown = shlex.join(command)
            console.say(f"$ {shown}")
            print(f"$ {shown}", file=stream, flush=True)
            # No stdin: nobody may be there to answer.
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if done.returncode:
                raise UserError(
                    f"`{shown}` failed with code {done.returncode}: {_last_line(log.read_text())}",
                    code=ExitCode.ENVIRONMENT,
                    where=str(log),
                    fix="run it by hand, then cosmos setup again",
                )
    return log


def _apt(package: str) -> tuple[tuple[str, ...], ...]:
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


def _pip(requirement: str) -> tuple[tuple[str, ...], ...]:
    return ((sys.executable, "-m", "pip", "install", requirement),)


# --- probes, each in a child process --------------------------------------------------------------


def probe_torch() -> dict[str, Any]:
    """Version, CUDA version and usable GPUs of the installed torch."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(i) for i in range(count)]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [[device.name, device.total_memory] for device in devices],
    }


def probe_video() -> dict[str, Any]:
    """Versions of torchcodec and FFmpeg, after two seconds of mp4 were written and read back."""
    import torch
    import torchcodec

    from cosmos_cli.model import video

    frames, height, width, fps = 48, 64, 96, 24.0
    ramp = torch.arange(width).expand(3, frames, height, width)
    moving = (ramp * 2 + torch.arange(frames).view(1, -1, 1, 1)).to(torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two_seconds.mp4"
        video.write_mp4(path, moving, fps, 18)
        decoded = video.read_frames(path, range(frames))
    error = (decoded.float() - moving.float()).abs().mean().item()
    if decoded.shape != moving.shape or error > 4:
        raise RuntimeError(f"the mp4 came back as {tuple(decoded.shape)}, {error:.1f} levels off")
    return {"torchcodec": torchcodec.__version__, "ffmpeg": torchcodec.ffmpeg_major_version}


def probe_deepspeed() -> dict[str, Any]:
    """The version of DeepSpeed, after one step of ZeRO-3 in this process changed the weights."""
    import deepspeed
    import torch
    from deepspeed import ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        # Its shared-memory all-reduce would be compiled for over a minute.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch.distributed.HashStore(),
        rank=0,
        world_size=1,
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    x = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
    before = engine(x).square().mean()
    engine.backward(before)
    engine.step()
    after = engine(x).square().mean()
    if before.item() == after.item():
        raise RuntimeError("a ZeRO-3 step left the weights as they were")
    torch.distributed.destroy_process_group()
    return {"version": deepspeed.__version__, "backend": device.type}


def probe_transformers() -> dict[str, Any]:
    """The version of transformers, whose T5 encoder could be imported."""
    import transformers
    from transformers import T5EncoderModel, T5TokenizerFast  # noqa: F401

    return {"version": transformers.__version__}


PROBES = {
    "torch": probe_torch,
    "video": probe_video,
    "deepspeed": probe_deepspeed,
    "transformers": probe_transformers,
}


@dataclass(frozen=True)
class Outcome:
    """What a probe found, or the end of its life as text; exactly one of them is filled."""

    facts: dict[str, Any]
    error: str = ""


def _run_probes(*, on_gpu: bool) -> dict[str, Outcome]:
    """The outcome of every probe; they run side by side."""
    environment = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # Nothing in the working directory may pass for a package.
    environment["PYTHONSAFEPATH"] = "1"
    environment.setdefault("OMP_NUM_THREADS", "1")
    if not on_gpu:
        # Without it DeepSpeed guesses, and prints the guess on stdout.
        environment.setdefault("DS_ACCELERATOR", "cpu")
    children = {
        name: subprocess.Popen(
            [sys.executable, "-m", "cosmos_cli.checks", name],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in PROBES
    }
    try:
        return {name: _outcome(child) for name, child in children.items()}
    finally:
        for child in children.values():
            child.kill()
            child.wait()


def _outcome(child: subprocess.Popen[str]) -> Outcome:
    try:
        printed, complaints = child.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return Outcome({}, f"did not finish within {PROBE_SECONDS} s")
    if child.returncode < 0:
        return Outcome({}, f"died of {signal.Signals(-child.returncode).name}")
    if child.returncode:
        return Outcome({}, complaints)
    # Libraries print on stdout too; the answer is the last line.
    return Outcome(json.loads(printed.splitlines()[-1]))


def _last_line(text: str) -> str:
    """The line of an output that says why: of a traceback its last exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    exceptions = [line for line in lines if re.match(r"(E|[\w.]+(Error|Exception)): ", line)]
    return ["", *lines, *exceptions][-1][:160]


# --- rows -----------------------------------------------------------------------------------------


def _python() -> Check:
    fits = OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON
    return Check(
        "Python",
        "ok" if fits else "fail",
        f"{platform.python_version()} at {sys.executable}",
        "" if fits else "install Python 3.11, 3.12 or 3.13, then bash recipes/install.sh",
    )


def _system() -> Check:
    if sys.platform != "linux":
        sentence = "cosmos runs on Linux: on Windows use WSL2 with Ubuntu, macOS is not supported"
        return Check("operating system", "fail", platform.platform(), sentence)
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = "Linux"
    return Check("operating system", "ok", f"{name}, {platform.machine()}")


def _torch(outcome: Outcome) -> Check:
    if outcome.error:
        return Check("torch", "fail", _last_line(outcome.error), "bash recipes/install.sh")
    cuda = outcome.facts["cuda"]
    build = f"CUDA {cuda}" if cuda else "CPU"
    return Check("torch", "ok", f"{outcome.facts['version']}, {build}")


def _gpus(outcome: Outcome, names: list[str], r: Recipe) -> Check:
    missing: Status = "warn" if r.spec.embedded else "fail"
    usable = Counter(
        f"{name}, {console.size(size)}" for name, size in outcome.facts.get("gpus", ())
    )
    if usable:
        found = "; ".join(f"{count} x {text}" for text, count in usable.items())
        return Check("GPUs", "ok", found)
    if names:
        cuda = outcome.facts.get("cuda")
        fix = (
            f"install a driver for CUDA {cuda}, or a torch built for the driver"
            if cuda
            else "install a CUDA build: bash recipes/install.sh --torch cuda"
        )
        return Check("GPUs", missing, f"{len(names)} x {names[0]}, but torch cannot use it", fix)
    if r.spec.embedded:
        return Check("GPUs", "warn", "none; this model also trains on the CPU")
    return Check(
        "GPUs", "fail", "none", "use a machine with NVIDIA GPUs, or start with the recipe tiny"
    )


def _video(outcome: Outcome) -> Check:
    name = "FFmpeg and torchcodec"
    if not outcome.error:
        facts = outcome.facts
        found = f"FFmpeg {facts['ffmpeg']}, torchcodec {facts['torchcodec']}: mp4 written and read"
        return Check(name, "ok", found)
    # torchcodec tries one build per FFmpeg version and reports each; only what is not about the
    # absence of that version matters.
    reasons = re.findall(r"^OSError: (?!Could not load)(.+)$", outcome.error, re.MULTILINE)
    others = [reason for reason in reasons if not re.search(r"lib(av|sw)\w*\.so", reason)]
    if reasons and not others:
        commands = _apt("ffmpeg")
        fix = (
            "cosmos setup --install"
            if commands
            else "install FFmpeg 4 to 8: apt-get install ffmpeg"
        )
        return Check(name, "fail", "FFmpeg's libraries are missing", fix, commands)
    if others and "libpython" in others[0]:
        return _shared_python(name)
    if others:
        found = f"torchcodec does not match torch: {others[0][:100]}"
        return Check(name, "fail", found, "cosmos setup --install", _pip(TORCHCODEC))
    if "No module named 'torchcodec'" in outcome.error:
        fix = "cosmos setup --install"
        return Check(name, "fail", "torchcodec is missing", fix, _pip(TORCHCODEC))
    return Check(name, "fail", _last_line(outcome.error), "mend what is named here")


def _shared_python(name: str) -> Check:
    """The failed row of a Python whose shared library torchcodec cannot find."""
    folder, library = sysconfig.get_config_vars("LIBDIR", "INSTSONAME")
    found = f"torchcodec needs {library}, which is missing"
    if Path(str(folder), str(library)).exists():
        return Check(name, "fail", found, f"export LD_LIBRARY_PATH={folder}")
    commands = _apt(f"libpython3.{sys.version_info.minor}") if sys.base_prefix == "/usr" else ()
    fix = "cosmos setup --install" if commands else "use a Python that was built --enable-shared"
    return Check(name, "fail", found, fix, commands)


def _deepspeed(outcome: Outcome) -> Check:
    if not outcome.error:
        facts = outcome.facts
        found = f"{facts['version']}: one ZeRO-3 step on {facts['backend']}"
        return Check("DeepSpeed", "ok", found)
    if "No module named 'deepspeed'" in outcome.error:
        fix = "cosmos setup --install"
        return Check("DeepSpeed", "fail", "missing", fix, _pip(DEEPSPEED))
    fix = f"pip install --force-reinstall --no-deps '{DEEPSPEED}'"
    return Check("DeepSpeed", "fail", _last_line(outcome.error), fix)


def _apex() -> list[Check]:
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations if spec else None) or ()
    if not spec or any(Path(folder, "optimizers").is_dir() for folder in folders):
        return []
    found = "the package apex is not NVIDIA's but PyPI's unrelated one"
    return [Check("Apex", "warn", found, "pip uninstall apex; cosmos does not need it")]


def _transformers(outcome: Outcome) -> Check:
    if outcome.error:
        fix = "bash recipes/install.sh"
        return Check("transformers", "fail", _last_line(outcome.error), fix)
    return Check("transformers", "ok", outcome.facts["version"])


def _disk(r: Recipe) -> Check:
    run = Run(r.run_dir.absolute())
    try:
        launch.check_disk(r, run, (run.resumable_steps() or [0])[-1])
    except UserError as error:
        return Check("free disk", "fail", f"{error.what} at {error.where}", error.fix)
    free = layout.free_bytes(run.root)
    return Check("free disk", "ok", f"{console.size(free)} for {run.root}")


def _memory(r: Recipe) -> Check:
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    needed = WORKING_MEMORY_BYTES + 2 * r.spec.dit.parameters
    found = f"{console.size(total)}"
    if total < needed:
        fix = "close other programs or use a larger machine"
        return Check("memory", "warn", f"{found}, about {console.size(needed)} are used", fix)
    return Check("memory", "ok", found)


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    total = shutil.disk_usage(folder).total if folder.is_dir() else 0
    enough = total >= SHARED_MEMORY_BYTES
    fix = "" if enough else "in a container: docker run --shm-size=16g"
    return Check("shared memory", "ok" if enough else "warn", console.size(total), fix)


def _open_files() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < OPEN_FILES:
        return Check("open files", "warn", f"at most {soft}", "ulimit -n 4096")
    return Check("open files", "ok", "no limit" if soft < 0 else f"at most {soft}")


def _writable(key: str, folder: str) -> Check:
    path = Path(folder).absolute()
    try:
        with tempfile.TemporaryFile(dir=layout.nearest_existing(path)):
            return Check(key, "ok", f"{path} can be written")
    except UserError as error:
        return Check(key, "fail", str(error), f"make it writable, or set {key}")
    except OSError as error:
        found = f"{path}: {os.strerror(error.errno or 0)}"
        return Check(key, "fail", found, f"make it writable, or set {key}")


def _clock() -> Check:
    today = time.strftime("%Y-%m-%d %H:%M %Z")
    # A wrong year breaks every download with a message about certificates.
    if 2026 <= time.localtime().tm_year < 2100:
        return Check("clock", "ok", today)
    return Check("clock", "fail", today, "set the date: sudo timedatectl set-ntp true")


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
