"""Start N ranks, collect their errors, and name the rank that failed first. No torch at import.

Run as a module, this file is torchrun for the ranks of one run. Errors are sent over a datagram
socket in Linux's abstract namespace. It needs no file, so it works on a full disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import socket
import sys
from typing import Any

from cosmos_cli import console
from cosmos_cli.errors import ExitCode, UserError, environment_error
from cosmos_cli.gpus import gpu_names

ADDRESS = "COSMOS_RANK_ERRORS"
MAX_CHARACTERS = 20_000
# torchrun sends SIGTERM to the other ranks when one has failed, and SIGKILL this much later.
KILL_SECONDS = 30
# What is known of a rank that ended by SIGKILL.
KILLED = "was killed, by someone or because CPU memory ran out (see dmesg)"


class RankErrors:
    """Receive messages from the ranks, which read the socket's address from COSMOS_RANK_ERRORS."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = f"cosmos-{os.getpid()}-{os.urandom(4).hex()}"
        self.socket.bind(f"\0{self.address}")
        self.socket.setblocking(False)

    def read(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived since the last call, oldest first."""
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                messages.append(json.loads(self.socket.recv(2**20)))
        return messages

    def __enter__(self) -> RankErrors:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


def post(message: dict[str, Any]) -> None:
    """Send a message to the process that started this one, or print it if there is none."""
    text = json.dumps(message)
    address = os.environ.get(ADDRESS)
    try:
        if address is None:
            raise ConnectionRefusedError
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(text.encode(), f"\0{address}")
    except OSError:
        print(text, file=sys.stderr)


_PR_SET_PDEATHSIG = 1
# The process ID of the launcher, for its ranks.
_LAUNCHER = "COSMOS_LAUNCHER"


def die_with_parent() -> None:
    """Make Linux send SIGTERM to this process when its parent dies, for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    launcher = os.environ.pop(_LAUNCHER, None)
    if launcher and int(launcher) != os.getppid():
        # It died while this process imported its packages.
        signal.raise_signal(signal.SIGTERM)


def main(arguments: list[str]) -> int:
    """Run torchrun with `arguments` and post the first failed rank and its exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Ranks inherit this until they install their own handler. Without it, a save request would
    # kill the ranks that are still starting.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # Despite nohup, torchrun would handle SIGHUP and end the ranks.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
    os.environ[_LAUNCHER] = str(os.getpid())
    # torchrun reports a failure in a screenful of text, the message below in one line.
    logging.disable(logging.ERROR)
    try:
        run.main(["--standalone", *arguments])
    except SignalException:
        return int(ExitCode.SIGTERM)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        for other, ended in error.failures.items():
            # A rank that lost its connection to a killed one may have ended by then, too. Later,
            # torchrun itself kills the ranks that are still running.
            early = ended.timestamp - failure.timestamp < KILL_SECONDS
            if ended.exitcode == -signal.SIGKILL and early:
                rank, failure = other, ended
                break
        post({"first": rank, "process_code": failure.exitcode})
        return int(ExitCode.TRAINING)
    return 0


def under_launcher() -> bool:
    """True if a launcher such as torchrun started this process as one of several ranks."""
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


# What a launcher sets for each rank, with the least value of each.
_LEAST = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
_ACCELERATORS = ("cpu", "cuda")


def check_environment() -> None:
    """Check the variables that a launcher sets for each rank, and DeepSpeed's accelerator.

    Raises:
        UserError: a value cannot be used. Every rank prints it, because it may concern only one.
    """
    for name in _LEAST if under_launcher() else ("LOCAL_RANK",):
        text = os.environ.get(name, "1")
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or int(text) < _LEAST[name]:
            what = f"must be a whole number, at least {_LEAST[name]}, found {text!r}"
            raise _wrong_variable(name, what)
    if under_launcher() and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        what = f"is {os.environ['RANK']}, but WORLD_SIZE is {os.environ['WORLD_SIZE']}"
        raise _wrong_variable("RANK", what)
    accelerator = os.environ.get("DS_ACCELERATOR", "cpu")
    if accelerator not in _ACCELERATORS:
        fix = "run `unset DS_ACCELERATOR`"
        what = f"must be {' or '.join(_ACCELERATORS)}, found {accelerator!r}"
        raise environment_error("DS_ACCELERATOR", what, fix)


def _wrong_variable(name: str, what: str) -> UserError:
    fix = f"start the command with torchrun, or run `unset {name}`"
    return environment_error(name, what, fix)


def mute_all_but_first() -> None:
    """Mute every rank except rank 0 when a launcher started this process.

    Raises:
        UserError: as of `check_environment`.
    """
    check_environment()
    if under_launcher() and os.environ["RANK"] != "0":
        console.mute()


def kill_group(group: int) -> None:
    """Send SIGKILL to every process of a process group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def environment(ranks: int) -> dict[str, str]:
    """Return the environment variables for `ranks` processes on this machine."""
    defaults = {
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // ranks, 1)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        # Otherwise a folder like datasets/ in the working directory is imported as a package.
        "PYTHONSAFEPATH": "1",
    }
    if not gpu_names():
        # If unset, DeepSpeed guesses the accelerator and prints the guess on stdout.
        defaults["DS_ACCELERATOR"] = "cpu"
    return {**defaults, **os.environ}


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
