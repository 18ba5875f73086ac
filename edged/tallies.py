"""What each release did lately in each slot, for its probation and for that of its successor."""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass, field

from edged.config import ANSWERS_MAX
from edged.core.probation import DOUBTS, UNCALIBRATED, Signs

RELEASES_MAX = 4  # of a slot, those that answered last
P95 = 0.95


@dataclass(slots=True)
class _Tally:
    answers: deque[tuple[float, str, bool]] = field(default_factory=lambda: deque(maxlen=ANSWERS_MAX))


@dataclass(slots=True)
class _Slot:
    releases: dict[str, _Tally] = field(default_factory=dict)  # the one that answered last is at the end
    errors: int = 0
    engine_ends: int = 0


class Tallies:
    """Workers add, the control loop looks. Safe to use from any thread."""

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._lock = threading.Lock()

    def answer(self, slot: str, release: str, *, reason: str, empty: bool, latency_ms: float) -> None:
        """One item was answered; `reason`: of the decision about it."""
        with self._lock:
            of = self._slots.setdefault(slot, _Slot()).releases
            tally = of.pop(release, None) or _Tally()
            of[release] = tally
            tally.answers.append((latency_ms, reason, empty))
            while len(of) > RELEASES_MAX:
                del of[next(iter(of))]

    def error(self, slot: str, *, ended: bool = False) -> None:
        """The engine failed on an item; `ended`: its own process has ended."""
        with self._lock:
            of = self._slots.setdefault(slot, _Slot())
            of.errors += not ended
            of.engine_ends += ended

    def begin(self, slot: str, release: str) -> None:
        """A probation begins: nothing is known yet of `release` here."""
        with self._lock:
            of = self._slots.setdefault(slot, _Slot())
            of.errors = of.engine_ends = 0
            of.releases.pop(release, None)

    def signs(self, slot: str, release: str) -> Signs:
        """What `release` has shown since its probation began."""
        with self._lock:
            of = self._slots.get(slot, _Slot())
            return _signs(of.releases.get(release, _Tally()), of.errors, of.engine_ends)

    def before(self, slot: str, release: str) -> Signs | None:
        """What the release has shown that answered last in this slot, but for `release`; None when none did."""
        with self._lock:
            others = [t for name, t in self._slots.get(slot, _Slot()).releases.items() if name != release]
            return _signs(others[-1], 0, 0) if others else None


def _signs(tally: _Tally, errors: int, ends: int) -> Signs:
    answers = tally.answers
    if not answers:
        return Signs(errors=errors, engine_ends=ends)
    shown = len(answers)
    latencies = sorted(latency for latency, _, _ in answers)
    return Signs(
        items=shown,
        doubtful=sum(reason in DOUBTS for _, reason, _ in answers),
        empty=sum(empty for _, _, empty in answers),
        errors=errors,
        engine_ends=ends,
        latency_ms_p95=latencies[math.ceil(P95 * shown) - 1],
        uncalibrated=sum(reason == UNCALIBRATED for _, reason, _ in answers),
    )
