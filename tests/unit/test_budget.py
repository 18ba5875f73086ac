"""The budget: never more than its limits in any minute and any day, whatever the clocks do, and never shut for good."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.core.budget import DAY_S, HOUR_S, MINUTE_S, Budget, Spent

WALL = 1.8e9


def test_a_minute_and_a_day_end() -> None:
    budget = Budget(0.0, WALL)
    assert [budget.take(10, True, now, 2, 1000) for now in (0, 30, 59.9, 60, 89, 90)] == [
        None, None, "messages", None, "messages", None,
    ]  # fmt: skip
    assert budget.spent(90) == Spent(2, 40)
    assert budget.take(961, True, 200, 2, 1000) == "bytes"
    assert budget.take(960, True, 200, 2, 1000) is None
    assert budget.take(1, True, 24 * HOUR_S, 2, 1000) == "bytes"  # the first hour still touches this day
    assert budget.take(1, True, 25 * HOUR_S, 2, 1000) is None


@pytest.mark.parametrize(("per_minute", "per_day"), [(0, 1 << 30), (60, 0), (0, 0)])
def test_nothing_is_allowed_when_nothing_may_leave(per_minute: int, per_day: int) -> None:
    assert Budget(0.0, WALL).take(1, True, 0.0, per_minute, per_day) is not None


def test_a_tenth_is_for_audits_alone() -> None:
    budget = Budget(0.0, WALL)
    assert [budget.take(1, False, 0, 20, 1 << 30) for _ in range(20)].count(None) == 18
    assert [budget.take(1, True, 0, 20, 1 << 30) for _ in range(3)] == [None, None, "messages"]
    budget = Budget(0.0, WALL)
    assert budget.take(901, False, 0, 20, 1000) == "bytes"
    assert budget.take(900, False, 0, 20, 1000) is None
    assert budget.take(100, True, 0, 20, 1000) is None
    assert Budget(0.0, WALL).take(1, False, 0, 1, 1000) is None  # of one message there is no tenth


def restarted(budget: Budget, monotonic: float, wall: float, away: float, boot: float) -> Budget:
    """After a restart `away` seconds later by the wall clock; the monotonic clock begins anew at `boot`."""
    saved = json.loads(json.dumps(budget.saved(monotonic, wall)))
    return Budget(boot, wall + away, saved)


@pytest.mark.parametrize(
    ("away", "expected"),
    [
        (0.0, "bytes"),
        (12 * HOUR_S, "bytes"),
        (26 * HOUR_S, None),
        (-30 * DAY_S, "bytes"),  # a clock without a battery begins in 1970: nothing is known to have passed
        (9999 * DAY_S, None),
    ],
)
def test_the_day_survives_a_restart(away: float, expected: str | None) -> None:
    budget = Budget(500.0, WALL)
    assert budget.take(1000, True, 500.0, 60, 1000) is None
    again = restarted(budget, 600.0, WALL + 100, away, 3.0)
    assert again.take(1, True, 3.0, 60, 1000) == expected
    assert again.take(1, True, 3.0 + 26 * HOUR_S, 60, 1000) is None  # never shut for good


@pytest.mark.parametrize(
    "saved",
    [
        {}, {"at": 5.0, "wall": WALL}, {"at": "x", "wall": WALL, "hours": []}, {"at": 1.0, "wall": None, "hours": []},
        {"at": math.nan, "wall": WALL, "hours": []}, {"at": 1.0, "wall": WALL, "hours": [[1]]},
        {"at": 1.0, "wall": WALL, "hours": 7}, {"at": math.inf, "wall": WALL, "hours": []},
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_no_obstacle(saved: Any) -> None:
    assert Budget(0.0, WALL, saved).take(1, True, 0.0, 1, 10_000) is None


def test_hours_that_have_not_come_yet_do_not_count_for_ever() -> None:
    budget = Budget(0.0, WALL, {"at": 10.0, "wall": WALL, "hours": [[500, 1000], [0, -5]]})
    assert budget.take(1, True, 0.0, 60, 1000) == "bytes"
    assert budget.take(1, True, 26 * HOUR_S, 60, 1000) is None


# (seconds until it, its size, an audit, how the wall clock jumps before it, a restart before it)
events = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 7.0, 59.0, 61.0, 1800.0, 3601.0, 40_000.0]),
        st.integers(0, 400),
        st.booleans(),
        st.sampled_from([0.0, 0.0, -1e9, -3600.0, 3600.0, 1e9]),
        st.booleans(),
    ),
    max_size=80,
)


@settings(deadline=None)
@given(events, st.integers(0, 12), st.integers(0, 2000))
def test_no_minute_and_no_day_ever_holds_more_than_its_limit(
    rows: list[tuple[float, int, bool, float, bool]], per_minute: int, per_day: int
) -> None:
    """Restarts may forget the minute, and a clock that jumps forward while the daemon is away the day: none here."""
    true, wall, base = 0.0, WALL, 1000.0
    budget, messages, sizes = Budget(base, wall), [], []
    for wait, size, audit, jump, restart in rows:
        true += wait
        wall += wait + jump
        if restart:
            sent_before, boot = len(messages), 5.0
            budget = restarted(budget, base + true, wall, min(jump, 0.0), boot)
            base = boot - true
            messages = messages[sent_before:]
        if budget.take(size, audit, base + true, per_minute, per_day) is None:
            messages.append(true)
            sizes.append((true, size))
        assert sum(true - at < MINUTE_S for at in messages) <= per_minute
        assert sum(n for at, n in sizes if true - at < DAY_S) <= per_day


@given(events, st.integers(1, 12), st.integers(400, 2000))
def test_it_always_opens_again(rows: list[tuple[float, int, bool, float, bool]], per_minute: int, per_day: int) -> None:
    now, wall, budget = 0.0, WALL, Budget(0.0, WALL)
    for wait, size, audit, jump, restart in rows:
        now += wait
        wall += jump
        if restart:
            budget = restarted(budget, now, wall, jump, now)
        budget.take(size, audit, now, per_minute, per_day)
    assert budget.take(360, False, now + 26 * HOUR_S, per_minute, per_day) is None
    assert len(budget.saved(now, wall)["hours"]) <= 26
