"""torchrun for the ranks of one run; names the rank that failed first. A process of its own."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

from cosmos_cli import ranks
from cosmos_cli.errors import ExitCode

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has Linux send SIGTERM to this process when its parent dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def main(arguments: list[str]) -> int:
    """Runs torchrun with `arguments` and posts which rank failed first, and how."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Ranks inherit this until they install their own handler; without, asking for a save would
    # kill those that are still starting.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        # torchrun would handle it in spite of nohup, and end the ranks.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGQUIT"
    # What torchrun says of a failure in a screenful, the post below says in a line.
    logging.disable(logging.ERROR)
    try:
        run.main(["--standalone", *arguments])
    except SignalException:
        return int(ExitCode.SIGTERM)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        ranks.post({"first": rank, "process_code": failure.exitcode})
        return int(ExitCode.TRAINING)
    return 0


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1:]))
