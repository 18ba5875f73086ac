"""A slow, breakable wire: a TCP port of loopback that passes bytes on to another one, so many a second."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 4096
BUFFER_BYTES = 16384  # of sockets: what is sent shall not vanish into buffers


class SlowLink:
    """Listens on `port`; what the far side (`to_port`) answers comes at `bytes_s` at most, what it is sent at full speed."""

    def __init__(self, to_port: int, bytes_s: float) -> None:
        self._to_port, self.bytes_s = to_port, bytes_s
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, name="slow-link", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            try:
                far = self._reach()
            except OSError:
                near.close()
                continue
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            for side in (near, far):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._open |= {near, far}
            for source, target, bytes_s in ((near, far, None), (far, near, self.bytes_s)):
                threading.Thread(target=self._pass_on, args=(source, target, bytes_s), daemon=True).start()

    def _reach(self) -> socket.socket:
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        far.connect(("127.0.0.1", self._to_port))
        return far

    def _pass_on(self, source: socket.socket, target: socket.socket, bytes_s: float | None) -> None:
        free_at = time.monotonic()
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if bytes_s is not None:
                    free_at = max(free_at, time.monotonic()) + len(data) / bytes_s
                    time.sleep(max(0.0, free_at - time.monotonic()))
                target.sendall(data)
        for side in (source, target):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
            side.close()
            self._open.discard(side)

    def close(self) -> None:
        """Stop listening and cut every connection."""
        # A thread in accept() is not woken by close() alone.
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for side in list(self._open):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


@contextmanager
def slow_link(to_port: int, bytes_s: float) -> Iterator[SlowLink]:
    """A SlowLink that is closed in the end."""
    link = SlowLink(to_port, bytes_s)
    try:
        yield link
    finally:
        link.close()
