"""Whether every loop of the daemon still moves: each beats when it comes round, and the watchdog lives on that alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from edged.clock import Clock


@dataclass(slots=True)
class _Heart:
    limit_s: float
    at: float  # of the monotonic clock


class Beats:
    """When each loop last moved, and how long it may stand still. Safe to use from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._hearts: dict[str, _Heart] = {}
        self._lock = threading.Lock()

    def watch(self, name: str, limit_s: float) -> None:
        """From now on `name` must beat within `limit_s` seconds, again and again."""
        with self._lock:
            self._hearts[name] = _Heart(limit_s, self._clock.monotonic())

    def beat(self, name: str) -> None:
        """`name` moves. What is not watched is ignored: a loop may beat once more while it ends."""
        heart = self._hearts.get(name)
        if heart is not None:
            heart.at = self._clock.monotonic()

    def forget(self, name: str) -> None:
        """`name` has ended, as it should."""
        with self._lock:
            self._hearts.pop(name, None)

    def stalled(self) -> dict[str, float]:
        """Loop -> for how many seconds it has stood still, of those that did for longer than they may."""
        now = self._clock.monotonic()
        with self._lock:
            return {name: now - heart.at for name, heart in self._hearts.items() if now - heart.at > heart.limit_s}
