"""Saves again and again while one system call of the save fails, as JSON lines on stdout.

    python tests/helpers/faulty_saves.py FOLDER [SAMPLE]

One process with a model of a block under ZeRO-3. First the calls of a save are counted in the main
thread and in the one that writes, then it is done anew for each of them (or SAMPLE of them), which
strace has fail.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from cosmos_cli import paths, spec
from cosmos_cli.errors import UserError
from cosmos_cli.model import edm, weights
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.ema import PowerEMA
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import checkpoint, data, engine, loop, process, saver

SMALL = spec.ModelSpec(
    name="small",
    dit=spec.DiTSpec(
        width=32, blocks=1, heads=2, text_channels=16, adaln_rank=4, max_t=8, max_hw=8
    ),
)
CALLS = ("openat", "write", "fsync", "rename", "mkdir", "ftruncate", "pwrite64")
ERRORS = ("EIO", "ENOSPC")


class Strace:
    """Watches a thread, and has its calls fail as it is told."""

    def __init__(self, log, thread, *options):
        command = ["strace", "-qq", "-o", str(log), "-p", str(thread), *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        # Opened once: from some moment on, opening it is traced.
        with Path(f"/proc/self/task/{thread}/status").open("rb", buffering=0) as status:
            while f"TracerPid:\t{self.process.pid}\n".encode() not in status.read(4096):
                if self.process.poll() is not None:
                    sys.exit(f"strace: {self.process.stderr.read()}")
                status.seek(0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


class Saver:
    """An engine that has trained a little, with two saves of it in a run's folder."""

    def __init__(self, folder):
        spec.MODELS["small"] = SMALL
        generator = torch.Generator().manual_seed(0)
        net = DiT(SMALL.dit)
        net.init_weights(generator)
        base = folder / "base.safetensors"
        weights.save_dit(base, edm.EDMLoss(net, SMALL).state_dict(), "safetensors")
        r = Recipe(dataset_dir="none", precision="fp32", zero_stage=3, global_batch_size=1)
        self.r = r = r.model_copy(update={"model": "small", "base": str(base)})
        self.engine = engine.build(r, data.Share(0, 1, 1), torch.device("cpu"))
        self.ema = PowerEMA(checkpoint.shards(self.engine.module), r.ema_rate)
        self.run = paths.Run(folder / "run")
        self.saver = saver.Saver(self.engine, self.ema, self.run, r, {})
        self.backup = folder / "backup"
        writer = self.saver.thread.submit(threading.get_native_id).result()
        self.threads = {"main": os.getpid(), "writer": writer}
        for step in (1, 2):
            self.learn(step)
            self.save(step)
        self.known = self.state()
        shutil.copytree(self.run.root, self.backup)

    def learn(self, step):
        generator = torch.Generator().manual_seed(step)
        x0, noise = (torch.randn(1, 16, 1, 8, 8, generator=generator) for _ in range(2))
        one, text = torch.ones(1), torch.zeros(1, 4, 16)
        batch = data.Batch(x0, one, noise, text, one, ("clip",))
        loop.optimize(self.r, self.engine, self.ema, self.saver, step, [batch])

    def save(self, step):
        self.saver.save(step)
        self.saver.finish()

    def state(self):
        optimizer = self.engine.optimizer.state_dict()
        masters = optimizer["fp32_flat_groups"]
        moments = [
            v for s in optimizer["optimizer_state_dict"]["state"].values() for v in s.values()
        ]
        parts = [*checkpoint.shards(self.engine.module), *masters, *moments, *self.ema.shards]
        return [part.detach().clone() for part in parts]

    def loads(self, step):
        """True if a resume state and its model files are what they should be."""
        for part in checkpoint.shards(self.engine.module):
            part.zero_()
        checkpoint.resume(self.engine, self.ema, self.run, step)
        for kind in ("reg", "ema"):
            weights.load_dit_state(self.run.model(step, kind))
        return all(map(torch.equal, self.state(), self.known))

    def try_with(self, log, thread, call, number, error):
        """Describe a save of step 3 in which one call failed, and what is left of step 2."""
        row = {"thread": thread, "call": call, "number": number, "error": error}
        fault = f"inject={call}:error={error}:when={number}"
        with Strace(log, self.threads[thread], "-e", f"trace={call}", "-e", fault):
            try:
                self.save(3)
            except UserError as refused:
                row |= {"code": int(refused.code), "line": str(refused)}
            except Exception as bug:  # noqa: BLE001 - whatever it is goes into the table
                row |= {"bug": repr(bug)}
        row["injected"] = "(INJECTED)" in log.read_text()
        row["at"] = next((x for x in log.read_text().splitlines() if "INJECTED" in x), "")
        row["left"] = sorted(path.name for path in self.run.checkpoints.rglob(".*"))
        saved = self.run.resumable_steps()
        row["saved"] = saved
        try:
            row["whole"] = 2 in saved and all(self.loads(step) for step in saved if step > 1)
        except UserError as damaged:
            row["whole"] = False
            row["damage"] = str(damaged)
        shutil.rmtree(self.run.root)
        shutil.copytree(self.backup, self.run.root)
        self.loads(2)
        return row


def main(folder, sample=None):
    process.join_world(60)
    faulty = Saver(folder)
    log = folder / "strace.log"
    cases, counts = [], {}
    for thread, number in faulty.threads.items():
        with Strace(log, number, "-e", "trace=" + ",".join(f"?{call}" for call in CALLS)):
            faulty.save(3)
        found = [line.split("(")[0].split()[-1] for line in log.read_text().splitlines()]
        counts[thread] = {call: found.count(call) for call in CALLS if call in found}
        cases += [
            (thread, call, i, error)
            for call, count in counts[thread].items()
            for i in range(1, count + 1)
            for error in ERRORS
        ]
        shutil.rmtree(faulty.run.root)
        shutil.copytree(faulty.backup, faulty.run.root)
        faulty.loads(2)
    print(json.dumps({"counts": counts}), flush=True)
    for case in random.Random(0).sample(cases, min(sample or len(cases), len(cases))):
        print(json.dumps(faulty.try_with(log, *case)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
