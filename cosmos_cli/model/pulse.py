"""Ends a run in which a process stands still: stopped, frozen with its machine, or in a deadlock.

From a thread of its own every rank tells the run's store, at a steady pace, that it lives and how
many collective operations it has come to. It looks for the same of the next rank in a ring: one
that is silent, or does not come to an operation that this rank is at, has the run end. Looks are
counted, not timed, so that a run that was stopped as a whole goes on when it is woken.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch.distributed as dist

from cosmos_cli import console, mailbox
from cosmos_cli.errors import ExitCode

# How often a rank looks within the time-out.
LOOKS = 10
END = "end"


class Pulse(threading.Thread):
    """The signs of life of this rank, and the watch on the next, until `end`."""

    def __init__(self, timeout_seconds: float) -> None:
        super().__init__(name="pulse", daemon=True)
        self.own = dist.get_rank()
        self.next = (self.own + 1) % dist.get_world_size()
        self.timeout = timeout_seconds
        self.ended = threading.Event()

    def run(self) -> None:
        """Beats and looks; ends this process, and so the run, when the next one stands still."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        beat, silent, behind = 0, 0, 0
        last = (-1, -1)
        try:
            # A connection of its own: a wait of the main thread may take the other one.
            store = dist.TCPStore(
                host, port, is_master=False, timeout=timedelta(seconds=self.timeout)
            )
            while not self.ended.wait(self.timeout / LOOKS):
                beat, count = beat + 1, _collectives()
                store.set(_key(self.own), f"{beat} {count}")
                known = store.check([_key(self.next)])
                text = store.get(_key(self.next)).decode() if known else "0 0"
                if text == END:
                    continue
                seen = tuple(map(int, text.split()))
                silent = silent + 1 if seen[0] == last[0] else 0
                behind = behind + 1 if seen[1] == last[1] < count else 0
                last = seen
                if silent == LOOKS:
                    self._give_up(f"gave no sign of life for {self.timeout:g} s", self.next)
                if behind == LOOKS:
                    self._give_up(f"kept the others waiting for {self.timeout:g} s", self.next)
            store.set(_key(self.own), END)
        except dist.DistNetworkError:
            # The launcher is gone, and ends the ranks or has ended them; or rank 0, where each was
            # started by itself.
            if mailbox.ADDRESS not in os.environ and not self.ended.wait(self.timeout):
                self._give_up("is gone", 0)
        except dist.DistStoreError:
            self._give_up(f"{host}:{port} did not answer for {self.timeout:g} s", 0)

    def end(self) -> None:
        """Has the rank that watches this one not wait for it."""
        self.ended.set()
        self.join()

    def _give_up(self, what: str, rank: int) -> None:
        """Ends this process with one line: its main thread waits for what will never come."""
        what += " (timeout_seconds)"
        if mailbox.ADDRESS in os.environ:
            message = {"rank": rank, "code": int(ExitCode.TRAINING), "error": what, "lost": True}
            mailbox.post(message)
        else:
            console.unmute()
            console.say(f"error: rank {rank}: {what}")
        os._exit(ExitCode.TRAINING)


def _key(rank: int) -> str:
    return f"cosmos/pulse/{rank}"


def _collectives() -> int:
    """How many collective operations this process has come to, in all groups together."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)
