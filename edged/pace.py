"""How much of the time the workers may work: what keeps a device within its temperature and CPU limits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

from edged.clock import Clock

SHARE_MIN = 0.05  # slower than this a device is no use to anybody: its limits say so in `edged status`
REST_S = 1.0  # after so long whoever rests looks whether the device has become cooler or hotter
T = TypeVar("T")


class _Worker(threading.local):
    """One thread's item in hand: since when (monotonic), and how long of that it only waited."""

    since = 0.0
    waited_s = 0.0


class Pace:
    """`share` of the time may be work, 1: all of it. One thread sets it, the workers read it.

    Each worker rests after its own work: whoever works longer rests longer, and all work for the same share of the time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._share, self._worker = clock, 1.0, _Worker()

    @property
    def share(self) -> float:
        """The share of the time that a worker may work, SHARE_MIN to 1."""
        return self._share

    def set(self, share: float) -> None:
        """Slow down or hurry up; NaN counts as the least."""
        self._share = min(1.0, share) if share > SHARE_MIN else SHARE_MIN

    def begin(self) -> None:
        """The calling worker begins an item."""
        self._worker.since, self._worker.waited_s = self._clock.monotonic(), 0.0

    @contextmanager
    def admitted(self, to: AbstractContextManager[T]) -> Iterator[T]:
        """As `to`. Until it lets the calling worker in, that one waits, and nobody has to rest from waiting."""
        with ExitStack() as inside:
            with self.waits():
                value = inside.enter_context(to)
            yield value

    def wait(self, seconds: float, stopping: threading.Event) -> bool:
        """Wait for better times, which is no work either; true when `stopping` came first."""
        with self.waits():
            return stopping.wait(self._clock.real(seconds))

    @contextmanager
    def waits(self) -> Iterator[None]:
        """What the calling worker does meanwhile is no work: nobody has to rest from it."""
        began = self._clock.monotonic()
        try:
            yield
        finally:
            self._worker.waited_s += self._clock.monotonic() - began

    def rest(self, stopping: threading.Event, moves: Callable[[], None]) -> None:
        """Wait after an item, so that the work since `begin` is `share` of both together, whatever the share becomes
        meanwhile; ends early on `stopping`. `moves` is called at least every REST_S: whoever rests does not hang."""
        owed_s = self._clock.monotonic() - self._worker.since - self._worker.waited_s
        while owed_s > 0 and not stopping.is_set():
            moves()
            share = self._share
            if share >= 1:
                return
            earns = share / (1 - share)  # seconds of work, in a second of rest
            if owed_s <= REST_S * earns:
                stopping.wait(self._clock.real(owed_s / earns))
                return
            stopping.wait(self._clock.real(REST_S))
            owed_s -= REST_S * earns
