"""A server whose answers to a question are wrong in every way on purpose, byte by byte."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

ENDLESS_BYTES = 64 << 20
Act = Callable[[socket.socket, threading.Event], None]


def chat(text: str = "yes", **more: Any) -> dict[str, Any]:
    """A whole answer, with other fields where `more` says so."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    return {"model": "large", "choices": [choice], "usage": usage} | more


def reply(status: int, body: bytes | dict[str, Any], headers: str = "") -> Act:
    """A whole HTTP answer."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body

    def act(connection: socket.socket, _ended: threading.Event) -> None:
        connection.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n{headers}\r\n".encode() + data)

    return act


def silent(_connection: socket.socket, ended: threading.Event) -> None:
    """Takes the question and never answers."""
    ended.wait(60)


def drip(first: bytes) -> Act:
    """`first`, then a byte now and then, for ever."""

    def act(connection: socket.socket, ended: threading.Event) -> None:
        connection.sendall(first)
        while not ended.wait(0.05):
            connection.sendall(b"x")

    return act


def endless(connection: socket.socket, ended: threading.Event) -> None:
    """A body that does not end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
    for _ in range(ENDLESS_BYTES >> 16):
        if ended.is_set():
            return
        connection.sendall(b" " * 65536)


def raw(data: bytes) -> Act:
    """These bytes, then the end of the connection."""
    return lambda connection, _ended: connection.sendall(data)


class BadServer:
    """`acts`: what it does with the next questions, the last one for all that follow."""

    def __init__(self, *acts: Act, context: ssl.SSLContext | None = None) -> None:
        self._acts, self._context = list(acts), context
        self.requests: list[tuple[float, bytes]] = []  # when (monotonic) and what
        self._ended = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen, daemon=True)

    @property
    def url(self) -> str:
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}/v1"

    def _listen(self) -> None:
        while not self._ended.is_set():
            with suppress(OSError):
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                self.requests.append((time.monotonic(), _request(connection)))
                act = self._acts[0] if len(self._acts) == 1 else self._acts.pop(0)
                act(connection, self._ended)

    def __enter__(self) -> BadServer:
        self._thread.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._ended.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body
