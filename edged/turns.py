"""One at a time, first come first served: a lock that is fair, and that one may stop waiting for.

`threading.Lock` is not: a worker that lets go and takes it again at once has it before a thread that waits wakes up.
Law of this file: the lock goes from hand to hand. Who lets go gives it to whoever has waited longest, and nobody else can
come in between.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

POLL_S = 0.05  # how soon one who waits notices its `halt`

Halt = Callable[[], str]  # "" to go on, else why not


def never() -> str:
    """A `halt` that lets everybody go on."""
    return ""


class Halted(Exception):
    """Whoever waited waits no longer; the text is the reason that its `halt` gave."""


class QueueFull(RuntimeError):
    """Too many wait for this model already."""


class Turns:
    """Whose turn it is. `with turns:` waits without end, `turns.turn(halt)` until `halt` has a reason not to."""

    def __init__(self, waiting_max: float = math.inf) -> None:
        self._waiting_max = waiting_max
        self._waiting: deque[threading.Lock] = deque()  # each is released when its turn has come
        self._taken = False
        self._guard = threading.Lock()

    def __enter__(self) -> None:
        self._take(None)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._pass_on()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @contextmanager
    def turn(self, halt: Halt) -> Iterator[None]:
        """Wait for the turn. Raises Halted when `halt` ends the waiting, and QueueFull."""
        self._take(halt)
        try:
            yield
        finally:
            self._pass_on()

    def _take(self, halt: Halt | None) -> None:
        if halt is not None and (reason := halt()):
            raise Halted(reason)
        with self._guard:
            if not self._taken:
                self._taken = True
                return
            if len(self._waiting) >= self._waiting_max:
                raise QueueFull(f"{self._waiting_max} requests wait for this model already; try again later")
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        try:
            self._wait(mine, halt)
        except BaseException:
            self._leave(mine)
            raise

    def _wait(self, mine: threading.Lock, halt: Halt | None) -> None:
        while not mine.acquire(timeout=-1 if halt is None else POLL_S):
            if halt is not None and (reason := halt()):
                raise Halted(reason)

    def _leave(self, mine: threading.Lock) -> None:
        with self._guard:
            waits = mine in self._waiting
            if waits:
                self._waiting.remove(mine)
        if not waits:  # the turn came at this moment
            self._pass_on()

    def _pass_on(self) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._taken = False


class Unlimited(Turns):
    """Everybody's turn at once."""

    def _take(self, halt: Halt | None) -> None:
        if halt is not None and (reason := halt()):
            raise Halted(reason)

    def _pass_on(self) -> None:
        pass
