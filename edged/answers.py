"""Whether a pipeline's questions are answered: the breaker's table with its lock and the questions that are open."""

from __future__ import annotations

import threading

from edged.core.breaker import Breaker, State, ask, late, verdict

OPEN_MAX = 1024  # questions whose lateness is watched; beyond that the watched ones speak for all


class Answers:
    """Workers ask, the control loop hears. All times are the monotonic clock's."""

    def __init__(self, answer_by_s: float) -> None:
        self._answer_by_s = answer_by_s
        self._breaker = Breaker()
        self._open: dict[str, float] = {}  # sample -> when its answer is late
        self._lock = threading.Lock()

    @property
    def state(self) -> State:
        """Whether those who ask are kept waiting."""
        return self._breaker.state

    def asked(self, sample: str, now: float) -> None:
        """A question is about to be kept."""
        with self._lock:
            if len(self._open) < OPEN_MAX:
                self._open.setdefault(sample, now + self._answer_by_s)

    def forget(self, sample: str) -> None:
        """It was not kept after all."""
        with self._lock:
            self._open.pop(sample, None)

    def may_wait(self, now: float) -> bool:
        """Whether somebody who asks now shall be kept waiting."""
        with self._lock:
            waits, self._breaker = ask(self._breaker, now)
        return waits

    def answered(self, sample: str) -> State | None:
        """Somebody answered; the new state when it is another."""
        with self._lock:
            self._open.pop(sample, None)
            return self._become(verdict(self._breaker))

    def tick(self, now: float) -> State | None:
        """Count what has become late; the new state when it is another."""
        with self._lock:
            after = self._breaker
            for sample in [sample for sample, by in self._open.items() if by <= now]:
                del self._open[sample]
                after = late(after, now)
            return self._become(after)

    def _become(self, breaker: Breaker) -> State | None:
        before, self._breaker = self._breaker, breaker
        return None if breaker.state is before.state else breaker.state
