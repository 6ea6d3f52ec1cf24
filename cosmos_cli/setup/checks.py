"""Check whether this machine can run a recipe, and say how to fix what fails. No torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from ctypes.util import find_library
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cosmos_cli import console, files, gpus
from cosmos_cli.download import assets, fetch
from cosmos_cli.errors import UserError
from cosmos_cli.generate.answers import cache_dir
from cosmos_cli.paths import Run
from cosmos_cli.recipe import plan
from cosmos_cli.setup import installs, packages, probes
from cosmos_cli.setup.installs import last_line
from cosmos_cli.setup.packages import Check, Status
from cosmos_cli.setup.probes import Outcome, Probe
from cosmos_cli.train import launch, preflight, status

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)

# Below these limits something may fail, so they only warn.
SHARED_MEMORY_BYTES = 1e9
OPEN_FILES = 1024
# Ampere, the first architecture with bf16.
OLDEST_CAPABILITY = [8, 0]


CACHE = "XDG_CACHE_HOME"


def run_checks(r: Recipe, wanted: Iterable[str] = ()) -> list[Check]:
    """Run every check that the recipe needs, ordered so that each builds on the previous ones.

    `wanted` may name transformer-engine and apex, which then fail instead of warn if missing.
    """
    names = gpus.gpu_names()
    absent = [asset for asset in assets.of_recipe(r) if not fetch.is_recorded(asset)]
    outcomes = probes.run_probes(list(_probes(names, absent)))
    torch = outcomes["torch"]
    usable = len(torch.facts.get("gpus", ()))
    if usable > 1:
        # Run it alone: it measures a speed, which other probes would lower.
        outcomes |= probes.run_probes([Probe("nccl", "nccl", ranks=usable)])
    rows = [
        _python(),
        _system(),
        packages.torch_row(torch),
        _gpus(torch, names, r),
        *_nccl(outcomes.get("nccl"), usable, r),
        *packages.rows_on_torch(outcomes, wanted),
        _hevc(),
        _disk(r),
        _memory(r),
        _shared_memory(),
        _open_files(),
        _writable("output_root", r.output_root),
        _writable("dataset_dir", r.dataset_dir),
        _writable("checkpoints_dir", r.checkpoints_dir),
        _cache(),
        *_hub(outcomes.get("hub")),
        _clock(),
    ]
    patience = "try again when the machine is less busy; check for a hanging driver or network disk"
    return [replace(row, fix=patience) if probes.HUNG in row.found else row for row in rows]


def mending(checks: Iterable[Check]) -> list[installs.Command]:
    """Return the commands that fix the failed checks, each once. Nothing that works is changed.

    If the cache folder is not writable, return none: pip and the log of the commands write to it.
    """
    rows = list(checks)
    if any(row.name == CACHE and row.status != "ok" for row in rows):
        return []
    failed = [row for row in rows if row.status == "fail"]
    return list(dict.fromkeys(command for check in failed for command in check.commands))


def _probes(names: list[str], absent: list[assets.Asset]) -> Iterator[Probe]:
    # If unset, DeepSpeed guesses the accelerator and prints the guess on stdout. The probe with
    # 2 processes uses the CPU unless there are 2 GPUs.
    on_cpu = {"DS_ACCELERATOR": "cpu"}
    yield Probe("torch", "torch")
    yield Probe("video", "video")
    yield Probe("deepspeed", "deepspeed", environment={} if names else on_cpu)
    two = {} if len(names) > 1 else on_cpu
    yield Probe("deepspeed in 2 processes", "deepspeed", ranks=2, environment=two)
    yield Probe("transformers", "transformers")
    if names and importlib.util.find_spec("transformer_engine"):
        yield Probe("transformer_engine", "transformer_engine")
    if names and importlib.util.find_spec("amp_C"):
        yield Probe("apex", "apex")
    if absent:
        yield Probe("hub", "hub", tuple(sorted({f"{a.kind}:{a.repo}" for a in absent})))


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
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = "Linux"
    return Check("operating system", "ok", f"{name}, {platform.machine()}")


def _gpus(outcome: Outcome, names: list[str], r: Recipe) -> Check:
    missing: Status = "warn" if r.spec.embedded else "fail"
    usable = outcome.facts.get("gpus", ())
    if usable:
        return _usable_gpus(usable)
    if names:
        found = f"{len(names)} x {names[0]}, but torch cannot use it"
        cuda, driver = outcome.facts.get("cuda"), _driver_version()
        return Check("GPUs", missing, f"{found} (driver {driver})", _fix_of_driver(cuda, driver))
    remark = gpus.visible().remark
    found = f"none: {remark}" if remark else "none"
    if r.spec.embedded:
        return Check("GPUs", "warn", f"{found}; this model also trains on the CPU")
    fix = "use a machine with NVIDIA GPUs, or start with the tiny model: `cosmos setup tiny`"
    return Check("GPUs", "fail", found, f"unset {gpus.VARIABLE}" if remark else fix)


def _driver_version() -> str:
    import pynvml

    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _fix_of_driver(cuda: str | None, driver: str) -> str:
    """Return how to make torch, built for CUDA `cuda`, use the GPUs of a driver."""
    build = installs.torch_build(driver)
    if not build:
        return "update the NVIDIA driver to R580 or newer; torch needs R525 at least"
    if cuda and cuda.replace(".", "") <= build.removeprefix("cu"):
        return "see what `nvidia-smi` says; restart the machine if the driver was just updated"
    return f"bash recipes/install.sh --torch {build}"


def _usable_gpus(usable: list[dict[str, Any]]) -> Check:
    kinds = Counter(
        f"{gpu['name']}, {console.size(gpu['bytes'])}, "
        f"compute capability {'.'.join(map(str, gpu['capability']))}"
        for gpu in usable
    )
    driver, health, damaged = _driver_facts()
    found = "; ".join(f"{count} x {text}" for text, count in kinds.items())
    remark = gpus.visible().remark
    found = ", ".join(filter(None, [found, *health, driver, remark]))
    if damaged:
        fix = "restart the machine; if the errors return, have the GPU replaced"
        return Check("GPUs", "warn", f"{found}; uncorrected memory errors on GPU {damaged}", fix)
    if any(gpu["capability"] < OLDEST_CAPABILITY for gpu in usable):
        fix = "bf16 is slow before Ampere: use `--set precision=fp32`"
        return Check("GPUs", "warn", found, fix)
    return Check("GPUs", "ok", found)


def _driver_facts() -> tuple[str, list[str], str]:
    """Return the driver, the ECC and NVLink state, and the indices of GPUs with memory errors."""
    import pynvml

    shown = gpus.visible().gpus
    pynvml.nvmlInit()
    indices = sorted({gpu.index for gpu in shown})
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in indices]
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    version = pynvml.nvmlSystemGetDriverVersion()
    driver = f"driver {version} (CUDA {cuda // 1000}.{cuda % 1000 // 10})"
    ecc: set[str] = set()
    links: set[int] = set()
    damaged = []
    for index, handle in zip(indices, handles, strict=True):
        links.add(sum(_has_link(handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)))
        try:
            ecc.add("ECC on" if pynvml.nvmlDeviceGetEccMode(handle)[0] else "ECC off")
            errors = pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            )
        except pynvml.NVMLError:
            ecc.add("no ECC")
            continue
        damaged += [str(index)] if errors else []
    pynvml.nvmlShutdown()
    nvlink = [f"{'/'.join(map(str, sorted(links)))} NVLinks each"] if len(handles) > 1 else []
    return driver, [*sorted(ecc), *nvlink], ", ".join(damaged)


def _has_link(handle: Any, link: int) -> bool:
    import pynvml

    try:
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
    except pynvml.NVMLError:
        return False


def _nccl(outcome: Outcome | None, count: int, r: Recipe) -> list[Check]:
    if outcome is None:
        return []
    if outcome.error:
        status: Status = "warn" if r.num_processes == 1 else "fail"
        fix = "in a container: docker run --ipc=host; try NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1"
        return [Check("NCCL", status, last_line(outcome.error), fix)]
    rate = console.size(outcome.facts["bytes_per_second"])
    return [Check("NCCL", "ok", f"all-reduce over {count} GPUs at {rate}/s")]


def _hevc() -> Check:
    """Warn if nothing on this machine notices most damage in HEVC videos."""
    if find_library("de265"):
        return Check("libde265", "ok", "prep notices damage in HEVC videos")
    found = "missing, so prep does not notice most damage in HEVC videos"
    return Check("libde265", "warn", found, "apt-get install libde265-0")


def _disk(r: Recipe) -> Check:
    run = Run(r.run_dir)
    if run.last_step >= r.max_steps and status.is_finished(run):
        return Check("free disk", "ok", f"the run in {run.root} is finished")
    try:
        preflight.check_disk(r, run, run.last_step)
    except UserError as error:
        return Check("free disk", "fail", f"{error.what} at {error.where}", error.fix)
    free, needed = files.free_bytes(run.root), plan.disk(r, run.last_step).run_bytes
    found = f"{console.size(free)} at {run.root}, the run needs {console.size(needed)}"
    return Check("free disk", "ok", found)


def _memory(r: Recipe) -> Check:
    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    needed = 1e9 * plan.plan(r, launch.world_size(r), preflight.smallest_gpu()).cpu_gb
    found = f"{console.size(total)}"
    if total < needed:
        fix = "close other programs or use a larger machine"
        return Check("memory", "warn", f"{found}, about {console.size(needed)} are needed", fix)
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
        with tempfile.TemporaryFile(dir=files.nearest_existing(path)):
            return Check(key, "ok", f"{path} is writable")
    except UserError as error:
        return Check(key, "fail", str(error), f"make it writable, or use `--set {key}=FOLDER`")
    except OSError as error:
        found = f"{path}: {os.strerror(error.errno or 0)}"
        return Check(key, "fail", found, f"make it writable, or use `--set {key}=FOLDER`")


def _cache() -> Check:
    """Warn if the cache folder is not writable: the other verbs work without it, only slower."""
    row = _writable(CACHE, str(cache_dir()))
    if row.status == "ok":
        return row
    fix = f"nothing is cached, and --install does not work: `export {CACHE}=FOLDER`"
    return replace(row, status="warn", fix=fix)


def _hub(outcome: Outcome | None) -> list[Check]:
    """Return a row for each of the recipe's missing repositories that cannot be downloaded."""
    if outcome is None:
        return []
    if outcome.error:
        return [Check("model hub", "warn", last_line(outcome.error), "check the network")]
    repositories = outcome.facts["repositories"]
    closed = [(what, text) for _, what, text in repositories if what != "open"]
    if not closed:
        return [Check("model hub", "ok", f"{len(repositories)} repositories can be read")]
    if all(what == "unknown" for what, _ in closed):
        fix = "files that are not on disk cannot be downloaded"
        return [Check("model hub", "warn", closed[0][1], fix)]
    refused = dict.fromkeys(text for what, text in closed if what == "refused")
    return [Check("model hub", "fail", *text.rsplit("; ", 1)) for text in refused]


def _clock() -> Check:
    today = time.strftime("%Y-%m-%d %H:%M %Z")
    # With a wrong year, every download fails with an error about certificates.
    if 2026 <= time.localtime().tm_year < 2100:
        return Check("clock", "ok", today)
    return Check("clock", "fail", today, "set the date: sudo timedatectl set-ntp true")
