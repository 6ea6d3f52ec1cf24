"""Requests to a running training: signals, and files that a user creates in the run's folder."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from cosmos_cli import files, signals
from cosmos_cli.errors import ExitCode
from cosmos_cli.paths import Run

_stop_code = 0
_save_asked = False


def listen() -> None:
    """Handle the signals that end a run, and SIGUSR1, which saves the next step."""
    for number in signals.ending():
        signal.signal(number, _request_stop)
    signal.signal(signal.SIGUSR1, _request_save)


def since_last_step(run: Run) -> tuple[int, bool, bool]:
    """Return the requests since the last step: the exit code to stop with or 0, save, sample."""
    global _save_asked
    save, _save_asked = _save_asked or _stop_code > 0, False
    return _stop_code, save or _consume(run.save_request), _consume(run.sample_request)


def stop_code(device: torch.device) -> int:
    """Return the exit code to stop with, or 0 if no rank received a stop signal.

    Every rank must call this.
    """
    asked = torch.tensor(_stop_code, device=device)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return int(asked)


def _consume(request: Path) -> bool:
    """True if a user created this request file. Rank 0 deletes it; other ranks return False."""
    if dist.get_rank() or not request.exists():
        return False
    with files.disk_errors(request):
        request.unlink(missing_ok=True)
    return True


def _request_save(_number: int, _frame: FrameType | None) -> None:
    global _save_asked  # noqa: PLW0603
    _save_asked = True


def _request_stop(number: int, _frame: FrameType | None) -> None:
    global _stop_code  # noqa: PLW0603
    _stop_code = int(ExitCode.SIGINT if number == signal.SIGINT else ExitCode.SIGTERM)
