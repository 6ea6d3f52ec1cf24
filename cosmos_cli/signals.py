"""Which signals end a command in order, and with which exit code. No torch."""

from __future__ import annotations

import signal

from cosmos_cli.errors import ExitCode


def ending() -> dict[signal.Signals, ExitCode]:
    """Return the signals that end this process in order, with the exit code of each.

    SIGHUP comes when an SSH window closes and counts as SIGTERM. It stays ignored where it was
    ignored on entry, as nohup does.
    """
    codes = {signal.SIGINT: ExitCode.SIGINT, signal.SIGTERM: ExitCode.SIGTERM}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        codes[signal.SIGHUP] = ExitCode.SIGTERM
    return codes


class Requests:
    """Counts how often this process was asked to end.

    When a window closes, the kernel and the shell both send SIGHUP, and systemd SIGTERM with it.
    None of these may pass for a second request, which cuts short the save of the first.
    """

    def __init__(self) -> None:
        self.count = 0
        self.hung_up = False

    def note(self, number: int) -> int:
        """Return 1 for the first request, 2 for the second; 0 for an echo of a closed window."""
        if self.count and number == signal.SIGHUP:
            return 0
        if self.hung_up and number == signal.SIGTERM:
            self.hung_up = False
            return 0
        self.hung_up = number == signal.SIGHUP
        self.count += 1
        return self.count


requests = Requests()
