"""A watchdog that ends a run when a rank hangs: stopped, deadlocked or on a frozen machine.

A thread in every rank regularly writes a heartbeat to the run's store: a counter and the number of
collective operations this rank has started. It also reads the heartbeat of the next rank in a ring.
The run ends if that rank is silent, or does not reach an operation that this rank waits in.
The time-out counts checks, not seconds, so a run that was suspended as a whole resumes unharmed.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta

import torch.distributed as dist

from cosmos_cli import console, ranks
from cosmos_cli.errors import ExitCode

# Each rank checks the next one this many times within the time-out.
CHECKS = 10
END = "end"


class Watchdog(threading.Thread):
    """Writes this rank's heartbeat and watches the next rank, until `end`."""

    def __init__(self, timeout_seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.own = dist.get_rank()
        self.next = (self.own + 1) % dist.get_world_size()
        self.timeout = timeout_seconds
        self.ended = threading.Event()

    def run(self) -> None:
        """Write heartbeats; if the next rank hangs, end this process and with it the run."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        beat, silent, behind = 0, 0, 0
        last = (-1, -1)
        try:
            # The thread needs its own connection: the main thread's may be blocked in a wait.
            store = dist.TCPStore(
                host, port, is_master=False, timeout=timedelta(seconds=self.timeout)
            )
            while not self.ended.wait(self.timeout / CHECKS):
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
                if silent == CHECKS:
                    self._end_run(f"sent no heartbeat for {self.timeout:g} s", self.next)
                if behind == CHECKS:
                    self._end_run(f"kept other ranks waiting for {self.timeout:g} s", self.next)
            store.set(_key(self.own), END)
        except dist.DistNetworkError:
            # The process that holds the store has exited. Under a launcher it is the launcher,
            # which ends the ranks itself. Otherwise it is rank 0.
            if ranks.ADDRESS not in os.environ and not self.ended.wait(self.timeout):
                self._end_run("has exited", 0)
        except dist.DistStoreError:
            self._end_run(f"{host}:{port} did not answer for {self.timeout:g} s", 0)

    def end(self) -> None:
        """Stop the thread and tell the rank that watches this one that it has finished."""
        self.ended.set()
        self.join()

    def _end_run(self, error: str, rank: int) -> None:
        """Report the error of `rank` and end this process at once: its main thread is stuck."""
        error += " (timeout_seconds)"
        if ranks.ADDRESS in os.environ:
            message = {"rank": rank, "code": int(ExitCode.TRAINING), "error": error, "lost": True}
            ranks.post(message)
        else:
            console.unmute()
            console.say(f"error: rank {rank}: {error}")
        os._exit(ExitCode.TRAINING)


def _key(rank: int) -> str:
    return f"cosmos/heartbeat/{rank}"


def _collectives() -> int:
    """Return the number of collective operations this process has started, over all groups."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)
