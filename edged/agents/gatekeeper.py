"""The one way of a browser to the network: a proxy on loopback that lets through what is allowed, up to a number of bytes.

Law of this file: whatever a page, a redirect, a script, a frame or a worker asks for comes through here, so what is refused
here is reached by nobody. Over https it sees host and port, and counts the bytes.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from urllib.parse import urlsplit

from edged.core.hosts import AllowedHosts

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 64 * 1024
HEAD_S_MAX = 10.0
CONNECT_S_MAX = 10.0
CONNECTIONS_MAX = 64
REFUSED_MAX = 100  # remembered
PIECE_BYTES = 64 * 1024
BODY_BYTES_MAX = 1 << 20  # of what a page sends in one request


class Gatekeeper:
    """Between `start` and `close` the browser's proxy is `url`."""

    def __init__(self, allowed: AllowedHosts) -> None:
        self._allowed = allowed
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._left, self.cut = 0, asyncio.Event()  # set when there are no bytes left
        self.refused: list[str] = []  # host:port of what was not let through; whoever reads it clears it

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def start(self) -> None:
        """Listen on a free port of loopback."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=HEAD_BYTES_MAX)

    async def close(self) -> None:
        """End it and every connection through it."""
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def end(self) -> None:
        """No further byte until `allow_bytes`."""
        self._left = 0
        self.cut.set()

    def allow_bytes(self, count: int) -> None:
        """From now on so many bytes may come; then every connection is cut."""
        self._left = count
        self.cut.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if len(self._open) <= CONNECTIONS_MAX:
                await self._pass(reader, writer)
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.debug("a browser's connection ended: %s", error)
        finally:
            self._open.discard(task)
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), HEAD_S_MAX)
        line, _, rest = head.partition(b"\r\n")
        method, target, _version = line.decode("ascii").split(" ")
        if method == "CONNECT":
            host, _, port = target.rpartition(":")
            to = host.strip("[]"), int(port)
        else:
            parts = urlsplit(target)
            to = parts.hostname or "", parts.port or 80
        if not self._allowed.allow(*to) or (method != "CONNECT" and not target.startswith("http://")):
            if len(self.refused) < REFUSED_MAX:
                self.refused.append(f"{to[0]}:{to[1]}")
            await _say(writer, 403, f"{to[0]}:{to[1]} is not allowed")
            return
        try:
            far_reader, far_writer = await asyncio.wait_for(asyncio.open_connection(*to), CONNECT_S_MAX)
        except (OSError, TimeoutError) as error:
            await _say(writer, 502, f"{to[0]}:{to[1]}: {error}")
            return
        try:
            if method == "CONNECT":
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                upward = asyncio.create_task(_pump(reader, far_writer))
            else:
                # Its own bytes and no more: the browser may think that this connection leads to other hosts too.
                far_writer.write(_direct(method, target, rest) + await reader.readexactly(_length(rest)))
                upward = asyncio.create_task(far_writer.drain())
            await self._down(far_reader, writer, upward)
        finally:
            far_writer.close()

    async def _down(
        self, far_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upward: asyncio.Task[None]
    ) -> None:
        """What comes from there, as long as there are bytes left."""
        try:
            while piece := await far_reader.read(PIECE_BYTES):
                self._left -= len(piece)
                if self._left < 0:
                    self.cut.set()
                    return
                writer.write(piece)
                await writer.drain()
        finally:
            upward.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await upward


def _direct(method: str, target: str, headers: bytes) -> bytes:
    """A request to a proxy as its server wants it; one request a connection, so that each is looked at."""
    parts = urlsplit(target)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    kept = [
        line for line in headers.split(b"\r\n") if line and not line.lower().startswith((b"proxy-", b"connection:"))
    ]
    return b"\r\n".join([f"{method} {path} HTTP/1.1".encode("ascii"), *kept, b"Connection: close", b"", b""])


def _length(headers: bytes) -> int:
    """Of a request's body. Raises ValueError for one that is too large, or that does not say."""
    for line in headers.lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"transfer-encoding":
            raise ValueError("a request without its length")
        if name == b"content-length":
            length = int(value)
            if not 0 <= length <= BODY_BYTES_MAX:
                raise ValueError(f"a request of {length} bytes")
            return length
    return 0


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(PIECE_BYTES):
        writer.write(piece)
        await writer.drain()


async def _say(writer: asyncio.StreamWriter, status: int, text: str) -> None:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status} X\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
