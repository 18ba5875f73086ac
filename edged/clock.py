"""Time as an argument: the daemon takes a clock, so that tests compress an hour into seconds."""

from __future__ import annotations

import os
import time
from typing import Protocol

from edged.wire.ids import uuid7


class Clock(Protocol):
    """Two clocks: `now` is the wall (seconds since the epoch, may jump), `monotonic` only moves forward."""

    def now(self) -> float: ...

    def monotonic(self) -> float: ...

    def real(self, seconds: float) -> float:
        """How long to really wait for `seconds` of this clock."""
        ...


class SystemClock:
    """The machine's own."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    def real(self, seconds: float) -> float:
        return seconds


class FastClock:
    """Runs `speed` times as fast as the machine's from the moment it is made."""

    def __init__(self, speed: float) -> None:
        self._speed = speed
        self._wall, self._mono = time.time(), time.monotonic()

    def now(self) -> float:
        return self._wall + (time.monotonic() - self._mono) * self._speed

    def monotonic(self) -> float:
        return self._mono + (time.monotonic() - self._mono) * self._speed

    def real(self, seconds: float) -> float:
        return seconds / self._speed


def new_id(clock: Clock) -> str:
    """A fresh uuid7 at this clock's time."""
    return uuid7(int(clock.now() * 1000), os.urandom(10))
