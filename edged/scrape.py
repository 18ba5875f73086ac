"""A small HTTP server for one page: GET /metrics. One thread, bounded in everything that a client can make it do.

Law of this file: whoever reaches the port can cost the daemon no memory, no threads and no time to speak of. At most
CONNECTIONS_MAX are open; when another comes the oldest is closed, so that idle ones keep nobody out; each has
CONNECTION_S_MAX for its whole life, so that one byte a second gets nowhere.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 16
CONNECTION_S_MAX = 5.0
REQUEST_BYTES_MAX = 8192
WAKE_S = 0.5  # how soon a stop and an overdue connection are noticed

Page = Callable[[str], tuple[str, bytes]]  # Accept header -> (content type, body)


@dataclass(slots=True)
class _Client:
    connection: socket.socket
    ends_by: float  # monotonic
    request: bytearray = field(default_factory=bytearray)
    answer: memoryview = field(default_factory=lambda: memoryview(b""))


class Scrape:
    """Serves `page` until `stop`."""

    def __init__(self, host: str, port: int, page: Page, beat: Callable[[], None] = lambda: None) -> None:
        """Listens; raises OSError when the address cannot be had. `beat` is called as often as the thread comes round."""
        self._page, self._beat = page, beat
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=CONNECTIONS_MAX)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._clients: dict[socket.socket, _Client] = {}  # the oldest first
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close everything."""
        self._stopping = True
        if self._thread.ident is not None:
            self._thread.join()
        for connection in list(self._clients):
            self._drop(connection)
        self._selector.close()
        self._listener.close()

    def _run(self) -> None:
        while not self._stopping:
            self._beat()
            try:
                for key, _ in self._selector.select(WAKE_S):
                    self._ready(key.fileobj)
                now = time.monotonic()
                for connection in [c for c, client in self._clients.items() if client.ends_by <= now]:
                    self._drop(connection)
            except Exception:  # the thread outlives every bug
                log.exception("metrics")
                time.sleep(WAKE_S)

    def _ready(self, source: object) -> None:
        if source is self._listener:
            self._accept()
            return
        client = self._clients.get(source)  # type: ignore[call-overload]
        if client is None:
            return  # closed a moment ago, to make room
        try:
            done = self._write(client) if client.answer.nbytes else self._read(client)
        except BlockingIOError:
            return
        except OSError:  # it went away
            done = True
        if done:
            self._drop(client.connection)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # gone again, or no file descriptor left
            log.debug("metrics: %s", error)
            return
        connection.setblocking(False)
        while len(self._clients) >= CONNECTIONS_MAX:
            self._drop(next(iter(self._clients)))
        self._clients[connection] = _Client(connection, time.monotonic() + CONNECTION_S_MAX)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, client: _Client) -> bool:
        """Take what came; true when the connection is to be closed."""
        data = client.connection.recv(REQUEST_BYTES_MAX)
        client.request += data
        if not data:
            return True
        if b"\r\n\r\n" not in client.request and b"\n\n" not in client.request:
            if len(client.request) < REQUEST_BYTES_MAX:
                return False
            client.answer = memoryview(_response("431 Request Header Fields Too Large", b"too many headers\n"))
        else:
            client.answer = memoryview(self._answer(bytes(client.request)))
        self._selector.modify(client.connection, selectors.EVENT_WRITE)
        return False

    def _write(self, client: _Client) -> bool:
        client.answer = client.answer[client.connection.send(client.answer) :]
        return not client.answer.nbytes

    def _answer(self, request: bytes) -> bytes:
        line, _, rest = request.decode("latin-1").partition("\n")
        method, _, target = line.strip().partition(" ")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", b"only GET\n", more="Allow: GET, HEAD\r\n")
        path = target.partition(" ")[0].partition("?")[0]
        if path == "/":
            return _response("200 OK", b"metrics of edged: /metrics\n")
        if path != "/metrics":
            return _response("404 Not Found", b"only /metrics\n")
        try:
            kind, body = self._page(_header(rest, "accept"))
        except Exception as error:
            log.warning("metrics: %s: %s", type(error).__name__, error)
            return _response("500 Internal Server Error", b"see the log\n")
        answer = _response("200 OK", body, kind)
        return answer[: -len(body)] if method == "HEAD" and body else answer

    def _drop(self, connection: socket.socket) -> None:
        if self._clients.pop(connection, None) is not None:
            self._selector.unregister(connection)
        connection.close()


def _header(text: str, name: str) -> str:
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return ""


def _response(status: str, body: bytes, kind: str = "text/plain; charset=utf-8", *, more: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode() + body
