"""What is tried out on this machine, each thing in processes of its own. No torch at import.

A broken installation, a hanging network or a crash is thereby an outcome like any other. The
processes are forked from one that has imported what takes longest: torch and its compiler, which
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

from cosmos_cli import download
from cosmos_cli.assets import Asset
from cosmos_cli.errors import UserError

# On a busy machine, or from a cold network disk, importing torch alone takes a minute.
PROBE_SECONDS = 180
HUNG = "did not finish in time"
NCCL_BYTES = 2**28


@dataclass(frozen=True)
class Probe:
    """One function of `PROBES`, run by `ranks` processes at once.

    The function gets `arguments`, and before them, when there are several ranks or it trains, the
    path of a file by which the ranks find one another.
    """

    label: str
    function: str
    arguments: tuple[str, ...] = ()
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a probe found, or the end of its life as text; exactly one of them is filled."""

    facts: dict[str, Any]
    error: str = ""


def run(probes: Sequence[Probe]) -> dict[str, Outcome]:
    """The outcome of every probe by its label; they run side by side."""
    # Nothing in the working directory may pass for a package. And DeepSpeed would import torch's
    # compiler whole, for an optimizer that is not used here.
    own = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    asked = json.dumps({"seconds": PROBE_SECONDS, "probes": [asdict(probe) for probe in probes]})
    with tempfile.TemporaryDirectory() as folder:
        stem = subprocess.Popen(
            [sys.executable, "-m", "cosmos_cli.probes", folder, asked],
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # It may hang as well, while it imports.
            out, err = stem.communicate(timeout=PROBE_SECONDS + 20)
        except subprocess.TimeoutExpired:
            return {probe.label: Outcome({}, HUNG) for probe in probes}
        finally:
            # With all that it forked, also after Ctrl-C.
            with suppress(ProcessLookupError):
                os.killpg(stem.pid, signal.SIGKILL)
            stem.communicate()
    if stem.returncode:
        return {probe.label: _outcome(stem.returncode, out, err) for probe in probes}
    found = _outcome(stem.returncode, out, err).facts
    return {probe.label: Outcome(**found[probe.label]) for probe in probes}


def _outcome(code: int, out: str, err: str) -> Outcome:
    """What became of a process; libraries print on stdout too, the answer is the last line."""
    if code == -signal.SIGALRM:
        return Outcome({}, HUNG)
    if code:
        return Outcome({}, f"died of {signal.Signals(-code).name}" if code < 0 else err)
    return Outcome(json.loads(out.splitlines()[-1]))


# --- the process that forks -----------------------------------------------------------------------


def _fork(folder: Path, probes: Sequence[Probe], seconds: int) -> Probe | None:
    """Forks each rank of each probe; in each of them it returns what is to be tried out there.

    In this process it returns nothing, when all have ended and their outcomes were printed.
    """
    children: dict[int, tuple[str, list[Path]]] = {}
    for probe, rank in [(each, rank) for each in probes for rank in range(each.ranks)]:
        said = [folder / f"{probe.label}.{name}{rank}" for name in ("out", "err")]
        files = [os.open(path, os.O_WRONLY | os.O_CREAT) for path in said]
        pid = os.fork()
        if not pid:
            signal.alarm(seconds)
            for stream, file in enumerate(files, start=1):
                os.dup2(file, stream)
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": probe.ranks}
            os.environ.update({k: str(v) for k, v in own.items()} | probe.environment)
            return probe
        children[pid] = probe.label, said
    outcomes: dict[str, dict[str, Any]] = {}
    while children:
        pid, status = os.wait()
        label, said = children.pop(pid)
        mates = [other for other, (its, _) in children.items() if its == label]
        code = os.waitstatus_to_exitcode(status)
        if label not in outcomes and (code or not mates):
            out, err = (path.read_text(errors="replace") for path in said)
            outcomes[label] = asdict(_outcome(code, out, err))
            # They would wait for it.
            for mate in mates:
                os.kill(mate, signal.SIGKILL)
    print(json.dumps(outcomes))
    return None


# --- inside a forked process ----------------------------------------------------------------------


def probe_torch() -> dict[str, Any]:
    """Version, CUDA version and usable GPUs of the installed torch."""
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


def _join(store: str) -> Any:
    """Joins the other ranks of this probe; the device of this one."""
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
    """The version of DeepSpeed, after one step of ZeRO-3 changed the weights."""
    import deepspeed
    import torch
    from deepspeed import ops

    device = _join(store)
    if device.type == "cpu":
        # Its shared-memory all-reduce would be compiled for over a minute.
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
        raise RuntimeError("a ZeRO-3 step left the weights as they were")
    torch.distributed.destroy_process_group()
    return {"version": deepspeed.__version__, "backend": device.type}


def probe_nccl(store: str) -> dict[str, Any]:
    """Bus bandwidth of an all-reduce of 268 MB over all GPUs, in bytes per second.

    Source: NVIDIA/nccl-tests, doc/PERFORMANCE.md: 2 (n - 1) / n times the bytes over the time.
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
    """The version of transformers, whose T5 encoder could be imported."""
    import transformers
    from transformers import T5EncoderModel, T5TokenizerFast  # noqa: F401

    return {"version": transformers.__version__}


def probe_transformer_engine() -> dict[str, Any]:
    """The version of Transformer Engine, whose linear and norm agree with torch's on the GPU."""
    # First, since its libraries are those that Transformer Engine loads.
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
        raise RuntimeError(f"its linear layer is {error} off torch's")
    return {"version": transformer_engine.__version__}


def probe_apex() -> dict[str, Any]:
    """One step of the fused Adam of NVIDIA's Apex, which agrees with torch's on the GPU."""
    # First, since the extension is linked against it.
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
        raise RuntimeError(f"its fused Adam is {error} off torch's")
    return {}


def probe_hub(*repositories: str) -> dict[str, Any]:
    """Which of some repositories, each `model:owner/name` or `dataset:...`, may be read.

    What keeps one from being read is `refused`, unless it is only that the hub cannot be asked.
    """

    def ask(repository: str) -> tuple[str, str, str]:
        kind, _, repo = repository.partition(":")
        try:
            download.require_access(Asset(repo, kind, Path(), ()))
        except UserError as error:
            verdict = "unknown" if error.what.startswith(download.UNREACHABLE) else "refused"
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
TRAINING = ("deepspeed", "nccl")


def main(folder: Path, seconds: int, probes: Sequence[dict[str, Any]]) -> None:
    """Imports what most probes import, forks them, and is then one of them."""
    # What is missing or broken is told by those that need it. Neither starts a thread or a GPU.
    with suppress(ImportError, OSError, RuntimeError):
        importlib.import_module("torch._dynamo")
    if probe := _fork(folder, [Probe(**about) for about in probes], seconds):
        meeting = (str(folder / f"{probe.label}.store"),) if probe.function in TRAINING else ()
        print(json.dumps(PROBES[probe.function](*meeting, *probe.arguments)))
    # To take down a Python with all of torch in it costs each process as much as its probe.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
