"""The browser's way out: nothing but allowed hosts, byte by byte, whoever speaks to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from edged.agents.gatekeeper import BODY_BYTES_MAX, Gatekeeper
from edged.core.hosts import AllowedHosts

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"  # and the connection stays open


class Far:
    """A server that keeps what it was sent."""

    def __init__(self, answer: bytes) -> None:
        self.heard, self._answer = b"", answer
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard += await reader.readuntil(b"\r\n\r\n")
        writer.write(self._answer)
        await writer.drain()
        while piece := await reader.read(1000):
            self.heard += piece
        writer.close()


def through(
    act: Callable[[Gatekeeper, Far, Any, Any], Awaitable[Any]], *, answer: bytes = ANSWER, let: bool = True
) -> Any:
    """Speak to a gatekeeper in front of a server on loopback."""

    async def run() -> Any:
        far = Far(answer)
        server = await asyncio.start_server(far.serve, "127.0.0.1", 0)
        far.port = server.sockets[0].getsockname()[1]
        gate = Gatekeeper(AllowedHosts([f"127.0.0.1:{far.port}"] if let else []))
        await gate.start()
        gate.allow_bytes(1000)
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gate.url.rpartition(":")[2]))
        try:
            return await asyncio.wait_for(act(gate, far, reader, writer), 30)
        finally:
            writer.close()
            await gate.close()
            server.close()

    return asyncio.run(run())


def test_a_request_goes_where_it_should_without_what_is_the_proxys() -> None:
    async def act(gate: Gatekeeper, far: Far, reader: Any, writer: Any) -> bytes:
        head = f"POST http://127.0.0.1:{far.port}/a?b=c HTTP/1.1\r\nHost: x\r\nProxy-Authorization: secret\r\n"
        writer.write(f"{head}Connection: keep-alive\r\nContent-Length: 4\r\n\r\nbody".encode())
        assert await reader.readexactly(len(ANSWER)) == ANSWER
        while b"body" not in far.heard:
            await asyncio.sleep(0.01)
        return far.heard

    heard = through(act)
    assert heard.startswith(b"POST /a?b=c HTTP/1.1\r\n") and heard.endswith(b"\r\n\r\nbody")
    assert b"secret" not in heard and b"Connection: close" in heard and b"keep-alive" not in heard


def test_a_second_request_on_the_connection_reaches_nobody() -> None:
    """It may be meant for another host, which was not looked at."""

    async def act(gate: Gatekeeper, far: Far, reader: Any, writer: Any) -> bytes:
        writer.write(f"GET http://127.0.0.1:{far.port}/ HTTP/1.1\r\n\r\n".encode())
        writer.write(b"GET http://evil.example/?token=5 HTTP/1.1\r\n\r\n")
        await reader.readexactly(len(ANSWER))
        await asyncio.sleep(0.1)
        return far.heard

    assert b"token" not in through(act)


@pytest.mark.parametrize(
    "line",
    [
        "GET http://127.0.0.1:{port}/ HTTP/1.1", "CONNECT 127.0.0.1:{port} HTTP/1.1", "GET ftp://127.0.0.1:{port}/ HTTP/1.1",
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_not_reached_and_remembered(line: str) -> None:
    async def act(gate: Gatekeeper, far: Far, reader: Any, writer: Any) -> None:
        writer.write(f"{line.format(port=far.port)}\r\n\r\n".encode())
        assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
        assert (gate.refused, far.heard) == ([f"127.0.0.1:{far.port}"], b"")

    through(act, let=False)


def test_a_tunnel_is_cut_when_its_bytes_are_used_up() -> None:
    async def act(gate: Gatekeeper, far: Far, reader: Any, writer: Any) -> bytes:
        writer.write(f"CONNECT 127.0.0.1:{far.port} HTTP/1.1\r\n\r\n".encode())
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\n\r\n"
        writer.write(b"anything\r\n\r\n")
        got: bytes = await reader.read()
        await gate.cut.wait()
        return got

    assert len(through(act, answer=b"x" * 100_000)) <= 1000


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n", b"GET\r\n\r\n", b"CONNECT nowhere HTTP/1.1\r\n\r\n", b"\xff\xfe / HTTP/1.1\r\n\r\n",
        b"A" * 100_000 + b"\r\n\r\n", b"POST http://127.0.0.1:PORT/ HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        f"POST http://127.0.0.1:PORT/ HTTP/1.1\r\nContent-Length: {BODY_BYTES_MAX + 1}\r\n\r\n".encode(),
        b"POST http://127.0.0.1:PORT/ HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_request_ends_the_connection_and_nothing_else(sent: bytes) -> None:
    async def act(gate: Gatekeeper, far: Far, reader: Any, writer: Any) -> None:
        writer.write(sent.replace(b"PORT", str(far.port).encode()))
        with suppress(ConnectionResetError):
            assert not (await reader.read()).startswith(b"HTTP/1.1 200")
        assert far.heard == b""
        again_reader, again = await asyncio.open_connection("127.0.0.1", int(gate.url.rpartition(":")[2]))
        again.write(f"GET http://127.0.0.1:{far.port}/ HTTP/1.1\r\n\r\n".encode())
        assert await again_reader.readexactly(len(ANSWER)) == ANSWER
        again.close()

    through(act)
