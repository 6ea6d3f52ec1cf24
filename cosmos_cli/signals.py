"""Define the signals that shut a command down cleanly, and their exit codes. No torch."""

from __future__ import annotations

import signal

from cosmos_cli.errors import ExitCode


def ending() -> dict[signal.Signals, ExitCode]:
    """Return the signals that shut this process down cleanly, with the exit code of each.

    SIGHUP arrives when an SSH window closes, and counts as SIGTERM. If it was ignored on entry, as
    under nohup, it stays ignored.
    """
    codes = {signal.SIGINT: ExitCode.SIGINT, signal.SIGTERM: ExitCode.SIGTERM}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        codes[signal.SIGHUP] = ExitCode.SIGTERM
    return codes


class Requests:
    """Count how often this process was asked to end.

    When a window closes, the kernel and the shell both send SIGHUP, and systemd also sends SIGTERM.
    They must count as one request, because a second request aborts the save of the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self.hung_up = False

    def note(self, number: int) -> int:
        """Return 1 for the first request, 2 for the second, 0 for a repeat by a closed window."""
        if self.count and number == signal.SIGHUP:
            return 0
        if self.hung_up and number == signal.SIGTERM:
            self.hung_up = False
            return 0
        self.hung_up = number == signal.SIGHUP
        self.count += 1
        return self.count


requests = Requests()
