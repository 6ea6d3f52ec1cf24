"""Test this machine's packages, GPUs and network, each in its own process. No torch at import.

A broken installation, a hanging network or a crash is then an outcome like any other. The
processes are forked from one that has imported the slowest modules: torch and its compiler, which
DeepSpeed, transformers and torchcodec all import.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cosmos_cli.download import hub
from cosmos_cli.download.assets import Asset
from cosmos_cli.errors import UserError

# On a busy machine or from a cold network disk, importing torch alone takes a minute.
PROBE_SECONDS = 180
HUNG = "did not finish in time"
NCCL_BYTES = 2**28


@dataclass(frozen=True)
class Probe:
    """One function of `PROBES`, run by `ranks` processes at once.

    The function gets `arguments`. Those of `DISTRIBUTED` first get the path of a rendezvous file.
    """

    label: str
    function: str
    arguments: tuple[str, ...] = ()
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """The facts that a probe found, or else the error that ended it."""

    facts: dict[str, Any]
    error: str = ""


def run_probes(probes: Sequence[Probe]) -> dict[str, Outcome]:
    """Run the probes at the same time; return the outcome of each by its label."""
    # PYTHONSAFEPATH: nothing in the working directory may be imported as a package.
    # TORCHDYNAMO_DISABLE: DeepSpeed would import all of torch's compiler for an unused optimizer.
    own = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    request = json.dumps({"seconds": PROBE_SECONDS, "probes": [asdict(probe) for probe in probes]})
    with tempfile.TemporaryDirectory() as folder:
        parent = subprocess.Popen(
            [sys.executable, "-m", "cosmos_cli.setup.probes", folder, request],
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # This process may hang too, while it imports torch.
            out, err = parent.communicate(timeout=PROBE_SECONDS + 20)
        except subprocess.TimeoutExpired:
            return {probe.label: Outcome({}, HUNG) for probe in probes}
        finally:
            # Kill the whole process group, also after Ctrl-C.
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
            parent.communicate()
    if parent.returncode:
        return {probe.label: _outcome(parent.returncode, out, err) for probe in probes}
    found = _outcome(parent.returncode, out, err).facts
    return {probe.label: Outcome(**found[probe.label]) for probe in probes}


def _outcome(code: int, out: str, err: str) -> Outcome:
    """Return the outcome of a process; the last line is its facts, after what libraries print."""
    if code == -signal.SIGALRM:
        return Outcome({}, HUNG)
    if code:
        return Outcome({}, f"died of {signal.Signals(-code).name}" if code < 0 else err)
    return Outcome(json.loads(out.splitlines()[-1]))


# --- the parent process ---------------------------------------------------------------------------


def _fork(folder: Path, probes: Sequence[Probe], seconds: int) -> Probe | None:
    """Fork each rank of each probe, wait for all of them and print their outcomes.

    Returns:
        The probe to run in each forked process; None in the parent, after all have ended.
    """
    children: dict[int, tuple[str, list[Path]]] = {}
    for probe, rank in [(each, rank) for each in probes for rank in range(each.ranks)]:
        outputs = [folder / f"{probe.label}.{name}{rank}" for name in ("out", "err")]
        files = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in outputs]
        pid = os.fork()
        if not pid:
            signal.alarm(seconds)
            for stream, file in enumerate(files, start=1):
                os.dup2(file, stream)
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": probe.ranks}
            os.environ.update({k: str(v) for k, v in own.items()} | probe.environment)
            return probe
        children[pid] = probe.label, outputs
    outcomes: dict[str, dict[str, Any]] = {}
    while children:
        pid, status = os.wait()
        label, outputs = children.pop(pid)
        other_ranks = [each for each, (its_label, _) in children.items() if its_label == label]
        code = os.waitstatus_to_exitcode(status)
        if label not in outcomes and (code or not other_ranks):
            out, err = (path.read_text(errors="replace") for path in outputs)
            outcomes[label] = asdict(_outcome(code, out, err))
            # The other ranks of this probe would wait for the one that ended.
            for other in other_ranks:
                os.kill(other, signal.SIGKILL)
    print(json.dumps(outcomes))
    return None


# --- inside a forked process ----------------------------------------------------------------------


def probe_torch() -> dict[str, Any]:
    """Return torch's version, its CUDA version and the usable GPUs."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(i) for i in range(count)]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": [
            {"name": d.name, "bytes": d.total_memory, "capability": [d.major, d.minor]}
            for d in devices
        ],
    }


def probe_video() -> dict[str, Any]:
    """Write and read two seconds of mp4; return the versions of torchcodec and FFmpeg."""
    import torch
    import torchcodec

    from cosmos_cli.model import mp4, video

    frames, height, width, fps = 48, 64, 96, 24.0
    ramp = torch.arange(width).expand(3, frames, height, width)
    moving = (ramp * 2 + torch.arange(frames).view(1, -1, 1, 1)).to(torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two_seconds.mp4"
        mp4.write_mp4(path, moving, fps, 18)
        decoded = video.read_frames(path, range(frames))
    error = (decoded.float() - moving.float()).abs().mean().item()
    if decoded.shape != moving.shape or error > 4:
        raise RuntimeError(
            f"the mp4 was decoded to shape {tuple(decoded.shape)}, {error:.1f} grey levels off"
        )
    return {"torchcodec": torchcodec.__version__, "ffmpeg": torchcodec.ffmpeg_major_version}


def _join(store: str) -> Any:
    """Join the other ranks of this probe; return the device of this one."""
    import torch

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=torch.distributed.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
    )
    return torch.device("cuda", rank) if on_gpu else torch.device("cpu")


def probe_deepspeed(store: str) -> dict[str, Any]:
    """Run one ZeRO-3 step; return the version of DeepSpeed and the type of the device."""
    import deepspeed
    import torch
    from deepspeed import ops

    device = _join(store)
    if device.type == "cpu":
        # Compiling its shared-memory all-reduce takes over a minute.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
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
        raise RuntimeError("a ZeRO-3 step did not change the weights")
    torch.distributed.destroy_process_group()
    return {"version": deepspeed.__version__, "backend": device.type}


def probe_nccl(store: str) -> dict[str, Any]:
    """Measure the bus bandwidth of an all-reduce of 268 MB over all GPUs, in bytes per second.

    Source: NVIDIA/nccl-tests, doc/PERFORMANCE.md: 2 (n - 1) / n times bytes / seconds.
    """
    import torch

    device = _join(store)
    ranks = torch.distributed.get_world_size()
    numbers = torch.ones(NCCL_BYTES // 4, device=device)
    torch.distributed.all_reduce(numbers)
    if numbers.unique().tolist() != [ranks]:
        raise RuntimeError("an all-reduce gave a wrong sum")
    rounds = 10
    torch.cuda.synchronize(device)
    started = time.monotonic()
    for _ in range(rounds):
        torch.distributed.all_reduce(numbers)
    torch.cuda.synchronize(device)
    seconds = (time.monotonic() - started) / rounds
    torch.distributed.destroy_process_group()
    return {"bytes_per_second": 2 * (ranks - 1) / ranks * NCCL_BYTES / seconds}


def probe_transformers() -> dict[str, Any]:
    """Import the T5 encoder; return the version of transformers."""
    import transformers
    from transformers import T5EncoderModel, T5TokenizerFast  # noqa: F401

    return {"version": transformers.__version__}


def probe_transformer_engine() -> dict[str, Any]:
    """Compare a linear and a norm with torch's on the GPU; return Transformer Engine's version."""
    # Import torch first: Transformer Engine loads the libraries that come with it.
    import torch
    import transformer_engine
    from transformer_engine import pytorch as te

    torch.manual_seed(0)
    linear = te.Linear(64, 64, bias=False, params_dtype=torch.bfloat16)
    norm = te.RMSNorm(64).to(torch.bfloat16)
    x = torch.randn(32, 64, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        plain = torch.nn.functional.rms_norm(x, (64,), eps=1e-5) @ linear.weight.T
        error = (linear(norm(x)) - plain).abs().max().item()
    if not error < 0.1:
        raise RuntimeError(f"its linear layer differs from torch's by {error}")
    return {"version": transformer_engine.__version__}


def probe_apex() -> dict[str, Any]:
    """Compare one step of Apex's fused Adam with torch's AdamW on the GPU."""
    # Import torch first: the extension of Apex is linked against it.
    import torch
    from apex.optimizers import FusedAdam

    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(64, device="cuda")) for _ in range(2))
    ours.grad = torch.randn(64, device="cuda")
    theirs.grad = ours.grad.clone()
    torch.optim.AdamW([ours], lr=0.1).step()
    FusedAdam([theirs], lr=0.1, weight_decay=0.01).step()
    error = (ours - theirs).abs().max().item()
    if not error < 1e-5:
        raise RuntimeError(f"its fused Adam differs from torch's by {error}")
    return {}


def probe_hub(*repositories: str) -> dict[str, Any]:
    """Return which repositories this account may read: open, refused or unknown.

    A repository is `model:owner/name` or `dataset:owner/name`. It is unknown if the hub cannot be
    reached.
    """

    def ask(repository: str) -> tuple[str, str, str]:
        kind, _, repo = repository.partition(":")
        try:
            hub.require_access(Asset(repo, kind, Path(), ()))
        except UserError as error:
            verdict = "unknown" if error.what.startswith(hub.UNREACHABLE) else "refused"
            return repo, verdict, str(error)
        return repo, "open", ""

    with ThreadPoolExecutor() as threads:
        return {"repositories": list(threads.map(ask, repositories))}


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": probe_torch,
    "video": probe_video,
    "deepspeed": probe_deepspeed,
    "nccl": probe_nccl,
    "transformers": probe_transformers,
    "transformer_engine": probe_transformer_engine,
    "apex": probe_apex,
    "hub": probe_hub,
}
DISTRIBUTED = ("deepspeed", "nccl")


def main(folder: Path, seconds: int, probes: Sequence[dict[str, Any]]) -> None:
    """Import torch's compiler and fork the probes; each forked process then runs its probe."""
    # The probes report what is missing or broken. This import starts no thread and uses no GPU, so
    # that forking afterwards is safe.
    with suppress(ImportError, OSError, RuntimeError):
        importlib.import_module("torch._dynamo")
    if probe := _fork(folder, [Probe(**about) for about in probes], seconds):
        store = str(folder / f"{probe.label}.store")
        rendezvous = (store,) if probe.function in DISTRIBUTED else ()
        print(json.dumps(PROBES[probe.function](*rendezvous, *probe.arguments)))
    # A regular exit of Python with torch loaded takes as long as a probe.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
