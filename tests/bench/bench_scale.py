"""Measures one node of GPUs against the plan: `python tests/bench/bench_scale.py --gpus 8 ...`.

link      GB/s a GPU at which NCCL gathers a block's weights, and at which it exchanges the tokens
          and heads of a clip that all GPUs share.
train     `recipes/nemo_assets.yaml` on 1, 2, 4, ... GPUs, a clip each; the same on one GPU as
          rank 0 of a fake process group; the difference is communication that nothing hid.
resume    a save at the last of these sizes, its stall, and the same command going on from it.
sequence  the same GPUs sharing one clip.
node      saves in the background and a resume of GPUs that share a clip, fp8 linears, bf16. Each
          row is printed as it comes; those for which --limit leaves no time are skipped. Give
          --runs a folder in /dev/shm, with 300 GB.
generate  a video by one GPU and by all of them.
predict   what the plan says of machines that are not here; needs no GPU.

Every row says on what it was measured or that it was predicted. FILE gets a JSON object a row.
With `--model tiny` the same runs on a CPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from common import SHIPPED, Row

from cosmos_cli import gpus
from cosmos_cli.recipe import gpu_models, loading, plan
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.spec import DiTSpec

HERE = Path(__file__).parent
MACHINES = (
    "8xH100-80GB", "8xH200", "32xH100-80GB", "64xH100-80GB", "200xH100-80GB", "800xH100-80GB"
)  # fmt: skip
# Measured: the denoising of a video of 121 x 704 x 1280 by one H100; between two the GB/s of an
# exchange, and the share of a video's time that they also lost when they shared the tokens.
ONE_GPU_SECONDS, EXCHANGE_RATE, SHARING_LOSS = 252.3, 259, 0.01
# The share by which one GPU of a kind was slower than another, of which a step waits for the
# slowest; and by which the plan was wrong where it could be compared.
SPREAD, PLAN_ERROR = 0.03, 0.05


# --- on this machine ------------------------------------------------------------------------------


def bench(
    options: argparse.Namespace, script: str, *words: str, seconds: float | None = None
) -> list[Row]:
    """The rows that another benchmark of this folder adds to its file, ended after `seconds`."""
    out = options.scratch / f"{script}.jsonl"
    out.unlink(missing_ok=True)
    common = ["--model", options.model, "--scratch", str(options.scratch), "--out", str(out)]
    command = [sys.executable, str(HERE / f"{script}.py"), *common, *words]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        if process.wait(seconds):
            return [{"failed": " ".join(words)}]
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return [{"failed": f"took more than {seconds:.0f} s"}]
    return [json.loads(line) for line in out.read_text().splitlines()]


def train(
    options: argparse.Namespace,
    *words: str,
    name: str,
    steps: int = 0,
    seconds: float | None = None,
) -> Row:
    """A row of bench_train."""
    runs = ["--runs", str(options.runs)] if options.runs else []
    pairs = [word for pair in options.set for word in ("--set", pair)]
    count = ["--steps", str(steps or options.steps), "--name", re.sub(r"\W+", "_", name)]
    (row,) = bench(options, "bench_train", *count, *runs, *pairs, *words, seconds=seconds)
    left_out = ("part", "name", "model", "gpus", "world", "blocks", "set", "tokens", "losses")
    return {"row": name, **{key: value for key, value in row.items() if key not in left_out}}


def torchrun(ranks: int) -> list[str]:
    """Return the command that starts a script as `ranks` ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [sys.executable, *launcher]


def sizes(gpus: int) -> list[int]:
    """1, 2, 4, ... up to all."""
    powers = (2**i for i in range(gpus.bit_length()))
    return sorted({*powers, gpus})


def bench_train(options: argparse.Namespace) -> Iterator[Row]:
    """Measure a step and the communication that nothing hides."""
    for n in sizes(options.gpus):
        alone = train(options, "--world", str(n), name=f"one of {n}", steps=8)
        yield alone
        if n > 1:
            found = train(options, "--gpus", str(n), name=f"{n} GPUs")
            if "seconds" in found and "seconds" in alone:
                found["exposed_seconds"] = round(found["seconds"] - alone["seconds"], 3)
            yield found


def bench_resume(options: argparse.Namespace) -> Iterator[Row]:
    """A run that saves, and its continuation under the same name."""
    half, gpus = max(options.steps // 2, 5), str(options.gpus)
    words = ("--gpus", gpus, "--save")
    yield train(options, *words, name="saved", steps=half)
    yield train(options, *words, "--after", str(half), name="saved", steps=half)


def bench_sequence(options: argparse.Namespace) -> Iterator[Row]:
    """One clip a step."""
    n = str(options.gpus)
    shared = ("--set", f"sequence_parallel={n}", "--set", "global_batch_size=1")
    yield train(options, "--world", n, *shared, name=f"one of {n} that share a clip", steps=8)
    yield train(options, "--gpus", n, *shared, name=f"{n} GPUs share a clip")


def bench_node(options: argparse.Namespace) -> Iterator[Row]:
    """Measure a machine's usual work, the most important first."""
    began, n = time.monotonic(), options.gpus
    shared = {"sequence_parallel": n, "global_batch_size": 1, "zero_stage": 3}
    fp8 = {"transformer_engine": "linears", "zero_stage": 3}
    # The name, the seconds that it is expected to take, the keys and the options of each.
    works: list[tuple[str, int, dict[str, Any], list[str]]] = [
        ("saves, shared clip", 320, shared, ["--saves"]),
        ("fp8 linears", 100, fp8, []),
        ("bf16", 100, {"zero_stage": 3}, []),
    ]
    if options.model == "tiny":
        works = [work for work in works if work[0] != "fp8 linears"]
    for name, seconds, keys, extra in works:
        left = options.limit - (time.monotonic() - began)
        if seconds > left:
            yield {"row": name, "failed": f"skipped, --limit {options.limit:g}"}
            continue
        mode = checkpointing(options, keys)
        changes = {**keys, "activation_checkpointing": mode}.items()
        pairs = [word for key, value in changes for word in ("--set", f"{key}={value}")]
        begun = time.monotonic()
        words = ["--gpus", str(n), *extra, *pairs]
        row = train(options, *words, name=name, steps=options.node_steps, seconds=left)
        row |= {"checkpointing": mode, "took": round(time.monotonic() - begun)}
        print(json.dumps(row), flush=True)
        yield row


def checkpointing(options: argparse.Namespace, keys: dict[str, Any]) -> str:
    """Return the fastest activation checkpointing with which a run fits this machine's GPUs."""
    name, settings = SHIPPED[options.model]
    pairs = [*settings, "micro_batch_size=1", *(f"{key}={value}" for key, value in keys.items())]
    shares = {"num_processes": options.gpus}
    if "global_batch_size" not in keys:
        shares["global_batch_size"] = options.gpus
    pairs += [f"{key}={value}" for key, value in shares.items()]
    gpu = next(filter(None, map(gpu_models.find_gpu, gpus.gpu_names())), None)
    for mode in ("most", "attention"):
        r = loading.load(name, [*pairs, f"activation_checkpointing={mode}"]).recipe
        found = plan.plan(r, options.gpus, gpu)
        if gpu is None or found.total_gb <= gpu.memory_gb * plan.COMFORTABLE:
            return mode
    return "all"


def bench_generate(options: argparse.Namespace) -> Iterator[Row]:
    """Some steps of a video, by one and by all."""
    out = options.scratch / "split.json"
    words = ["--model", options.model, "--parts", "split", "--steps", "4", "--out", str(out)]
    script = [str(HERE / "bench_generate.py"), *words, "--scratch", str(options.scratch)]
    failed = subprocess.run([*torchrun(options.gpus), *script], stdout=sys.stderr, check=False)
    if failed.returncode:
        yield {"row": "generate", "failed": f"code {failed.returncode}"}
        return
    found = json.loads(out.read_text())
    for row in found["split"]["rows"]:
        yield {"row": row.pop("name"), "device": found["about"]["device"], **row}


def bench_link(options: argparse.Namespace) -> Iterator[Row]:
    """Rates between all GPUs, by ranks of this script."""
    command = [*torchrun(options.gpus), __file__, *sys.argv[1:], "--rank"]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        yield {"row": "link", "failed": f"code {found.returncode}"}
    for line in found.stdout.splitlines():
        if line.startswith("{"):
            yield json.loads(line)


def link_rank(options: argparse.Namespace, r: Recipe) -> None:
    """One of the ranks that measure the link."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
        dist.init_process_group("nccl")
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    world, dit = dist.get_world_size(), r.spec.dit
    part = -(-dit.parameters // dit.blocks // world)
    own, all_ = (torch.ones(part * n, dtype=torch.bfloat16, device=device) for n in (1, world))
    tokens = -(-activation_bytes(r, dit) // 2 // world**2) * world
    sent, got = (torch.ones(tokens, dtype=torch.bfloat16, device=device) for _ in range(2))
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "gather a block": (lambda: dist.all_gather_into_tensor(all_, own), 2 * part * (world - 1)),
        "exchange tokens and heads": (
            lambda: dist.all_to_all_single(got, sent),
            2 * tokens * (world - 1) // world,
        ),
    }
    for name, (work, moved) in works.items():
        for count in (3, 10):
            dist.barrier()
            began = time.perf_counter()
            for _ in range(count):
                work()
            if device.type != "cpu":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - began) / count
        if dist.get_rank() == 0:
            rate = round(moved / seconds / 1e9, 2)
            kind = "CPU, gloo" if device.type == "cpu" else torch.cuda.get_device_name()
            about = {"row": name, "device": f"{world} x {kind}"}
            print(json.dumps({**about, "ms": round(1e3 * seconds, 3), "gb_per_second": rate}))
    dist.destroy_process_group()


# --- machines that are not here -------------------------------------------------------------------


def activation_bytes(r: Recipe, dit: DiTSpec) -> int:
    """Return the bytes of one activation of a clip's tokens in bf16."""
    return 2 * r.tokens * dit.width


def bench_predict(options: argparse.Namespace) -> Iterator[Row]:
    """Steps and videos by the plan, each with its least and most.

    A step's least is what the plan is known to be wrong by, its most also waits for the slowest GPU
    and hides none of the traffic.
    """
    name, settings = SHIPPED[options.model]
    for machine in MACHINES if options.model == "7b" else ():
        ranks, gpu = gpu_models.parse_gpus(machine)
        size = [f"num_processes={ranks}", f"global_batch_size={ranks}"]
        r = loading.load(name, [*settings, *size, *options.set]).recipe
        found = plan.plan(r, ranks, gpu)
        seconds = found.step_seconds
        traffic = plan.traffic_seconds(r, ranks, gpu)
        most = seconds * (1 + PLAN_ERROR + SPREAD) + traffic
        share = plan.model_tflop(r) / (seconds * ranks * gpu.tflops)
        yield {
            "row": f"train, {machine}", "device": "predicted", "seconds": round(seconds, 1),
            "least": round(seconds * (1 - PLAN_ERROR), 1), "most": round(most, 1),
            "mfu": round(share, 3), "peak_gb": round(found.total_gb, 1),
            "traffic_seconds": round(traffic, 2),
        }  # fmt: skip
    if options.model == "7b":
        r = loading.load(name, settings).recipe
        for count in (2, 4, 8):
            seconds, exchanged = video_seconds(r, count)
            yield {
                "row": f"a video, {count}xH100-80GB", "device": "predicted",
                "seconds": round(seconds, 1), "least": round(seconds - exchanged, 1),
                "most": round(seconds * (1 + SPREAD) + exchanged, 1),
            }  # fmt: skip


def video_seconds(r: Recipe, gpus: int) -> tuple[float, float]:
    """The denoising of a video by so many H100, and what of it are exchanges.

    Halves of guidance first, the first self-attention in both; the GPUs of a half share the tokens,
    and queries, keys, values and the result of every self-attention change places.
    """
    linear, attention = plan.forward_flops(r)
    blocks, shared = r.spec.dit.blocks, gpus // 2
    again = (attention + linear * 8 / 28) / blocks / (linear + attention) / 2
    arithmetic = ONE_GPU_SECONDS * (1 + again) / gpus * (1 + (SHARING_LOSS if shared > 1 else 0))
    sent = 4 * activation_bytes(r, r.spec.dit) / shared * (shared - 1) / shared
    exchanged = r.num_steps * blocks * sent / (EXCHANGE_RATE * 1e9)
    return arithmetic + exchanged, exchanged


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "link": bench_link, "train": bench_train, "resume": bench_resume,
    "sequence": bench_sequence, "node": bench_node, "generate": bench_generate,
    "predict": bench_predict,
}  # fmt: skip


def main() -> None:
    """Runs the chosen parts; a table of their rows."""
    parser = common.parser(__doc__, "file of JSON lines", "folder with 20 GB of space")
    common.add_parts(parser, PARTS, ",".join(part for part in PARTS if part != "node"))
    parser.add_argument("--gpus", type=int, default=len(gpus.gpu_names()) or 2)
    parser.add_argument("--steps", type=int, default=30, help="of a training")
    parser.add_argument("--node-steps", type=int, default=5, help="of each training of node")
    parser.add_argument("--limit", type=float, default=540, help="seconds of node")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--runs", type=Path, help="folder with 300 GB; by default in SCRATCH")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        link_rank(options, loading.load(*SHIPPED[options.model]).recipe)
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Row]] = {part: [] for part in options.parts}
    for part in options.parts:
        for row in PARTS[part](options):
            rows[part].append(row)
            common.append(options.out, {"part": part, **row})
    for part, found in rows.items():
        print(f"\n{part}\n\n{common.markdown(found)}")


if __name__ == "__main__":
    main()
