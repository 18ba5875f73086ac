"""Whether every loop moves, and how much of the time it may work."""

from __future__ import annotations

import math
import threading

import pytest

from edged.beats import Beats
from edged.pace import REST_S_MAX, SHARE_MIN, Pace


class HandClock:
    time = 0.0

    def now(self) -> float:
        return self.time

    def monotonic(self) -> float:
        return self.time

    def real(self, seconds: float) -> float:
        return seconds


def test_who_stands_still_for_longer_than_he_may_is_named() -> None:
    clock = HandClock()
    beats = Beats(clock)
    beats.watch("control", 5.0)
    beats.watch("worker-line", 60.0)
    clock.time = 5.0
    assert beats.stalled() == {}
    clock.time = 6.0
    assert beats.stalled() == {"control": 6.0}
    beats.beat("control")
    assert beats.stalled() == {}
    clock.time = 100.0
    beats.beat("control")
    beats.beat("nobody")
    assert beats.stalled() == {"worker-line": 100.0}
    beats.forget("worker-line")
    beats.beat("worker-line")
    clock.time = 101.0
    assert beats.stalled() == {}


class Waits(threading.Event):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.asked.append(timeout or 0.0)
        return False


@pytest.mark.parametrize(
    ("share", "busy_s", "rests"),
    [
        (1.0, 3.0, []),
        (0.5, 3.0, [3.0]),
        (0.25, 1.0, [3.0]),
        (0.0, 0.1, [0.1 * (1 / SHARE_MIN - 1)]),
        (-1.0, 0.1, [0.1 * (1 / SHARE_MIN - 1)]),
        (math.nan, 0.1, [0.1 * (1 / SHARE_MIN - 1)]),
        (7.0, 3.0, []),
        (0.5, 1000.0, [REST_S_MAX]),
    ],
)
def test_rest_follows_work(share: float, busy_s: float, rests: list[float]) -> None:
    pace, stopping = Pace(), Waits()
    pace.set(share)
    pace.rest(busy_s, stopping)
    assert stopping.asked == pytest.approx(rests)
