"""Ports of loopback for servers that are told theirs, and that come back on the same one after they were ended."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections import deque
from pathlib import Path
from typing import IO

FIRST, LAST = 15000, 32000  # below the ports that connections leave from (ip_local_port_range)
HELD_MAX = 64  # how many of the ports that this process was given last nobody else is given
_held: deque[IO[str]] = deque(maxlen=HELD_MAX)  # their locks
_next = FIRST + os.getpid() * 97 % (LAST - FIRST)


def free_port() -> int:
    """A TCP port that nobody listens on and that no other process of these tests was given lately."""
    global _next
    folder = Path(tempfile.gettempdir()) / f"edged-ports-{os.geteuid()}"
    folder.mkdir(exist_ok=True)
    for _ in range(LAST - FIRST):
        port, _next = _next, FIRST + (_next + 1 - FIRST) % (LAST - FIRST)
        lock = (folder / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return port
    raise RuntimeError(f"no port from {FIRST} to {LAST} of 127.0.0.1 is free")
