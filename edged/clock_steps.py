"""The wall clock is set while the daemon runs, or while it does not: whatever waits keeps the time that it had left.

Deadlines in the store are wall times, because they must outlive a restart. A device without a battery for its clock starts
years back, and then somebody tells it the time: without this, everything that waits would be given up at that moment, or
wait for years. The time that a device was off cannot be told from a clock that was set, and does not count either.
"""

from __future__ import annotations

import logging

from edged.clock import Clock
from edged.store import Store

log = logging.getLogger(__name__)

STEP_S = 2.0  # what the two clocks may drift apart from one look to the next
OFF_S = 60.0  # a restart that takes no longer is not worth touching every row
KEEP_S = 5.0  # how often the time is kept, so that the next start knows how far the clock has come


class ClockSteps:
    """Look often with `tick`."""

    def __init__(self, clock: Clock, store: Store) -> None:
        self._clock, self._store = clock, store
        self._monotonic = self._kept_at = clock.monotonic()
        self._wall, self._allowed = store.last_wall(), OFF_S
        if self._wall is None:
            self._wall = clock.now()

    def wall(self) -> float:
        """The wall time that the last look saw: whatever waits has been told of every step before it."""
        assert self._wall is not None
        return self._wall

    def tick(self) -> None:
        """Notice that the wall clock was set since the last look, and tell what waits."""
        assert self._wall is not None
        wall, monotonic = self._clock.now(), self._clock.monotonic()
        by_s = (wall - self._wall) - (monotonic - self._monotonic)
        if abs(by_s) > self._allowed:
            self._store.clock_stepped(by_s, wall, max(self._allowed, monotonic - self._monotonic))
            self._store.count("clock_steps")
            log.warning("the clock went %+.0f s more than time did: what waits keeps the time that it had left", by_s)
        elif monotonic - self._kept_at >= KEEP_S:
            self._store.keep_wall(wall)
            self._kept_at = monotonic
        self._wall, self._monotonic, self._allowed = wall, monotonic, STEP_S
