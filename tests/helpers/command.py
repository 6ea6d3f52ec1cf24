"""The command in a process of its own, and the options of a small run."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.helpers import forks

# Small clips keep a whole run of the six verbs to seconds; all weights are trained unless asked.
SMALL = ("num_frames=9", "height=64", "width=96", "lora_rank=0")


# Nothing is compiled on a CPU unless a test asks for it, but torch's compiler takes each process of
# a training a second to import.
UNCOMPILED = {} if torch.cuda.is_available() else {"TORCHDYNAMO_DISABLE": "1"}


def _report(done):
    return "\n".join(f"{p.args} ended with {p.returncode}\n{p.stdout}{p.stderr}" for p in done)


@dataclass
class Cosmos:
    """The real command in a real process, in a folder of its own.

    `cache` is its XDG_CACHE_HOME; the default can neither be read nor written. `fresh` starts a new
    interpreter each time, for what is read when a library is imported.
    """

    cwd: Path
    cache: str | Path = os.devnull
    fresh: bool = False

    def environment(self):
        clean = {k: v for k, v in os.environ.items() if k not in ("OUTPUT_ROOT", "HF_TOKEN")}
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.cache)}
        return {**UNCOMPILED, **clean, **own}

    def start(self, *arguments, **options):
        """Starts the command; its pipes are read by communicate()."""
        return subprocess.Popen(
            [sys.executable, "-m", "cosmos_cli", *map(str, arguments)],
            cwd=self.cwd,
            stderr=subprocess.PIPE,
            text=True,
            **{
                "env": self.environment(),
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                **options,
            },
        )

    def __call__(self, *arguments, code=0, seconds=300, stdin=""):
        """Runs the command to its end; fails when it ends with another code, if one is given."""
        (done,) = self._run([(arguments, self.environment())], seconds, stdin)
        assert code in (done.returncode, None), _report([done])
        return done

    def together(self, environments, *arguments, seconds=300):
        """Runs the command to its end once for each set of variables, side by side."""
        own = [{name: str(value) for name, value in each.items()} for each in environments]
        return self._run([(arguments, self.environment() | each) for each in own], seconds)

    def ranks(self, count, *arguments, code=0, seconds=300):
        """Runs the command as the ranks of a launcher; those that end with the code, or all."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        same = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        same |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        each = [{"RANK": rank, "LOCAL_RANK": rank, **same} for rank in range(count)]
        done = self.together(each, *arguments, seconds=seconds)
        ended = [rank for rank in done if code in (rank.returncode, None)]
        # The others fail because the first did.
        assert ended if code != 0 else len(ended) == count, _report(done)
        return ended

    def _run(self, commands, seconds, stdin=""):
        if not self.fresh and forks.POSSIBLE:
            return forks.run(self.cwd, commands, seconds, stdin)
        processes = [
            self.start(*words, env=environment, stdin=subprocess.PIPE)
            for words, environment in commands
        ]
        streams = [process.communicate(stdin, timeout=seconds) for process in processes]
        return [
            subprocess.CompletedProcess(process.args, process.returncode, *two)
            for process, two in zip(processes, streams, strict=True)
        ]

    def json(self, *arguments, code=0):
        """Runs the command with --json; stdout must be that one object."""
        done = self(*arguments, "--json", code=code)
        value = json.loads(done.stdout)
        assert value["exit_code"] == code
        return value


def settings(*pairs):
    """--set options for a small run, and more."""
    return [word for pair in (*SMALL, *pairs) for word in ("--set", pair)]


QUICK = settings("num_steps=3", "guidance=2")


def generate(cosmos, *arguments, code=0):
    done = cosmos.json("generate", *arguments, *QUICK, code=code)
    done["artifacts"] = [cosmos.cwd / path for path in done["artifacts"]]
    return done
