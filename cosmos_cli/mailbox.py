"""How ranks tell the process that started them why they failed, even when no disk can be written.

A datagram socket in Linux's abstract namespace: it needs no file and is gone with its owner.
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
    """The receiving end, to be closed; `address` goes to the ranks in their environment."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.address = f"cosmos-{os.getpid()}-{os.urandom(4).hex()}"
        self.socket.bind(f"\0{self.address}")
        self.socket.setblocking(False)

    def read(self) -> list[dict[str, Any]]:
        """The messages that have arrived, oldest first."""
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                messages.append(json.loads(self.socket.recv(2**20)))
        return messages

    def __enter__(self) -> Mailbox:
        """Nothing to do, the socket is open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the socket; messages not read are lost."""
        self.socket.close()


def post(message: dict[str, Any]) -> None:
    """Sends a message to the process that started this one; prints it when there is none."""
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
