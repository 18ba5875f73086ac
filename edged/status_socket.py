"""The status socket: whoever may read the state folder asks the running daemon what it does, and gets one JSON document."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edged.beats import Beats

log = logging.getLogger(__name__)

STATUS_SOCKET = "status.sock"
STATUS_BYTES_MAX = 4 << 20
ACCEPT_S = 1.0  # between two signs of life of who waits for a reader
SEND_S_MAX = 2.0  # for one reader: the next ones wait behind it
STILL_S_MAX = 60.0  # the document is made of many small questions to the store, and its disk may be slow
ASK_S_MAX = 5.0
THREAD = "status"


class StatusSocket:
    """Answers every connection with one JSON document. Local to this machine and to whoever may read the state folder."""

    def __init__(self, state: Path, make: Callable[[], dict[str, Any]], beats: Beats) -> None:
        self._state, self._make, self._beats = state, make, beats
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, name=THREAD, daemon=True)

    def start(self) -> None:
        """Listen; raises OSError when the folder takes no socket."""
        (self._state / STATUS_SOCKET).unlink(missing_ok=True)
        with _ShortPath(self._state) as path:
            self._socket.bind(path)
        self._socket.listen(4)
        self._socket.settimeout(ACCEPT_S)
        self._beats.watch(THREAD, STILL_S_MAX)
        self._thread.start()

    def stop(self) -> None:
        """Close it."""
        self._beats.forget(THREAD)
        self._socket.close()
        (self._state / STATUS_SOCKET).unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            self._beats.beat(THREAD)
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            except OSError:  # closed
                return
            with connection:
                try:
                    connection.settimeout(SEND_S_MAX)
                    connection.sendall(json.dumps(self._make()).encode())
                except Exception as error:  # a reader that went away must not end the readers after it
                    log.debug("status: %s", error)


class _ShortPath:
    """A path to the socket that fits the 107 bytes of a Unix socket address however deep the folder lies."""

    def __init__(self, state: Path) -> None:
        self._state = state

    def __enter__(self) -> str:
        self._descriptor = os.open(self._state, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{self._descriptor}/{STATUS_SOCKET}"

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def ask_status(state: Path) -> dict[str, Any] | None:
    """The status of the daemon that works in `state`; None when none answers."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, _ShortPath(state) as path:
            client.settimeout(ASK_S_MAX)
            client.connect(path)
            data = bytearray()
            while chunk := client.recv(65536):
                data += chunk
                if len(data) > STATUS_BYTES_MAX:
                    return None
        answer: dict[str, Any] = json.loads(data)
    except (OSError, ValueError):
        return None
    return answer
