"""The command in a process of its own, and the options of a small run."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Small clips keep a whole run of the six verbs to seconds; all weights are trained unless asked.
SMALL = ("num_frames=9", "height=64", "width=96", "lora_rank=0")


@dataclass
class Cosmos:
    """The real command in a real process, in a folder of its own.

    `cache` is its XDG_CACHE_HOME; the default can neither be read nor written.
    """

    cwd: Path
    cache: str | Path = os.devnull

    def environment(self):
        clean = {k: v for k, v in os.environ.items() if k not in ("OUTPUT_ROOT", "HF_TOKEN")}
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.cache)}
        return {**clean, **own}

    def start(self, *arguments, **options):
        """Starts the command; its pipes are read by communicate()."""
        return subprocess.Popen(
            [sys.executable, "-m", "cosmos_cli", *map(str, arguments)],
            cwd=self.cwd,
            env=self.environment(),
            stderr=subprocess.PIPE,
            text=True,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options},
        )

    def __call__(self, *arguments, code=0, seconds=300):
        """Runs the command to its end; fails the test when it ends with another code."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == code, (
            f"{arguments} ended with {process.returncode}\n{out}{err}"
        )
        return subprocess.CompletedProcess(process.args, code, out, err)

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
