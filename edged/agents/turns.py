"""One generation at a time on a model, first come first served: a lock that is fair, and that one may stop waiting for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WAITING_MAX = 64
POLL_S = 0.05  # how soon one who waits notices its `halt`


class QueueFull(RuntimeError):
    """Too many wait for this model already."""


class Turns:
    """Who may use a model now. Threads wait in the order in which they came."""

    def __init__(self, waiting_max: int = WAITING_MAX) -> None:
        self._waiting_max = waiting_max
        self._queue: deque[object] = deque()  # the first one has its turn
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, halt: Callable[[], str]) -> Iterator[str]:
        """Wait for the turn; yields "" with it, or why `halt` ended the waiting. Raises QueueFull."""
        me = object()
        with self._changed:
            if len(self._queue) > self._waiting_max:
                raise QueueFull(f"{self._waiting_max} requests wait for this model already; try again later")
            self._queue.append(me)
        try:
            yield self._wait(me, halt)
        finally:
            with self._changed:
                self._queue.remove(me)
                self._changed.notify_all()

    def _wait(self, me: object, halt: Callable[[], str]) -> str:
        with self._changed:
            while True:
                if reason := halt():
                    return reason
                if self._queue[0] is me:
                    return ""
                self._changed.wait(POLL_S)
