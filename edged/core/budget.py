"""How much a pipeline may ask: messages in any minute, bytes in any day. Pure: both clocks are arguments.

Laws: in no 60 s there are more messages, and in no 24 h more bytes, than the limit that held when the last of them was
sent. No jump of the wall clock changes that while the daemon runs; across a restart the wall clock only says how long
the daemon was away, and a clock that went backwards says: not at all.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

MINUTE_S = 60.0
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
# The part of both limits that only audits may use: escalations come in bursts, just when a release is bad, and must not
# take away what measures it.
AUDIT_RESERVE = 0.1

Refused = Literal["messages", "bytes"]


@dataclass(frozen=True, slots=True)
class Spent:
    """What the last minute and the last day hold."""

    messages: int
    bytes: int


class Budget:
    """One pipeline's account. `monotonic` and `wall` are seconds; only `saved` and the start look at the wall."""

    def __init__(self, monotonic: float, wall: float, saved: dict[str, Any] | None = None) -> None:
        """`saved`: what `saved` gave before a restart; without it, or where it cannot be read, nothing is spent."""
        at, hours = _read(saved, wall)
        # The account's own time goes on with the monotonic clock from where it stood.
        self._origin = monotonic - at
        self._hours = hours
        self._minute: deque[float] = deque()

    def take(self, size: int, audit: bool, monotonic: float, per_minute: int, per_day: int) -> Refused | None:
        """Spend one message of `size` bytes; which limit refuses it, or None when it is spent."""
        spent = self.spent(monotonic)
        kept_back = 0.0 if audit else AUDIT_RESERVE
        if spent.messages + 1 > per_minute - math.floor(per_minute * kept_back):
            return "messages"
        if spent.bytes + size > per_day - math.floor(per_day * kept_back):
            return "bytes"
        self._minute.append(monotonic)
        hour = self._hour(monotonic)
        self._hours[hour] = self._hours.get(hour, 0) + size
        return None

    def spent(self, monotonic: float) -> Spent:
        """What counts now. Bytes are kept by the hour, so a day is between 24 and 25 hours: never too few."""
        while self._minute and monotonic - self._minute[0] >= MINUTE_S:
            self._minute.popleft()
        now = self._hour(monotonic)
        self._hours = {hour: size for hour, size in self._hours.items() if hour >= now - DAY_S / HOUR_S}
        return Spent(len(self._minute), sum(self._hours.values()))

    def saved(self, monotonic: float, wall: float) -> dict[str, Any]:
        """The day's part as JSON. Minutes are not kept: a restart takes about as long."""
        return {"at": monotonic - self._origin, "wall": wall, "hours": sorted(self._hours.items())}

    def _hour(self, monotonic: float) -> int:
        return math.floor((monotonic - self._origin) / HOUR_S)


def _read(saved: dict[str, Any] | None, wall: float) -> tuple[float, dict[int, int]]:
    """Where the account's time stands now, and its bytes by hour."""
    if saved is None:
        return 0.0, {}
    try:
        away = min(max(wall - float(saved["wall"]), 0.0), 2 * DAY_S)
        at = float(saved["at"]) + away
        now = math.floor(at / HOUR_S)
        hours: dict[int, int] = {}
        for hour, size in saved["hours"]:  # an hour that has not come yet would count for ever
            hours[min(int(hour), now)] = hours.get(min(int(hour), now), 0) + max(0, int(size))
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0.0, {}
    return at, hours
