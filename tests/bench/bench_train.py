"""Measures training: `python tests/bench/bench_train.py --scratch DIR --out FILE [--gpus N]`.

Runs `cosmos train` on random weights of full size and random latents of 121 frames of 704x1280, as
a user would, and reads what the run says of itself: seconds of a step, MFU, peak memory and the
plan's, seconds that a step waited for data, and with `--save` for how long a save holds the run up.
With `--saves` the run saves twice when asked, is killed while the second save is written, and the
same command resumes it: how long saves hold training up and slow the steps meanwhile, and what a
resume takes.
With `--peer` the same clips train diffusers' network under the same ZeRO-3, every block
checkpointed. With `--world N` one process is rank 0 of N that are not there: PyTorch's fake process
group gives it its own part of the weights N times over, so that memory and arithmetic are those of
one GPU of N, and communication costs nothing; not with sequence_parallel, for there an exchange
gives nothing either. `--blocks` trains a network of fewer blocks. Several calls with one FILE make
a table; each adds a JSON object to it.

With `--model tiny` the same runs on a CPU in a minute, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import common
import psutil
import torch
from common import SHIPPED
from safetensors.torch import save_file
from torch import Tensor

from cosmos_cli import files, paths, ranks
from cosmos_cli.gpus import best_device
from cosmos_cli.model import weights
from cosmos_cli.recipe import loading, plan
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.spec import MODELS, ModelSpec
from cosmos_cli.train.engine import gpu_model

CLIPS = 8
# The first steps compile, allocate and let DeepSpeed learn the order of the weights.
WARM_UP = 3
PEER_STEPS = 6


def settings(options: argparse.Namespace) -> list[str]:
    """The recipe's changes: one clip a GPU and step, no pictures, nothing held out."""
    root, last = options.scratch, options.after + options.steps
    count = options.world or options.gpus
    chosen = [
        f"dataset_dir={root / 'dataset'}", f"base={base_file(options)}",
        f"output_root={options.runs}", f"name={options.name}", f"num_processes={count}",
        f"global_batch_size={count}", "micro_batch_size=1", f"max_steps={last}",
        f"save_every_steps={last}", "log_every_steps=1", "preview_every_steps=0",
        "sample_every_saves=0", "min_free_disk_gb=0", "warmup_steps=5", "holdout_share=0",
    ]  # fmt: skip
    if options.model == "7b":
        chosen += ["height=704", "width=1280"]
    if options.world:
        # Nobody else gives a sign of life.
        chosen.append("timeout_seconds=1000000")
    return [*chosen, *options.set]


def base_file(options: argparse.Namespace) -> Path:
    """Return the file of the weights that a run starts from."""
    path: Path = options.scratch / f"base_{options.model}_{options.blocks}.pt"
    return path


def shorten(model: str, blocks: int) -> None:
    """Gives all models of the size of `model` fewer blocks; 0 leaves them as they are."""
    embedded = loading.load(SHIPPED[model][0]).recipe.spec.embedded
    for name, whole in MODELS.items():
        if blocks and whole.embedded == embedded:
            MODELS[name] = replace(whole, dit=replace(whole.dit, blocks=blocks))


# --- what is trained ------------------------------------------------------------------------------


def make_dataset(root: Path, r: Recipe) -> None:
    """Random latents and text embeddings of full length, as prep lists them."""
    if (root / paths.MANIFEST_FILE).exists():
        return
    (root / "videos").mkdir(parents=True)
    generator, clips = torch.Generator().manual_seed(0), []
    text = torch.randn(r.spec.text.tokens, r.spec.text.channels, generator=generator) * 0.1
    (root / "text.pickle").write_bytes(pickle.dumps([text.half().numpy()]))
    for i in range(CLIPS):
        latent = r.spec.sigma_data * torch.randn(r.latent_shape, generator=generator)
        save_file({"latent": latent.bfloat16()}, root / f"{i}.safetensors")
        clips.append(
            {"video": f"{i}.mp4", "latent": f"{i}.safetensors", "text": "text.pickle", "fps": r.fps}
        )
    files.write_json(root / paths.MANIFEST_FILE, {"settings": {}, "videos": [], "clips": clips})


def make_base(options: argparse.Namespace, r: Recipe) -> None:
    """A model file of full size with no term zero, or its gradients would be."""
    from bench_generate import random_denoiser

    shorten(options.model, options.blocks)
    path = base_file(options)
    if path.exists():
        return
    net = random_denoiser(r.spec.dit, best_device(), torch.bfloat16)
    state = {f"net.{name}": tensor.cpu() for name, tensor in net.state_dict().items()}
    weights.save_dit(path, state, "pt")


# --- ours -----------------------------------------------------------------------------------------


def bench_ours(options: argparse.Namespace, r: Recipe, words: list[str]) -> dict[str, Any]:
    """One run of `cosmos train`, ended after its last step unless its save is measured."""
    run = paths.Run(r.run_dir)
    pairs = [word for pair in words for word in ("--set", pair)]
    command = [sys.executable, "-m", "cosmos_cli", "train", SHIPPED[options.model][0], *pairs]
    if options.world or options.blocks or options.memory:
        command = own_ranks(options)
    available = lowest = psutil.virtual_memory().available
    began, before = time.monotonic(), len(read_rows(run.metrics)) if options.after else 0
    seen, found = [], {"part": "ours"}
    with started(command, options.gpus) as process:
        while process.poll() is None:
            time.sleep(0.02)
            lowest = min(lowest, psutil.virtual_memory().available)
            rows = read_rows(run.metrics)[before:]
            seen += [time.monotonic()] * (len(rows) - len(seen))
            if len(rows) >= options.steps and not options.save:
                break
            if (
                options.after + options.steps in run.resumable_steps()
                and "save_seconds" not in found
            ):
                found["save_seconds"] = round(time.monotonic() - seen[-1], 1)
    if len(rows) < options.steps:
        raise SystemExit(f"ended with {process.returncode} after {len(rows)} steps")
    timed = rows[WARM_UP:]
    waits = [b - a - row["seconds"] for a, b, row in zip(seen, seen[1:], rows[1:], strict=False)]
    seconds = statistics.median(row["seconds"] for row in timed)
    found |= {"seconds": round(seconds, 3), "slowest": max(row["seconds"] for row in timed)}
    found |= {"data_wait": round(statistics.median(waits[WARM_UP - 1 :]), 3)}
    found |= {"start_seconds": round(seen[0] - began, 1), "losses": [row["loss"] for row in rows]}
    found |= {"cpu_memory_gb": round((available - lowest) / 1e9, 1)}
    if "mfu" in rows[-1]:
        gpu = gpu_model(torch.device("cuda"))
        planned = plan.plan(r, options.world or options.gpus, gpu)
        found |= {"mfu": statistics.median(row["mfu"] for row in timed),
                  "peak_gb": rows[-1]["peak_memory_gb"], "planned_gb": round(planned.total_gb, 1),
                  "planned_seconds": planned.step_seconds}  # fmt: skip
    return found


# --- saves ----------------------------------------------------------------------------------------

# Steps before a save, and steps that are waited for while the second one is written.
QUIET, WRITING = 3, 6
SAVED = re.compile(
    r"saved step (\d+) to .*training stood still for ([\d.]+) s, writing took ([\d.]+)"
)


def new_rows(
    process: subprocess.Popen[bytes], run: paths.Run, known: int = 0
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yield each new row of a run's steps, and when it was seen, while the run lasts."""
    while process.poll() is None:
        for row in read_rows(run.metrics)[known:]:
            known += 1
            yield time.monotonic(), row
        time.sleep(0.02)


def bench_saves(options: argparse.Namespace, r: Recipe, words: list[str]) -> dict[str, Any]:
    """One run that saves twice on request and is killed during the second; then it resumes."""
    run = paths.Run(r.run_dir)
    pairs = [word for pair in words for word in ("--set", pair)]
    command = [sys.executable, "-m", "cosmos_cli", "train", SHIPPED[options.model][0], *pairs]
    rows: list[tuple[float, dict[str, Any]]] = []
    # The number of rows when a save was asked for, and when the first one was complete.
    asked: list[int] = []
    complete = 0
    with started(command, options.gpus) as process:
        for now, row in new_rows(process, run):
            rows.append((now, row))
            if not complete and run.resumable_steps():
                complete = len(rows)
            due = (WARM_UP, complete)[len(asked)] if len(asked) < 2 else 0
            if len(asked) == 2 and len(rows) >= asked[1] + 1 + WRITING:
                break
            if due and len(rows) >= due + QUIET:
                asked.append(len(rows))
                run.save_request.touch()
    if len(asked) < 2:
        raise SystemExit(f"ended with {process.returncode} after {len(asked)} requests")
    step = run.last_step
    ((_, still, writing), *_) = SAVED.findall(run.log.read_text())
    found = {
        "part": "saves",
        **around_saves(rows, asked, complete),
        "stood_still": float(still),
        "writing": float(writing),
        "staged_gb": round(bytes_of(run, step) / 1e9, 2),
        "planned_staged_gb": round(plan.plan(r, options.gpus, None).staged_gb, 2),
    }
    print(json.dumps(found), flush=True)
    # The run drops the rows after its save only when it has resumed.
    known = [line for line in run.metrics.open() if json.loads(line)["step"] <= step]
    run.metrics.write_text("".join(known))
    began, restored = time.monotonic(), f"resumed at step {step} "
    with started(command, options.gpus) as process:
        while process.poll() is None and restored not in run.log.read_text():
            time.sleep(0.02)
        found["restored_seconds"] = round(time.monotonic() - began, 1)
        for now, row in new_rows(process, run, len(known)):
            found |= {"resume_seconds": round(now - began, 1), "first_step": row["seconds"]}
            break
    # Its lines have times.
    print(run.log.read_text(), flush=True)
    shutil.rmtree(run.root)
    return found


def around_saves(
    rows: list[tuple[float, dict[str, Any]]], asked: list[int], complete: int
) -> dict[str, Any]:
    """Return what two saves did to the steps around them.

    A save is made after the step that follows the request, so the time from the row of that step to
    the next one is longer.
    """
    gaps = [after[0] - before[0] for before, after in pairwise(rows)]
    seconds = [row["seconds"] for _, row in rows]
    first, second = asked
    quiet = [*range(first - QUIET, first), *range(second - QUIET + 1, second)]
    usual = statistics.median(seconds[i] for i in quiet)
    usual_gap = statistics.median(gaps[i] for i in quiet)
    meanwhile = {"first": seconds[first + 1 : complete], "second": seconds[second + 1 :]}
    found = {
        "seconds": round(usual, 3),
        "first_gap": round(gaps[first] - usual_gap, 2),
        "second_gap": round(gaps[second] - usual_gap, 2),
    }
    return found | {
        f"steps_during_{save}": " ".join(f"{one / usual:.2f}" for one in steps)
        for save, steps in meanwhile.items()
    }


def bytes_of(run: paths.Run, step: int) -> int:
    """Return the bytes of a save on disk."""
    state = run.resume_state(step).rglob("*")
    return sum(map(files.size_of, [*run.weight_files()[step], *(p for p in state if p.is_file())]))


def own_ranks(options: argparse.Namespace) -> list[str]:
    """Return the command that starts this script's ranks under cosmos' launcher."""
    launcher = ["-m", "cosmos_cli.ranks", "--nproc-per-node", str(options.gpus)]
    return [sys.executable, *launcher, __file__, *sys.argv[1:], "--rank"]


def our_rank(options: argparse.Namespace, r: Recipe) -> None:
    """One rank of ours, in a world, with a network or on a GPU that the command does not offer."""
    from cosmos_cli.train import process

    if options.memory:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory * 2**30 / total)
    if options.world:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        os.environ |= {name: str(options.world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        torch.distributed.init_process_group(
            "fake", rank=0, world_size=options.world, store=FakeStore()
        )
    process.run_rank(r)


@contextmanager
def started(command: list[str], count: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts, gone when this ends."""
    environment = {**ranks.environment(count), "PYTHONSAFEPATH": ""}
    process = subprocess.Popen(command, env=environment)
    try:
        yield process
    finally:
        # All at once: a rank whose launcher is gone would save first.
        family = [psutil.Process(process.pid)] if process.poll() is None else []
        for member in [*family, *(child for one in family for child in one.children(True))]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl that are of steps."""
    if not path.exists():
        return []
    lines = path.read_text().rpartition("\n")[0].splitlines()
    return [row for row in map(json.loads, lines) if "seconds" in row]


# --- the peer -------------------------------------------------------------------------------------


def bench_peer(options: argparse.Namespace, r: Recipe) -> dict[str, Any]:
    """Diffusers' network on as many ranks."""
    with started(own_ranks(options), options.gpus) as process:
        if process.wait():
            raise SystemExit(f"the peer ended with {process.returncode}")
    found: dict[str, Any] = json.loads((options.scratch / "peer.json").read_text())
    if gpu := gpu_model(torch.device(best_device())):
        rate = plan.model_tflop(r) / found["seconds"] / options.gpus
        found["mfu"] = round(rate / gpu.tflops, 4)
    return {"part": "diffusers, ZeRO-3, every block checkpointed", **found}


def peer_rank(options: argparse.Namespace, r: Recipe) -> None:
    """One rank of it."""
    import deepspeed
    from bench_generate import diffusers_network

    from cosmos_cli.model import kernels
    from cosmos_cli.prep import latent_files
    from cosmos_cli.train import process

    device = process.join_world(600)
    # It has the attention that ours has, also where Transformer Engine was imported.
    kernels.put_cudnn_first()
    rank = torch.distributed.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "contiguous_gradients": True},
        "zero_force_ds_cpu_optimizer": False,
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = diffusers_network(r.spec.dit)
    net.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
    engine, *_ = deepspeed.initialize(model=net, config=config, optimizer=optimizer)
    size = r.latent_shape
    times = []
    for step in range(PEER_STEPS):
        clip = latent_files.read_latent(
            options.scratch / "dataset" / f"{(step + rank) % CLIPS}.safetensors"
        )
        x = clip[None].to(device, torch.bfloat16)
        began = time.monotonic()
        loss = peer_loss(engine, x, torch.randn(1, *size, device=device).to(x.dtype), r.spec)
        engine.backward(loss)
        engine.step()
        loss.item()
        times.append(time.monotonic() - began)
        if rank == 0:
            print(f"diffusers, step {step}: {times[-1]:.2f} s, loss {loss.item():.4f}", flush=True)
    if rank == 0:
        peak = 0 if device.type == "cpu" else torch.cuda.max_memory_allocated() / 1e9
        figures = {"seconds": statistics.median(times[2:]), "peak_gb": round(peak, 1)}
        files.write_json(options.scratch / "peer.json", figures)


def peer_loss(engine: Any, x: Tensor, noise: Tensor, spec: ModelSpec) -> Tensor:
    """The error of one noised clip."""
    text = torch.zeros(1, spec.text.tokens, spec.text.channels, device=x.device, dtype=x.dtype)
    predicted = engine(
        hidden_states=(x + noise) / 2**0.5,
        timestep=torch.zeros(1, device=x.device, dtype=x.dtype),
        encoder_hidden_states=text,
        fps=int(spec.fps),
        padding_mask=x.new_zeros(1, 1, *(8 * side for side in x.shape[-2:])),
        return_dict=False,
    )[0]
    return (predicted.float() - noise).square().mean()


def main() -> None:
    """One measurement."""
    parser = common.parser(__doc__, "file of JSON lines", "folder with 20 GB of space")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--name", default="bench", help="of the run and its row")
    parser.add_argument("--save", action="store_true", help="let the run save at its end")
    parser.add_argument("--saves", action="store_true", help="measure two saves and a resume")
    parser.add_argument("--after", type=int, default=0, help="the saved step to continue from")
    parser.add_argument("--world", type=int, default=0, help="ranks, of which one is there")
    parser.add_argument("--blocks", type=int, default=0, help="of the network; default: all")
    parser.add_argument("--memory", type=float, default=0, help="GiB of the GPU that may be used")
    parser.add_argument("--peer", action="store_true", help="train diffusers' network")
    parser.add_argument("--runs", type=Path, help="folder of the run; by default in SCRATCH")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    options.scratch = options.scratch.absolute()
    options.runs = (options.runs or options.scratch / "runs").absolute()
    os.environ.pop("OUTPUT_ROOT", None)
    words = settings(options)
    if options.saves:
        words += ["max_steps=100000", "save_every_steps=100000", "keep_last=1"]
    shorten(options.model, options.blocks)
    r = loading.load(SHIPPED[options.model][0], words).recipe
    if options.rank:
        (peer_rank if options.peer else our_rank)(options, r)
        return
    make_dataset(options.scratch / "dataset", r)
    if not options.peer:
        # In a process of its own, which gives the GPU back.
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            pool.submit(make_base, options, r).result()
    if not options.after:
        # An earlier measurement would be resumed, or refused.
        shutil.rmtree(r.run_dir, ignore_errors=True)
    if options.saves:
        found = bench_saves(options, r, words)
    else:
        found = bench_peer(options, r) if options.peer else bench_ours(options, r, words)
    about = {
        "name": options.name, "model": r.model, "gpus": options.gpus, "world": options.world,
        "blocks": r.spec.dit.blocks, "set": options.set,
        "tokens": r.tokens, "torch": torch.__version__,
        "device": common.device_name(best_device()),
    }  # fmt: skip
    common.append(options.out, about | found)
    print(json.dumps(about | found))


if __name__ == "__main__":
    main()
