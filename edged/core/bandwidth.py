"""How fast bytes may flow, and whether they may flow at all over a link that is paid for by the byte."""

from __future__ import annotations

from dataclasses import dataclass

BURST_S = 1.0  # of the rate, after a pause
MIB = 1 << 20


class Bucket:
    """A token bucket as a virtual clock (GCRA, ITU-T I.371): the time at which what was taken is paid for."""

    def __init__(self) -> None:
        self._paid_at = 0.0

    def take(self, count: int, rate: float, now: float) -> float:
        """Take `count` bytes at `rate` bytes a second; the seconds to wait before more may flow. A rate of 0: no limit."""
        if rate <= 0:
            return 0.0
        self._paid_at = max(self._paid_at, now - BURST_S) + count / rate
        return max(0.0, self._paid_at - now)


@dataclass(frozen=True, slots=True)
class Metered:
    """What may flow over a metered link: `bytes_max` of a release at any time, everything from hour `start` to hour `end`
    of the day (None: never)."""

    bytes_max: int
    hours: tuple[int, int] | None = None

    def refusal(self, missing: int, hour: int) -> str:
        """Why `missing` bytes of a release are not fetched at this `hour` (0 to 23); empty: they may be."""
        if missing <= self.bytes_max:
            return ""
        when = "at no hour"
        if self.hours is not None:
            start, end = self.hours
            if start <= hour < end if start < end else hour >= start or hour < end:
                return ""
            when = f"from {start}:00 to {end}:00"
        return (
            f"{missing / MIB:.1f} MiB are missing, and this link is metered: at most {self.bytes_max / MIB:g} MiB of a "
            f"release at any time (host.metered_mib_max), more {when} (host.metered_hours)"
        )
