"""torchrun for the ranks of one run; names the rank that failed first. A process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

from cosmos_cli import layout
from cosmos_cli.errors import ExitCode

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has Linux send SIGTERM to this process when its parent dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def main(error_file: Path, arguments: list[str]) -> int:
    """Runs torchrun with `arguments`; what ended the run goes to `error_file`."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    nodes = int(os.environ.get("NNODES", "1"))
    several = [
        "--nnodes", str(nodes),
        "--node-rank", os.environ.get("NODE_RANK", "0"),
        "--master-addr", os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "--master-port", os.environ.get("MASTER_PORT", "29500"),
    ]  # fmt: skip
    try:
        run.main([*(several if nodes > 1 else ["--standalone"]), *arguments])
    except SignalException:
        return int(ExitCode.SIGTERM)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        reported = error_file.with_name(f"error.{rank}.json")
        if failure.exitcode >= 0 and reported.exists():
            verdict = layout.read_json(reported)
            if verdict["exit_code"] == ExitCode.BUG:
                print(verdict["error"], file=sys.stderr)
                verdict["error"] = _cause(failure.exitcode)
        else:
            verdict = {"exit_code": int(ExitCode.TRAINING), "error": _cause(failure.exitcode)}
        layout.write_json(error_file, {**verdict, "where": f"rank {rank}"})
        return int(verdict["exit_code"])
    return 0


def _cause(exit_code: int) -> str:
    if exit_code == -signal.SIGKILL:
        return "was killed; if nobody did it, host memory ran out (see dmesg); start it again"
    if exit_code < 0:
        return f"died of {signal.Signals(-exit_code).name}; start the same command again"
    return f"failed with exit code {exit_code}; its traceback stands above"


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
