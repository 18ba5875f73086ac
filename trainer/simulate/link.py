"""The project's MQTT connection on an asyncio loop: thousands of them in one process, without a thread each.

Law of this file: everything but the connecting itself runs on the loop. Connecting blocks (name, TCP, TLS), so a small
pool of threads does it; until it is done the loop leaves that client alone.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edged.core.backoff import reconnect_s
from edged.link import Connected, Link, LinkEvent, LinkOptions
from edged.wire.topics import Address

log = logging.getLogger(__name__)

CONNECTING_MAX = 8  # at once, in a process
LOOKS_A_KEEPALIVE = 4  # how often each connection is asked whether it is time for a ping
PACKETS_A_READ = 32  # before other connections have their turn


class _Inbox(queue.Queue[Any]):
    """Hands what arrives to its owner at once: on a loop nobody waits at a queue."""

    def __init__(self, take: Callable[[LinkEvent], None]) -> None:
        super().__init__()
        self._take = take

    def put(self, item: LinkEvent, block: bool = True, timeout: float | None = None) -> None:
        self._take(item)

    def qsize(self) -> int:
        return 0


class LoopLink(Link):
    """One connection of the loop it is started on; `take` is called on that loop with everything that happens."""

    def __init__(
        self,
        options: LinkOptions,
        subscriptions: Sequence[str],
        take: Callable[[LinkEvent], None],
        pool: ThreadPoolExecutor,
        dice: Callable[[], float],
        *,
        will: tuple[Address, bytes] | None = None,
        will_delay_s: int = 30,
    ) -> None:
        """`pool`: who connects, CONNECTING_MAX threads; `dice`: an even chance from 0 to 1, how long it waits
        after a failure."""
        self._take, self._pool, self._dice = take, pool, dice
        self._held: list[LinkEvent] = []
        self._away = True  # the loop leaves the client alone
        self._failures = 0
        super().__init__(options, subscriptions, will=will, will_delay_s=will_delay_s, inbox=_Inbox(self._on_event))
        self._sock: Any = None  # the one that the loop watches
        self._writing = False
        self._ticking: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._until = 0.0  # loop time before which it does not connect again
        self._client.on_socket_close = self._on_socket_close
        self._client.on_socket_register_write = self._on_want_write
        self._client.on_socket_unregister_write = lambda *_: None

    def start(self, *, resume: bool = False) -> None:
        """Connect and keep trying, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._aim(resume=resume)
        self._task = self._loop.create_task(self._connect())

    def cut(self, away_s: float) -> None:
        """Lose the connection without a word, as a device does whose network fails, and come back after `away_s`."""
        self._until = self._loop.time() + away_s
        sock: Any = self._client.socket()  # paho's protocol of it leaves shutdown out
        if sock is not None and not self._away:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it was lost already
            self._read()

    def stop(self) -> None:
        """Disconnect in order: the Will is not sent. On the loop."""
        self._started = False
        if self._task is not None:
            self._task.cancel()
        if not self._away:
            self._client.disconnect()
            self._write()
            self._unwatch()
        self._client._sock_close()  # paho offers no public way to be done with a socket that it was told to leave
        self.connected = False

    def unanswered(self) -> int:
        """QoS 1 messages that the broker has not answered yet."""
        with self._lock:
            return sum(1 for qos, _ in self._flying.values() if qos)

    def alive(self) -> bool:
        """There is no thread that could die."""
        return True

    def _on_event(self, event: LinkEvent) -> None:
        if isinstance(event, Connected):
            self._failures = 0
        if self._away:  # on a thread of the pool: the loop hears of it when connecting is over
            self._held.append(event)
        else:
            self._take(event)

    async def _connect(self) -> None:
        """Connect, again and again until it has worked."""
        while self._started:
            await asyncio.sleep(max(0.0, self._until - self._loop.time()))
            try:
                await self._loop.run_in_executor(self._pool, self._client.reconnect)
            except (OSError, ValueError) as error:
                self._client._sock_close()
                self._fail(f"no connection to {self.options.host}:{self.options.port}: {error}")
                continue
            sock = self._client.socket()
            self._away = False
            held, self._held = self._held, []
            for event in held:
                self._take(event)
            if sock is None or not self._started:
                self._away = True
                continue
            self._sock = sock
            self._loop.add_reader(sock, self._read)
            self._tick()
            self._write()
            return

    def _fail(self, reason: str) -> None:
        self._failures += 1
        self._held = []
        self._until = max(self._until, self._loop.time() + reconnect_s(self._failures, self._dice()))
        log.debug("%s: %s", self.options.client_id, reason)

    def _read(self) -> None:
        if self._away:
            return
        for _ in range(PACKETS_A_READ):
            if self._client.loop_read() or not self._more():
                break
        if self._client.socket() is None:
            self._ended()

    def _more(self) -> bool:
        """Whether TLS holds bytes that the loop cannot see."""
        sock = self._client.socket()
        return sock is not None and hasattr(sock, "pending") and sock.pending() > 0

    def _on_want_write(self, _client: Any, _userdata: Any, _sock: Any) -> None:
        if not self._away and not self._writing:
            self._writing = True
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        if self._away:
            self._writing = False
            return
        self._writing = True  # what paho asks for meanwhile is done here
        self._client.loop_write()
        self._writing = self._client.socket() is not None and self._client.want_write()
        if self._client.socket() is None:
            self._ended()
        elif self._writing:
            self._loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        self._loop.remove_writer(self._sock)
        self._write()

    def _tick(self) -> None:
        """Pings, and whether the broker still answers them."""
        if self._away:
            return
        self._client.loop_misc()
        if self._client.socket() is None:
            self._ended()
            return
        every_s = self.options.keepalive_s / LOOKS_A_KEEPALIVE
        self._ticking = self._loop.call_later(every_s, self._tick)

    def _on_socket_close(self, _client: Any, _userdata: Any, sock: Any) -> None:
        if sock is self._sock:  # while its number is still ours
            self._unwatch()

    def _unwatch(self) -> None:
        if self._sock is not None:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock = None
        if self._ticking is not None:
            self._ticking.cancel()
            self._ticking = None

    def _ended(self) -> None:
        """The connection is gone: another one."""
        if self._away:
            return
        self._away = True
        self._unwatch()
        self._fail("lost")
        if self._started:
            self._task = self._loop.create_task(self._connect())
