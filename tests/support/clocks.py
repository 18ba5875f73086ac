"""A clock for tests whose wall can be set beside the time that passes."""

from __future__ import annotations


class SetClock:
    """Stands still until it is moved: `passes` moves both clocks, `wall` can be set alone."""

    def __init__(self, wall: float = 1.8e9, mono: float = 50.0) -> None:
        self.wall, self.mono = wall, mono

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.mono

    def real(self, seconds: float) -> float:
        return seconds

    def passes(self, seconds: float) -> None:
        """So much time."""
        self.wall += seconds
        self.mono += seconds
