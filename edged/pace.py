"""How much of the time the workers may work: what keeps a device within its temperature and CPU limits."""

from __future__ import annotations

import threading

SHARE_MIN = 0.05  # slower than this a device is no use to anybody: its limits say so in `edged status`
REST_S_MAX = 60.0  # after one item, so that a stop and a cooler device are noticed


class Pace:
    """`share` of the time may be work, 1: all of it. One thread sets it, the workers read it."""

    def __init__(self) -> None:
        self._share = 1.0

    @property
    def share(self) -> float:
        """The share of the time that a worker may work, SHARE_MIN to 1."""
        return self._share

    def set(self, share: float) -> None:
        """Slow down or hurry up; NaN counts as the least."""
        self._share = min(1.0, share) if share > SHARE_MIN else SHARE_MIN

    def rest(self, busy_s: float, stopping: threading.Event, scale: float = 1.0) -> None:
        """Wait after `busy_s` seconds of work, so that work is `share` of both together; ends early on `stopping`.
        `scale`: real seconds a second, for a test's clock."""
        pause = min(busy_s * (1.0 / self._share - 1.0), REST_S_MAX)
        if pause > 0:
            stopping.wait(pause * scale)
