"""Send the errors of ranks to the process that started them, even if no disk can be written.

The channel is a datagram socket in Linux's abstract namespace. It needs no file and disappears with
its owner.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from typing import Any

ADDRESS = "COSMOS_MAILBOX"
MAX_CHARACTERS = 20_000


class Mailbox:
    """Receives the messages of the ranks, which find `address` in their environment variable."""

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

    def __enter__(self) -> Mailbox:
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
