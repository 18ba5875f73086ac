"""The second connection of a device, `{dev}~blk`: blocks of files, apart from everything that must not wait behind them.

It is there while somebody uses it, and a little longer. A thread of its own takes in what comes and hands it to whoever
waits for it; it listens to nothing but the blocks that are outstanding.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edged.fetch import FetchError
from edged.link import BadCredentials, Connected, Disconnected, Inbound, Link, LinkOptions
from edged.wire import topics

log = logging.getLogger(__name__)

LINGER_S = 10.0  # the next file often follows at once
LOOK_S = 0.2
NOT_YET, CONNECTED = "not connected yet", "connected"


class Bulk:
    """The connection, shared by those who `listen`. Any thread."""

    def __init__(self, options: LinkOptions | str, count: Callable[[str, int], None]) -> None:
        """`options`: who we are; a text: why there is no such connection."""
        self._options, self._count = options, count
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._boxes: dict[str, queue.Queue[Any]] = {}  # topic without its last field -> who waits for it
        self._wanted: dict[str, list[str]] = {}  # the same -> subscriptions
        self._idle_at = 0.0
        self._closing = False
        self.connection = 0  # how often it was made: what was asked for on an earlier one may be lost
        self.state = NOT_YET

    @property
    def unusable(self) -> str:
        """Why there is no such connection; empty: there can be one."""
        return self._options if isinstance(self._options, str) else ""

    @contextmanager
    def listen(self, key: str) -> Iterator[queue.Queue[Any]]:
        """What comes on topics that begin with `key`, and every Connected: here while the block runs. Raises FetchError."""
        box: queue.Queue[Any] = queue.Queue()
        with self._lock:
            self._boxes[key] = box
            try:
                self._open()
            except BaseException:
                del self._boxes[key]
                raise
        try:
            yield box
        finally:
            self.subscribe(key, [])
            with self._lock:
                del self._boxes[key]
                self._idle_at = time.monotonic()

    def subscribe(self, key: str, subscriptions: list[str]) -> None:
        """The one who listens to `key` gets exactly these from now on."""
        with self._lock:
            self._wanted[key] = subscriptions
            if not subscriptions:
                del self._wanted[key]
            if self._link is not None:
                self._link.subscribe([topic for each in self._wanted.values() for topic in each])

    def publish(self, address: topics.Address, payload: bytes) -> int:
        """Hand a message over: the `connection` that it went to, 0 when that is not possible now."""
        link, connection = self._link, self.connection
        # A link is connected a moment before it has subscribed: what is asked for then would come to nobody.
        possible = link is not None and self.state == CONNECTED and link.publish(address, payload)
        return connection if possible else 0

    def close(self) -> None:
        """End the connection; nobody can use it any more."""
        self._closing = True

    def _open(self) -> None:
        if isinstance(self._options, str) or self._closing:
            raise FetchError(self.unusable or "the device is stopping")
        if self._link is None:
            try:
                self._link = Link(self._options, [topic for each in self._wanted.values() for topic in each])
            except BadCredentials as error:
                raise FetchError(str(error)) from None
            self.state = NOT_YET
            self._link.start()
            threading.Thread(target=self._run, args=(self._link,), name="bulk", daemon=True).start()

    def _run(self, link: Link) -> None:
        while self._in_use():
            try:
                event = link.inbox.get(timeout=LOOK_S)
            except queue.Empty:
                link.ensure_alive()
                continue
            if isinstance(event, Inbound):
                link.acknowledge(event)
                key = event.topic.rpartition("/")[0]
                box = self._boxes.get(key)
                if box is None:
                    self._count("blocks_unasked", 1)
                else:
                    box.put(event)
            elif isinstance(event, Connected):
                self.connection += 1
                self.state = CONNECTED
                for box in list(self._boxes.values()):
                    box.put(event)
            elif isinstance(event, Disconnected):
                if event.reason != self.state:
                    log.info("bulk connection: %s", event.reason)
                self.state = event.reason
        link.stop()

    def _in_use(self) -> bool:
        with self._lock:
            if not self._closing and (self._boxes or time.monotonic() - self._idle_at < LINGER_S):
                return True
            self._link = None
            return False
