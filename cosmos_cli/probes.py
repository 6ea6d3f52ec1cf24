"""What is tried out on this machine, each thing in child processes of its own. No torch at import.

A broken installation, a hanging network or a crash is thereby an outcome like any other.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_cli import download
from cosmos_cli.assets import Asset
from cosmos_cli.errors import UserError

# On a busy machine, or from a cold network disk, importing torch alone takes a minute.
PROBE_SECONDS = 180
HUNG = "did not finish within"
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
    with tempfile.TemporaryDirectory() as folder:
        groups = {
            probe.label: [_start(probe, rank, Path(folder)) for rank in range(probe.ranks)]
            for probe in probes
        }
        try:
            ended = _wait(groups)
        finally:
            for child in itertools.chain(*groups.values()):
                child.kill()
                child.wait()
        return {label: _outcome(Path(folder, label), ended.get(label)) for label in groups}


def _start(probe: Probe, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        # Nothing in the working directory may pass for a package.
        "PYTHONSAFEPATH": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(probe.ranks),
    }
    environment.setdefault("OMP_NUM_THREADS", "1")
    meeting = (str(folder / f"{probe.label}.store"),) if probe.function in TRAINING else ()
    home = folder / probe.label
    home.mkdir(exist_ok=True)
    with (home / f"out{rank}").open("wb") as out, (home / f"err{rank}").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "cosmos_cli.probes", probe.function, *meeting, *probe.arguments],
            env=environment | probe.environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )


def _wait(groups: dict[str, list[subprocess.Popen[bytes]]]) -> dict[str, tuple[int, int]]:
    """Rank and exit code that decided each group; none for a group that ran out of time."""
    ended: dict[str, tuple[int, int]] = {}
    deadline = time.monotonic() + PROBE_SECONDS
    while len(ended) < len(groups) and time.monotonic() < deadline:
        time.sleep(0.05)
        for label in groups.keys() - ended:
            codes = [child.poll() for child in groups[label]]
            # One that failed leaves the others waiting for it.
            failed = [(rank, code) for rank, code in enumerate(codes) if code]
            if failed or None not in codes:
                ended[label] = failed[0] if failed else (0, 0)
                for child in groups[label]:
                    child.kill()
    return ended


def _outcome(home: Path, ended: tuple[int, int] | None) -> Outcome:
    if ended is None:
        return Outcome({}, f"{HUNG} {PROBE_SECONDS} s")
    rank, code = ended
    if code < 0:
        return Outcome({}, f"died of {signal.Signals(-code).name}")
    if code:
        return Outcome({}, (home / f"err{rank}").read_text(errors="replace"))
    # Libraries print on stdout too; the answer is the last line.
    return Outcome(json.loads((home / "out0").read_text().splitlines()[-1]))


# --- inside a child -------------------------------------------------------------------------------


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

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
