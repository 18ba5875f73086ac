"""Asks the agents of the running daemon, over its socket. Light: a command line imports nothing else of the agents."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

SOCKET = "agents.sock"
ANSWER_BYTES_MAX = 8 << 20
CONNECT_S_MAX = 5.0

Json = dict[str, Any]


class Nobody(ConnectionError):
    """No daemon with agents listens in this state folder."""


def ask(state: Path, line: Json, seconds: float | None = None) -> Json:
    """The daemon's answer to one line. An interrupt (Ctrl-C) closes the connection, and so cancels what was asked.

    `seconds`: for the answer, None: as long as it takes. Raises Nobody, OSError, TimeoutError, and ValueError for an
    answer that is none.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(CONNECT_S_MAX)
        try:
            folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise Nobody(f"{state}: no such folder") from None
        try:
            client.connect(f"/proc/self/fd/{folder}/{SOCKET}")
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise Nobody(f"{state / SOCKET}: {error.strerror}") from None
        finally:
            os.close(folder)
        client.sendall(json.dumps(line).encode() + b"\n")
        client.settimeout(seconds)
        data = bytearray()
        while not data.endswith(b"\n"):
            chunk = client.recv(65536)
            if not chunk:
                raise ValueError("the daemon ended before it answered")
            data += chunk
            if len(data) > ANSWER_BYTES_MAX:
                raise ValueError(f"the answer has more than {ANSWER_BYTES_MAX} bytes")
    answer: Json = json.loads(data)
    return answer
