"""The command, or a function, in a process that is forked with its libraries imported.

A start of `cosmos` takes seconds of imports, and most tests are about what comes after them.
"""

import gc
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import torch

IMPORTED = (
    "cosmos_cli.app", "cosmos_cli.evaluate.evaluation", "cosmos_cli.generate.phases",
    "cosmos_cli.model.tiny.scorer", "cosmos_cli.prep.prepare", "cosmos_cli.promote",
    "cosmos_cli.train.process", "deepspeed.runtime.zero.muon.muon_optimizer", "torchcodec.decoders",
    "transformers.models.t5.modeling_t5",
)  # fmt: skip
# Libraries read these when they are imported. The hub's is imported again if its own differ.
VARIABLES = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
OF_THE_HUB = ("HF_HUB_OFFLINE", "HF_HOME", "HF_ENDPOINT")
SECONDS_AFTER_A_FAILURE = 5
# A process that has asked CUDA for its devices cannot be forked.
POSSIBLE = not torch.cuda.is_available()

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(IMPORTED))


def _ensure_server():
    # The server ignores what it cannot import.
    assert all(importlib.util.find_spec(name) for name in IMPORTED if name.startswith("cosmos"))
    before = dict(os.environ)
    os.environ.update(VARIABLES)
    for name in OF_THE_HUB[1:]:
        os.environ.pop(name, None)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _begin():
    # Otherwise each collection would go through all objects of the imported libraries.
    gc.freeze()


def pool(processes):
    """Runs so many functions at a time, each in a process of its own."""
    options = {"max_tasks_per_child": 1}
    if not POSSIBLE:
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(processes, mp_context=spawn, **options)
    _ensure_server()
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, **options)


def _run(arguments, cwd, environment, streams):
    _begin()
    for number, path in enumerate(streams):
        stream = os.open(path, os.O_RDWR)
        os.dup2(stream, number)
        os.close(stream)
    # multiprocessing has opened another.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if any(environment.get(name) != VARIABLES.get(name) for name in OF_THE_HUB):
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
    sys.argv = ["cosmos", *arguments]
    from cosmos_cli.__main__ import main

    main()


def run(cwd, commands, seconds, stdin=""):
    """Run [(arguments, environment)] side by side to their ends, one process each.

    Each reads the same standard input. Those that wait for one that failed are killed, as a
    launcher does.
    """
    _ensure_server()
    with tempfile.TemporaryDirectory() as folder:
        processes, streams = [], []
        for number, (arguments, environment) in enumerate(commands):
            streams.append([Path(folder) / f"{number}.{name}" for name in ("in", "out", "err")])
            for stream in streams[-1]:
                stream.touch()
            streams[-1][0].write_text(stdin)
            words = [str(word) for word in arguments]
            processes.append(
                context.Process(target=_run, args=(words, cwd, environment, streams[-1]))
            )
            processes[-1].start()
        try:
            _wait(processes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())
            for (words, _), process, (_, out, err) in zip(commands, processes, streams, strict=True)
        ]


def _wait(processes, deadline):
    while alive := [process for process in processes if process.exitcode is None]:
        multiprocessing.connection.wait([process.sentinel for process in alive], timeout=1)
        failed = any(process.exitcode for process in processes)
        if failed:
            deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        if time.monotonic() > deadline:
            assert failed, "the command did not end in time"
            return
