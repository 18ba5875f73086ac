"""At most so many frames a second, evenly. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass

EARLY = 0.25  # of the distance of two frames: a frame may come so much before its time, or the jitter of a camera whose
# rate is just the limit would cost every second frame


@dataclass(frozen=True, slots=True)
class Cadence:
    """`interval_s` between two frames, 0: all of them; `due`: when the next one is, in seconds of a monotonic clock."""

    interval_s: float = 0.0
    due: float = 0.0

    def wants(self, now: float) -> bool:
        """Whether a frame that comes now is taken."""
        return now >= self.due - EARLY * self.interval_s

    def taken(self, now: float) -> Cadence:
        """The cadence after a frame taken now: the next is due one interval after this one was, not after it came, so that
        the rate is kept on average; after a pause nothing is made up for."""
        due = self.due + self.interval_s
        return Cadence(self.interval_s, due if due > now else now + self.interval_s)

    def resting(self, until: float) -> Cadence:
        """The same, with no frame before `until`."""
        return Cadence(self.interval_s, max(self.due, until + EARLY * self.interval_s))
