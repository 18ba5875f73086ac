"""Whether every loop moves, and how much of the time it may work."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest

from edged.beats import Beats
from edged.pace import REST_S, SHARE_MIN, Pace


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
    """Time passes while somebody waits for it; `after` is called with how much that was."""

    def __init__(self, clock: HandClock, after: Callable[[float], None] = lambda waited: None) -> None:
        super().__init__()
        self.clock, self.after, self.waited = clock, after, 0.0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.clock.time += timeout
        self.waited += timeout
        self.after(self.waited)
        return self.is_set()


@pytest.mark.parametrize(
    ("share", "busy_s", "rests_s"),
    [
        (1.0, 3.0, 0.0),
        (0.5, 3.0, 3.0),
        (0.5, 0.02, 0.02),
        (0.25, 1.0, 3.0),
        (0.0, 0.1, 0.1 * (1 / SHARE_MIN - 1)),
        (-1.0, 0.1, 0.1 * (1 / SHARE_MIN - 1)),
        (math.nan, 0.1, 0.1 * (1 / SHARE_MIN - 1)),
        (7.0, 3.0, 0.0),
        (0.5, 300.0, 300.0),
    ],
)
def test_rest_follows_work(share: float, busy_s: float, rests_s: float) -> None:
    clock = HandClock()
    pace, stopping, moved = Pace(clock), Waits(clock), [0.0]
    pace.set(share)
    pace.begin()
    clock.time += busy_s
    moved[0] = clock.time
    pace.rest(stopping, lambda: moved.append(clock.time))
    assert stopping.waited == pytest.approx(rests_s)
    between = [later - earlier for earlier, later in pairwise([*moved, clock.time])]
    assert max(between, default=0.0) <= REST_S + 1e-9, "who rests moves"


def test_a_rest_follows_the_share_and_ends_with_the_daemon() -> None:
    clock = HandClock()
    pace = Pace(clock)

    def rest(busy_s: float, share: float, after: Callable[[float], None]) -> float:
        stopping = Waits(clock, after)
        pace.set(share)
        pace.begin()
        clock.time += busy_s
        pace.rest(stopping, lambda: None)
        return stopping.waited

    assert rest(30.0, 0.05, lambda waited: pace.set(1.0 if waited >= 5 else 0.05)) == 5.0, "cooler"
    assert rest(6.0, 0.5, lambda waited: pace.set(0.25 if waited >= 3 else 0.5)) == pytest.approx(3 + 9), "hotter"
    stopping = Waits(clock, lambda waited: stopping.set() if waited >= 2 else None)
    pace.begin()
    clock.time += 30.0
    pace.rest(stopping, lambda: None)
    assert stopping.waited == 2.0


def test_nobody_rests_from_having_waited() -> None:
    """For a model that is replaced, for another pipeline's turn on it, for room in the store, for another machine."""
    clock = HandClock()
    pace, stopping = Pace(clock), Waits(clock)
    pace.set(0.5)

    @contextmanager
    def turn(waits_s: float) -> Iterator[str]:
        clock.time += waits_s
        yield "model"

    pace.begin()
    with pace.admitted(turn(60.0)) as model, pace.admitted(turn(7.0)):
        assert model == "model"
        clock.time += 1.5
        with pace.waits():
            clock.time += 20.0
    assert not pace.wait(5.0, stopping)
    clock.time += 0.5
    stopping.waited = 0.0
    pace.rest(stopping, lambda: None)
    assert stopping.waited == 2.0
    pace.begin()
    clock.time += 1.0
    pace.rest(stopping, lambda: None)
    assert stopping.waited == 3.0, "of the item before nothing is left"


def test_every_worker_rests_from_its_own_work() -> None:
    clock = HandClock()
    pace, rested = Pace(clock), []
    pace.set(0.5)
    pace.begin()
    clock.time += 4.0

    def other() -> None:
        stopping = Waits(HandClock())
        pace.begin()
        clock.time += 1.0
        pace.rest(stopping, lambda: None)
        rested.append(stopping.waited)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    stopping = Waits(HandClock())
    pace.rest(stopping, lambda: None)
    assert (rested, stopping.waited) == ([1.0], 5.0)
